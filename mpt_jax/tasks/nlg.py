"""Text from data: importing this module registers e2e and webnlg.

These are GEM's sets: the cleaned E2E data and WebNLG of 2020, not the original ones that the MPT
paper scores, so figures are not comparable with its Table 5.

Evaluation has one row for each meaning, with all its references; training one row for each
reference. Metrics need the extra `nlg`; without it a task says so when it is first read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mpt_jax.tasks import generation_metrics as metrics
from mpt_jax.tasks.splits import PartsSource, own
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import Preprocessor


class GroupedSource(PartsSource):
    """A source whose splits for evaluation have one row for each meaning.

    The meaning is the first of the features that it reads, beside `target` and `references`. Rows
    where it is equal become one, with all their references; one without any is left out.
    """

    def get_dataset(self, split: str = "train", *args: Any, **settings: Any) -> tf.data.Dataset:  # type: ignore[override]
        """Returns the rows of a split; see `PartsSource.get_dataset`.

        Raises:
            ImportError: what scores the generated text is not installed.
        """
        metrics.check_installed()
        rows = super().get_dataset(split, *args, **settings)
        if split == "train":
            return rows
        return tf.data.Dataset.from_generator(
            lambda: _grouped(rows, self.reads[0]), output_signature=rows.element_spec
        )

    def num_rows(self, split: str) -> int:
        """Returns how many rows `get_dataset` yields; reads them where they are grouped."""
        if split == "train":
            return super().num_rows(split)
        return sum(1 for _ in self.get_dataset(split).as_numpy_iterator())

    def positions(self, split: str) -> np.ndarray:
        """Returns where the rows [n] of a split come in what `get_dataset` yields."""
        return super().positions(split) if split == "train" else np.arange(self.num_rows(split))


def _grouped(rows: tf.data.Dataset, meaning: str) -> list[dict[str, Any]]:
    """One row for each meaning, in the order in which they come first."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows.as_numpy_iterator():
        key = tuple(np.atleast_1d(row[meaning]).tolist())
        given = [text for text in row["references"].tolist() if text.strip()]
        group = found.setdefault(key, {meaning: row[meaning], "references": []})
        group["references"] += given or [row["target"]] * bool(row["target"].strip())
    return [
        {**group, "target": group["references"][0]}
        for group in found.values()
        if group["references"]
    ]


def described(meaning: Callable[[Any], tf.Tensor]) -> Callable[[str], Preprocessor]:
    """Templates of generation: a text's meaning after the prefix; rows without a text are left out.

    Args:
        meaning: row -> what is to be said, as one text.
    """

    def preprocess(prefix: str) -> Preprocessor:
        def text(row: Any) -> dict[str, tf.Tensor]:
            inputs = tf.strings.join([prefix, meaning(row)], " ")
            return {"inputs": inputs, "targets": row["target"], "references": row["references"]}

        plain = tf.autograph.experimental.do_not_convert
        said = plain(lambda row: tf.strings.length(tf.strings.strip(row["target"])) > 0)
        return lambda dataset: dataset.filter(said).map(
            plain(text), num_parallel_calls=tf.data.AUTOTUNE
        )

    return preprocess


def slots(row: Any) -> tf.Tensor:
    """E2E: `name[The Vaults], area[riverside]` as `name: The Vaults area: riverside`."""
    marked = tf.strings.regex_replace(
        row["meaning_representation"], r"\s*([^\[\],]+)\[([^\]]*)\]\s*,?", r" \1: \2"
    )
    return tf.strings.strip(marked)


def triples(row: Any) -> tf.Tensor:
    """WebNLG: `subject | property | object` joined with `&&`; underscores become spaces."""
    return tf.strings.regex_replace(
        tf.strings.reduce_join(row["input"], separator=" && "), "_", " "
    )


def _gem(name: str, config: str, meaning: str, template: Callable[..., Any], **row: Any) -> Row:
    return Row(
        name,
        f"gem/{config}:1.1.0",
        parts=own(),
        reads=[meaning, "target", "references"],
        template=described(template),
        postprocess=metrics.references,
        source=GroupedSource,
        **row,
    )


ROWS = (
    _gem(
        "e2e",
        "e2e_nlg",
        "meaning_representation",
        slots,
        sizes={"train": 33_525, "validation": 4_299, "test": 4_693},
        metrics=[
            metrics.bleu,
            metrics.nist,
            metrics.meteor_exact_stem,
            metrics.rouge_l,
            metrics.cider_d,
        ],
    ),
    _gem(
        "webnlg",
        "web_nlg_en",
        "input",
        triples,
        sizes={"train": 35_426, "validation": 1_667, "test": 1_779},
        metrics=[metrics.bleu, metrics.meteor_exact_stem, metrics.ter],
    ),
)

register(ROWS)

"""Data-to-text generation: importing this module registers e2e and webnlg.

The data are the GEM versions (cleaned E2E and WebNLG 2020) instead of the original data of the MPT
paper, so scores are not comparable with its Table 5.

Evaluation uses one row for each meaning, with all its references. Training uses one row for each
reference. The metrics need the extra `nlg`. Without it, the first read of a task fails.
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
    """A source whose evaluation splits have one row for each meaning, with all its references.

    The first feature in `reads` is the meaning; the others are `target` and `references`. The
    target of a row without references is used as its reference. Meanings without any are dropped.
    """

    def get_dataset(self, split: str = "train", *args: Any, **settings: Any) -> tf.data.Dataset:  # type: ignore[override]
        """Returns the rows of a split; see `PartsSource.get_dataset`.

        Raises:
            ImportError: a library of the metrics is not installed.
        """
        metrics.check_installed()
        rows = super().get_dataset(split, *args, **settings)
        if split == "train":
            return rows
        return tf.data.Dataset.from_generator(
            lambda: _grouped(rows, self.reads[0]), output_signature=rows.element_spec
        )

    def num_rows(self, split: str) -> int:
        """Returns how many rows `get_dataset` yields. Reads all rows of an evaluation split."""
        if split == "train":
            return super().num_rows(split)
        return sum(1 for _ in self.get_dataset(split).as_numpy_iterator())

    def positions(self, split: str) -> np.ndarray:
        """Returns the positions of a split's rows [n] in the unshuffled output of `get_dataset`."""
        return super().positions(split) if split == "train" else np.arange(self.num_rows(split))


def _grouped(rows: tf.data.Dataset, meaning: str) -> list[dict[str, Any]]:
    """Returns one row for each value of the feature `meaning`, in the order of first occurrence."""
    groups: dict[Any, dict[str, Any]] = {}
    for row in rows.as_numpy_iterator():
        key = tuple(np.atleast_1d(row[meaning]).tolist())
        references = [text for text in row["references"].tolist() if text.strip()]
        group = groups.setdefault(key, {meaning: row[meaning], "references": []})
        group["references"] += references or [row["target"]] * bool(row["target"].strip())
    return [
        {**group, "target": group["references"][0]}
        for group in groups.values()
        if group["references"]
    ]


def described(meaning: Callable[[Any], tf.Tensor]) -> Callable[[str], Preprocessor]:
    """Returns a template for generation. Inputs are the prefix and the meaning. Rows without a
    target are dropped.

    Args:
        meaning: Function from a row to its meaning as text.
    """

    def preprocess(prefix: str) -> Preprocessor:
        def text(row: Any) -> dict[str, tf.Tensor]:
            inputs = tf.strings.join([prefix, meaning(row)], " ")
            return {"inputs": inputs, "targets": row["target"], "references": row["references"]}

        plain = tf.autograph.experimental.do_not_convert
        has_target = plain(lambda row: tf.strings.length(tf.strings.strip(row["target"])) > 0)
        return lambda dataset: dataset.filter(has_target).map(
            plain(text), num_parallel_calls=tf.data.AUTOTUNE
        )

    return preprocess


def slots(row: Any) -> tf.Tensor:
    """Rewrites E2E's `name[The Vaults], area[riverside]` as `name: The Vaults area: riverside`."""
    marked = tf.strings.regex_replace(
        row["meaning_representation"], r"\s*([^\[\],]+)\[([^\]]*)\]\s*,?", r" \1: \2"
    )
    return tf.strings.strip(marked)


def triples(row: Any) -> tf.Tensor:
    """Joins WebNLG's triples `subject | property | object` with `&&`. Underscores become spaces."""
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

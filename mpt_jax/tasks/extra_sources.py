"""Additional source tasks of the MPT paper's run with twelve sources.

Importing this module registers agnews, commonsenseqa, openbookqa, arc_easy, arc_challenge and
anli_r1 to anli_r3. WinoGrande, the sixth additional data set, is in `mpt_jax.tasks.mpt_others`.

The paper only names the data sets. We chose the parts of ARC and ANLI, and all splits except
ANLI's; docs/tasks.md gives the reasons.
"""

from functools import partial

import tensorflow as tf

from mpt_jax.tasks.splits import carved, halved, own
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import labelled, multiple_choice


def _words(options: int) -> tuple[str, ...]:
    return tuple(f"choice{number}" for number in range(1, options + 1))


def _arc(part: str, train: int, validation: int, test: int) -> Row:
    """Returns the `Row` of a part of ARC. Its questions have three to five options, labeled with
    letters or digits."""
    return Row(
        f"arc_{part.lower()}",
        f"ai2_arc/ARC-{part}:1.0.0",
        parts=own(),
        sizes={"train": train, "validation": validation, "test": test},
        reads=["question", "choices", "answerKey"],
        template=partial(
            multiple_choice,
            lambda row: row["question"],
            lambda row: row["choices"]["text"],
            lambda row: tf.equal(row["choices"]["label"], row["answerKey"]),
        ),
        words=_words(5),
    )


def _anli(number: int, train: int, test: int) -> Row:
    return Row(
        f"anli_r{number}",
        f"anli/r{number}:0.1.0",
        parts=carved(),
        sizes={"train": train, "validation": test},
        template=partial(labelled, {"premise": "context", "hypothesis": "hypothesis"}),
        words=("entailment", "neutral", "contradiction"),
    )


_LETTERS = "ABCD"

ROWS = (
    Row(
        "agnews",
        "ag_news_subset:1.0.0",
        parts=carved("train", "test"),
        sizes={"train": 120_000, "test": 7_600},
        template=partial(labelled, {"title": "title", "description": "description"}),
        words=("World", "Sports", "Business", "Sci/Tech"),
    ),
    # CommonsenseQA's questions; the explanations in this data set are not used.
    Row(
        "commonsenseqa",
        "cos_e:0.0.1",
        parts=halved(),
        sizes={"train": 9_741, "validation": 1_221},
        reads=["question", "choices", "answer"],
        template=partial(
            multiple_choice,
            lambda row: row["question"],
            lambda row: row["choices"],
            lambda row: tf.equal(row["choices"], row["answer"]),
        ),
        words=_words(5),
    ),
    Row(
        "openbookqa",
        "openbookqa:0.1.0",
        parts=own(),
        sizes={"train": 4_957, "validation": 500, "test": 500},
        reads=["question", "answerKey"],
        template=partial(
            multiple_choice,
            lambda row: row["question"]["stem"],
            lambda row: tf.stack([row["question"][f"choice_{letter}"] for letter in _LETTERS]),
            lambda row: tf.equal(
                tf.range(len(_LETTERS), dtype=row["answerKey"].dtype), row["answerKey"]
            ),
        ),
        words=_words(4),
    ),
    _arc("Easy", 2_251, 570, 2_376),
    _arc("Challenge", 1_119, 299, 1_172),
    _anli(1, 16_946, 1_000),
    _anli(2, 45_460, 1_000),
    _anli(3, 100_459, 1_200),
)

register(ROWS)

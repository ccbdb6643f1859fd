"""GLUE: importing this module registers mnli, qqp, qnli, sst2, stsb, mrpc, rte and cola."""

from functools import partial

from mpt_jax.tasks import text_metrics
from mpt_jax.tasks.splits import carved, halved, own
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import labelled, similarity


def _glue(name: str, fields: dict[str, str], **row) -> Row:
    template = partial(labelled, fields)
    return Row(name, f"glue/{name}:2.0.0", keys=["idx"], **{"template": template, **row})


_PREMISE = {"premise": "premise", "hypothesis": "hypothesis"}
_QUESTIONS = {"question1": "question1", "question2": "question2"}
_SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}
_SENTENCE = {"sentence": "sentence"}

ROWS = (
    _glue(
        "mnli",
        _PREMISE,
        words=("entailment", "neutral", "contradiction"),
        parts=own("train", "validation_mismatched", "validation_matched"),
        sizes={"train": 392_702, "validation_mismatched": 9_832, "validation_matched": 9_815},
    ),
    _glue(
        "qqp",
        _QUESTIONS,
        words=("not_duplicate", "duplicate"),
        parts=carved(),
        sizes={"train": 363_846, "validation": 40_430},
        metrics=[text_metrics.f1],
    ),
    _glue(
        "qnli",
        {"question": "question", "sentence": "sentence"},
        words=("entailment", "not_entailment"),
        parts=carved(),
        sizes={"train": 104_743, "validation": 5_463},
    ),
    _glue(
        "sst2",
        _SENTENCE,
        words=("negative", "positive"),
        parts=carved(),
        sizes={"train": 67_349, "validation": 872},
    ),
    _glue(
        "stsb",
        _SENTENCES,
        template=similarity(_SENTENCES),
        parts=halved(),
        sizes={"train": 5_749, "validation": 1_500},
        metrics=[text_metrics.correlations],
    ),
    _glue(
        "mrpc",
        _SENTENCES,
        words=("not_equivalent", "equivalent"),
        parts=halved(),
        sizes={"train": 3_668, "validation": 408},
        metrics=[text_metrics.f1],
    ),
    _glue(
        "rte",
        _SENTENCES,
        words=("entailment", "not_entailment"),
        parts=halved(),
        sizes={"train": 2_490, "validation": 277},
    ),
    _glue(
        "cola",
        _SENTENCE,
        words=("unacceptable", "acceptable"),
        parts=halved(),
        sizes={"train": 8_551, "validation": 1_043},
        metrics=[text_metrics.matthews],
        accuracy_first=False,
    ),
)

register(ROWS)

"""SuperGLUE: importing this module registers boolq, cb, wic, wsc, multirc and record."""

from functools import partial

from mpt_jax.tasks import text_metrics
from mpt_jax.tasks.splits import carved, halved
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import cloze, coreference, labelled, without_markup

_TRUTH = ("False", "True")


def _super_glue(name: str, config: str = "", **row) -> Row:
    data = f"super_glue/{config or name}:1.0.2"
    return Row(name, data, **{"keys": ["idx"], "parts": halved(), **row})


ROWS = (
    _super_glue(
        "boolq",
        template=partial(labelled, {"question": "question", "passage": "passage"}),
        words=_TRUTH,
        sizes={"train": 9_427, "validation": 3_270},
    ),
    _super_glue(
        "cb",
        template=partial(labelled, {"premise": "premise", "hypothesis": "hypothesis"}),
        words=("entailment", "contradiction", "neutral"),
        sizes={"train": 250, "validation": 56},
        metrics=[text_metrics.macro_f1],
    ),
    _super_glue(
        "wic",
        template=partial(
            labelled, {"sentence1": "sentence1", "sentence2": "sentence2", "word": "word"}
        ),
        words=_TRUTH,
        sizes={"train": 5_428, "validation": 638},
    ),
    _super_glue(
        "wsc",
        "wsc.fixed",
        template=coreference,
        words=_TRUTH,
        sizes={"train": 554, "validation": 104},
    ),
    _super_glue(
        "multirc",
        template=partial(
            labelled,
            {"question": "question", "answer": "answer", "paragraph": "paragraph"},
            clean=without_markup,
        ),
        words=_TRUTH,
        sizes={"train": 27_243, "validation": 4_848},
        keys=["idx/paragraph", "idx/question", "idx/answer"],
        metrics=[text_metrics.f1],
        accuracy_first=False,
    ),
    # Sizes count queries; a query becomes one row for each of its answers.
    _super_glue(
        "record",
        template=cloze,
        parts=carved(),
        sizes={"train": 100_730, "validation": 10_000},
        keys=["idx/passage", "idx/query"],
        metrics=[text_metrics.answer_overlap],
        postprocess=text_metrics.gold_answers,
    ),
)

register(ROWS)

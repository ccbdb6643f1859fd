"""Extractive question answering: SQuAD and the MPT paper's MRQA tasks.

Importing this module registers squad, nq, hotpotqa, searchqa and newsqa.
"""

from mpt_jax.tasks import text_metrics
from mpt_jax.tasks.splits import carved
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import question


def _reading(name: str, data: str, train: int, test: int, answers) -> Row:
    return Row(
        name,
        data,
        parts=carved(),
        sizes={"train": train, "validation": test},
        reads=["question", "context", "answers"],
        template=question(answers),
        metrics=[text_metrics.answer_overlap],
        postprocess=text_metrics.gold_answers,
    )


def _mrqa(name: str, config: str, train: int, test: int) -> Row:
    return _reading(name, f"mrqa/{config}:1.0.0", train, test, lambda row: row["answers"])


ROWS = (
    _reading("squad", "squad/v1.1:3.0.0", 87_599, 10_570, lambda row: row["answers"]["text"]),
    _mrqa("nq", "natural_questions", 104_071, 12_836),
    _mrqa("hotpotqa", "hotpot_qa", 72_928, 5_901),
    _mrqa("searchqa", "search_qa", 117_384, 16_980),
    _mrqa("newsqa", "news_qa", 74_160, 4_212),
)

register(ROWS)

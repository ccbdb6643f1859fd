"""Synthetic examples with the text lengths of the paper's source tasks, and random token ids.

Tasks are drawn at the paper's rates: in proportion to their training examples, at most 2^18 each.
Token counts of the real texts are not available here, so they are *assumed*: inputs are log-normal
with the means below and truncated at 256, targets have the numbers of tokens below. The means are
the known mean words of these data sets (about 32, 24, 38, 10, 130 and 210, without template), times
1.3 tokens per word in T5's vocabulary, plus 8 template tokens for each text of the input. The
spreads are our choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mpt_jax.batching.collate import Example

CAP = 2**18
TEXT_LIMIT, TARGET_LIMIT = 256, 16
FIRST_ID, EOS = 3, 1
EDGES = (*range(0, TEXT_LIMIT, 32), TEXT_LIMIT + 1)


class SourceTask(NamedTuple):
    """One task of the mix.

    Attributes:
        name: the data set.
        examples: training examples, as in tasks/.
        mean: assumed mean of input tokens, before truncation.
        spread: assumed standard deviation of the logarithm of input tokens.
        targets: assumed numbers of target tokens, all equally frequent, including end of sequence.
    """

    name: str
    examples: int
    mean: float
    spread: float
    targets: tuple[int, ...]


TASKS = (
    SourceTask("mnli", 392_702, 58, 0.40, (3, 4, 5)),
    SourceTask("qqp", 362_846, 47, 0.40, (3, 6)),
    SourceTask("qnli", 103_743, 66, 0.45, (4, 8)),
    SourceTask("sst2", 66_349, 21, 0.50, (2, 2)),
    SourceTask("squad", 86_599, 185, 0.40, (2, 3, 3, 4, 4, 5, 5, 6, 8, 11, 16)),
    SourceTask("record", 138_854, 290, 0.30, (3, 3, 4, 4, 5, 6, 8)),
)


def rates() -> np.ndarray:
    """Returns the share [K] of each task."""
    sizes = np.array([min(task.examples, CAP) for task in TASKS], np.float64)
    return sizes / sizes.sum()


class Mix(NamedTuple):
    """Lengths of N examples.

    Attributes:
        tasks: [N] indices into `TASKS`.
        inputs: [N] numbers of input tokens.
        targets: [N] numbers of target tokens.
    """

    tasks: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray


def draw(count: int, seed: int = 0) -> Mix:
    """Draws the lengths of `count` examples, in arrival order."""
    rng = np.random.default_rng(seed)
    tasks = rng.choice(len(TASKS), count, p=rates())
    spread = np.array([task.spread for task in TASKS])[tasks]
    # The mean of a log-normal is exp(mu + spread^2 / 2).
    location = np.log([task.mean for task in TASKS])[tasks] - spread**2 / 2
    inputs = np.clip(np.rint(rng.lognormal(location, spread)), 4, TEXT_LIMIT).astype(int)
    targets = np.array([rng.choice(TASKS[task].targets) for task in tasks])
    return Mix(tasks, inputs, targets)


def examples(mix: Mix, vocabulary: int, one_task: bool = False, seed: int = 0) -> list[Example]:
    """Returns examples of these lengths with random ids, each text with an end of sequence.

    Args:
        mix: the lengths.
        vocabulary: V.
        one_task: gives all examples bank row 0, as in a target stage, instead of their task's row.
        seed: seed of the ids.
    """
    rng = np.random.default_rng(seed)
    ids = lambda n: [*rng.integers(FIRST_ID, vocabulary, n - 1).tolist(), EOS]  # noqa: E731
    return [
        Example(ids(text), ids(target), 0 if one_task else int(task))
        for task, text, target in zip(*mix, strict=True)
    ]


def description(mix: Mix) -> dict[str, Any]:
    """Returns the assumptions and the resulting histogram, for the record."""
    return {
        "assumed": {task.name: task._asdict() for task in TASKS},
        "shares": {task.name: float(r) for task, r in zip(TASKS, rates(), strict=True)},
        "examples": len(mix.inputs),
        "mean_input_tokens": float(mix.inputs.mean()),
        "mean_target_tokens": float(mix.targets.mean()),
        "histogram": {
            "input_tokens_from": list(EDGES[:-1]),
            "all": np.histogram(mix.inputs, EDGES)[0].tolist(),
            **{
                task.name: np.histogram(mix.inputs[mix.tasks == k], EDGES)[0].tolist()
                for k, task in enumerate(TASKS)
            },
        },
    }

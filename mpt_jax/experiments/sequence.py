"""Stages of sequences of tasks: one job for each task, which starts from the artifact of the job
before.

The functions are for gin files. Stage t has the first t runs of every sequence; only the newest is
trained. A sequence is a list of run names, and each sequence is one group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mpt_jax.core.runs import data_name

Sequences = Sequence[Sequence[str]]


def run_names(sequences: Sequences, step: int) -> list[str]:
    """Returns the runs of the first `step` tasks of all sequences, one sequence after another.

    Raises:
        ValueError: sequences differ in length or are empty, or have no such step.
    """
    lengths = sorted({len(sequence) for sequence in sequences})
    if (
        isinstance(sequences, str)
        or len(lengths) != 1
        or any(isinstance(x, str) for x in sequences)
    ):
        raise ValueError(
            f"SEQUENCES must be a list of equally long lists of tasks, got {sequences!r:.200}. "
            "Write, for example, SEQUENCES = [['toy_many_1', 'toy_many_2']]."
        )
    if not 1 <= step <= lengths[0]:
        raise ValueError(
            f"STEP is {step}, but each sequence has {lengths[0]} tasks. Set STEP to a number from "
            f"1 to {lengths[0]}."
        )
    return [name for sequence in sequences for name in sequence[:step]]


def task_names(sequences: Sequences, step: int) -> list[str]:
    """Returns the task of each of the `run_names`, without settings such as a learning rate."""
    return [data_name(name) for name in run_names(sequences, step)]


def groups(sequences: Sequences, step: int) -> list[int]:
    """Returns the group of each of the `run_names`: the number of its sequence."""
    run_names(sequences, step)
    return [number for number in range(len(sequences)) for _ in range(step)]


def start_from(
    sequences: Sequences, step: int, mean: bool = False
) -> str | dict[str, str | dict[str, float]]:
    """Returns a prompt method's `start_from`: the newest run of a sequence starts from the prompt
    of the run before or, with `mean`, from the mean of all runs before; all others keep theirs. In
    the first step nothing is read."""
    if step == 1:
        return "average"
    run_names(sequences, step)
    rows: dict[str, str | dict[str, float]] = {}
    for sequence in sequences:
        *before, newest = sequence[:step]
        rows |= {name: name for name in before}
        rows[newest] = dict.fromkeys(before, 1.0) if mean else before[-1]
    return rows


def stage(name: str, step: int) -> str:
    """Returns the name of a stage's folder, `<name>_<step>`."""
    return f"{name}_{step}"


def previous_artifact(base: str, name: str, step: int) -> str | None:
    """Returns the artifact of the stage before, below the folder `base`; None in the first step."""
    return None if step == 1 else os.path.join(base, stage(name, step - 1), "artifact")


def seen_split(step: int) -> str:
    """Returns the split with the test images of all classes so far (`tasks.incremental`)."""
    return f"seen_{step}"


def count(sequences: Sequences) -> int:
    """Returns the number of sequences."""
    return len(sequences)

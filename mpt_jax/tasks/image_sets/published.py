"""Published numbers of classes and images of the suites' tasks, known without their data."""

from __future__ import annotations

from typing import Any

import seqio

from mpt_jax.data.classes import classes_of

SPLITS = ("train", "validation", "test")


def num_classes(task: seqio.Task) -> int | None:
    """Returns the number of classes of a task of a suite, or of a task that is derived from one;
    None for other tasks."""
    for suite in _suites():
        for row in suite.SETS:
            if classes_of(seqio.TaskRegistry.get(row.name)) is classes_of(task):
                return row.classes.number
    return None


def sizes(task_name: str) -> dict[str, int]:
    """Returns split -> number of images of a task of a suite; {} for other tasks."""
    for suite in _suites():
        found = suite.SIZES.get(task_name.removeprefix(suite.PREFIX))
        if found and task_name.startswith(suite.PREFIX):
            return {split: n for split, n in zip(SPLITS, found, strict=True) if n}
    return {}


def _suites() -> tuple[Any, ...]:
    from mpt_jax.tasks.image_sets import coop, elevater  # importing them registers their tasks

    return coop, elevater

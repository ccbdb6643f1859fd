"""Sequences of image tasks that divide the classes of one data set, for continual learning.

`register` divides C classes into tasks `<name>_1` ... `<name>_T`. An image belongs to every task
with one of its classes, and its labels are those of the task. If images may have several classes,
a task also has the splits

    seen_<t>      test images with a class of the first t tasks, and the labels of this task

on which the task is evaluated after stage t. A class's average precision depends on its own scores
only, so the mean over the classes of all tasks so far is that of the usual protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpt_jax.tasks import images
from mpt_jax.tasks.image_classes import SomeClasses
from mpt_jax.tasks.image_sources import ImageSource

TEST, SEEN = "test", "seen"


def task_sizes(classes: int, base: int, step: int) -> list[int]:
    """Returns the numbers of classes of the tasks of the protocol Bx-Cy: x in the first task (y if
    x is 0), then y in each.

    Raises:
        ValueError: the classes cannot be divided so.
    """
    if step < 1 or base < 0 or base > classes or (classes - base) % step:
        raise ValueError(
            f"{classes} classes cannot be divided into a first task of {base} and tasks of {step}. "
            "Change base= or step=."
        )
    return [*([base] if base else []), *[step] * ((classes - base) // step)]


def register(
    name: str,
    source: ImageSource,
    sizes: Sequence[int],
    order: Sequence[int] | None = None,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    templates: Sequence[str] = images.TEMPLATES,
    metric_fns: Sequence[Any] | None = None,
) -> list[str]:
    """Registers the tasks of a sequence.

    Args:
        name: The name of the sequence.
        source: The source of all classes.
        sizes: The number of classes of each task; see `task_sizes`.
        order: The class ids of the source in the order of the sequence; None for label order.
        splits: The splits of the source.
        templates: The texts in which `{}` stands for a class name; a classifier ignores them.
        metric_fns: The metrics, see `images.register`; None for `map` if an image may have several
            classes, else accuracy.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: a size is less than 2, or `order` repeats a class or does not have as many
            classes as the tasks.
    """
    order = tuple(range(sum(sizes))) if order is None else tuple(order)
    if not sizes or min(sizes) < 2 or len(set(order)) < len(order) or len(order) != sum(sizes):
        raise ValueError(
            f"The sequence {name!r} has tasks of {', '.join(map(str, sizes)) or 'no'} classes and "
            f"{len(set(order))} different classes. Give every task at least two classes, and pass "
            "each class once in order=."
        )
    ends = np.cumsum(sizes).tolist()
    names = [f"{name}_{number + 1}" for number in range(len(sizes))]
    for number, (task, size, end) in enumerate(zip(names, sizes, ends, strict=True)):
        own = order[end - size : end]
        parts: dict[str, tuple[str, Sequence[int]]] = {split: (split, own) for split in splits}
        if source.multi_label and TEST in splits:
            for last in range(number, len(sizes)):
                parts[f"{SEEN}_{last + 1}"] = (TEST, order[: ends[last]])
        metrics = metric_fns or (("map",) if source.multi_label else ("accuracy",))
        images.register(
            task, SomeClasses(source, own, parts), templates=templates, metric_fns=metrics
        )
    return names

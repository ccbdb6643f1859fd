"""Sequences of image tasks that divide the classes of one data set, for continual learning.

`register` divides C classes into tasks `<name>_1` ... `<name>_T`. An image belongs to every task
with one of its classes, and its labels are those of the task. If images may have several classes,
a task also has the splits

    seen_<t>      test images with a class of the first t tasks, and the labels of this task

on which the task is evaluated after stage t. A class's average precision depends on its own scores
only, so the mean over the classes of all tasks so far is that of the usual protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpt_jax.data.preprocessors import map_dataset
from mpt_jax.tasks import images
from mpt_jax.tasks.image_sources import ImageSource, Index, index_sha256

TEST, SEEN = "test", "seen"


class SomeClasses(ImageSource):
    """Source with some classes of another source.

    Args:
        source: The source.
        classes: The class ids of the source, in the order of the new ids.
        splits: Split -> (split of the source, class ids of which its images have at least one).
    """

    def __init__(
        self,
        source: ImageSource,
        classes: Sequence[int],
        splits: Mapping[str, tuple[str, Sequence[int]]],
    ):
        super().__init__(tuple(splits), source.multi_label)
        self.source, self.chosen, self.bases = source, tuple(classes), dict(splits)
        self._new_id = {old: new for new, old in enumerate(self.chosen)}

    def __str__(self) -> str:
        return f"{self.source}, {len(self.chosen)} of its classes"

    @property
    def data(self) -> str:
        """The name of the data set or its place, for `mpt-jax tasks list`."""
        return str(getattr(self.source, "data", self.source))

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The names of the chosen classes; None if the source has numbers.

        Raises:
            ValueError: the source has fewer classes.
        """
        names = self.source.class_ids
        if names is not None and max(self.chosen) >= len(names):
            raise ValueError(
                f"{self.source} has {len(names)} classes, but class {max(self.chosen)} was chosen. "
                "Correct the sizes of the tasks."
            )
        return None if names is None else [names[i] for i in self.chosen]

    def is_prepared(self) -> bool:
        """Whether the data is on this machine."""
        return getattr(self.source, "is_prepared", lambda: True)()

    def sha256(self, split: str) -> str | None:
        """Returns the SHA-256 of the split's ids and labels, joined with that of the source's
        split; None if the source has none."""
        whole = self.source.sha256(self.bases[split][0])
        return None if whole is None else f"{whole}+{index_sha256(self.index(split))}"

    def read_index(self, split: str) -> Index:
        """Returns the ids of a split and the labels among the chosen classes.

        Raises:
            ValueError: the split has no image.
        """
        found = self.source.index(self.bases[split][0]).take(self._rows(split))
        labels = tuple(
            tuple(sorted(self._new_id[x] for x in row if x in self._new_id)) for row in found.labels
        )
        if not len(found):
            raise ValueError(
                f"The {split} split of {self} has no image. Use larger tasks, or add images."
            )
        return Index(found.ids, labels)

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in order; only ascending `rows` [n] unless None."""
        located = self._rows(split)
        chosen = located if rows is None else located[rows]
        new_ids = np.full(max(self.chosen) + 1, -1, np.int32)
        new_ids[list(self.chosen)] = np.arange(len(self.chosen))

        def renumbered(example: dict[str, Any]) -> dict[str, Any]:
            labels = example["labels"]
            known = tf.gather(new_ids, tf.boolean_mask(labels, labels < len(new_ids)))
            return {**example, "labels": tf.sort(tf.boolean_mask(known, known >= 0))}

        return map_dataset(self.source.stream(self.bases[split][0], chosen), renumbered)

    def _rows(self, split: str) -> np.ndarray:
        """Returns the rows of the source's split that this split has, ascending."""
        base, classes = self.bases[split]
        wanted, labels = set(classes), self.source.index(base).labels
        return np.array([i for i, row in enumerate(labels) if wanted & set(row)], np.int64)


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

"""Source with some classes of another source, and the division into base and new classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpt_jax.data.preprocessors import map_dataset
from mpt_jax.tasks.image_sources import ImageSource, Index, index_sha256

BASE, NEW = "base", "new"


class SomeClasses(ImageSource):
    """Source with some classes of another source.

    Args:
        source: The source.
        classes: The class ids of the source, in the order of the new ids; or a function that
            returns them when they are first needed, since they may depend on the data.
        splits: Split -> (split of the source, class ids of which its images have at least one).
            None for the splits of the source, with the images of `classes`.
    """

    def __init__(
        self,
        source: ImageSource,
        classes: Sequence[int] | Callable[[], Sequence[int]],
        splits: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    ):
        super().__init__((), source.multi_label)
        self.source, self._classes, self._bases = source, classes, splits

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits; those of the source may depend on its data."""
        return tuple(self.source.splits if self._bases is None else self._bases)

    @functools.cached_property
    def chosen(self) -> tuple[int, ...]:
        """The class ids of the source, in the order of the new ids."""
        return tuple(self._classes() if callable(self._classes) else self._classes)

    @functools.cached_property
    def _new_id(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.chosen)}

    def _base(self, split: str) -> tuple[str, Sequence[int]]:
        """Returns the source's split, and the classes of the images in a split."""
        return (split, self.chosen) if self._bases is None else self._bases[split]

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
        whole = self.source.sha256(self._base(split)[0])
        return None if whole is None else f"{whole}+{index_sha256(self.index(split))}"

    def read_index(self, split: str) -> Index:
        """Returns the ids of a split and the labels among the chosen classes.

        Raises:
            ValueError: the split has no image.
        """
        found = self.source.index(self._base(split)[0]).take(self._rows(split))
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

        return map_dataset(self.source.stream(self._base(split)[0], chosen), renumbered)

    def _rows(self, split: str) -> np.ndarray:
        """Returns the rows of the source's split that this split has, ascending."""
        base, classes = self._base(split)
        wanted, labels = set(classes), self.source.index(base).labels
        return np.array([i for i, row in enumerate(labels) if wanted & set(row)], np.int64)


def half_of_classes(name: str, half: str, classes: int) -> range:
    """Returns the class ids of a task's base classes, the first half (one more, if their number is
    odd), or of its new classes, the rest.

    Args:
        name: The name of the task.
        half: `BASE` or `NEW`.
        classes: The number of classes of the task.

    Raises:
        ValueError: the half would have fewer than two classes.
    """
    first = -(-classes // 2)
    chosen = range(first) if half == BASE else range(first, classes)
    if len(chosen) < 2:
        raise ValueError(
            f"{name}_{half} would have {len(chosen)} of the {classes} classes of {name}, but a "
            f"task needs at least two. Use {name} itself."
        )
    return chosen

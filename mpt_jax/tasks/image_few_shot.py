"""Few-shot runs of image tasks: `eurosat_k5_per_class_s1`, and replay of published selections.

The names are those of `few_shot`. The images of a run are the k smallest in the order of a stable
hash of (task, split, image id, draw): BLAKE2b of these words, joined by '/'. So the images of k = 1
are among those of k = 5, and a selection depends neither on the order of the data set, nor on other
tasks, nor on the host. Without `_per_class`, k counts images in total, and fewer training images
than k are an error. With it, k counts images of each class: a class with fewer than k has all of
them, and an image of several classes counts for each of them.

The validation split of a run is the task's. If the task has none, or with `_dev`, it is selected
from the task's validation split, or else from the training images that the run does not train on: k
images in total, or with `_per_class` min(k, `DEV`) images of each class; fewer if no more are left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from mpt_jax.core import schema
from mpt_jax.data import task_lookup
from mpt_jax.data.classes import is_image_task
from mpt_jax.runtime.files import write_atomic
from mpt_jax.tasks import few_shot
from mpt_jax.tasks.image_sources import ImageSource, Index
from mpt_jax.tasks.image_splits import ChosenImages, digest

DEV = 4  # validation images of each class of a run `_per_class`, at most
VERSION = 1
DIGEST = "sha256"


def ranked(name: str, split: str, seed: int, index: Index, rows: Iterable[int]) -> list[int]:
    """Returns `rows` of a split in the order of the stable hash.

    Args:
        name: The task whose name is part of the hash.
        split: The split whose name is part of the hash.
        seed: The number of the draw.
        index: The ids of the split.
        rows: The row numbers to order.
    """
    return sorted(rows, key=lambda row: (digest(name, split, index.ids[row], seed), row))


def smallest(order: Sequence[int], index: Index, k: int) -> list[int]:
    """Returns the rows that are among the first k of one of their classes in `order`, in order."""
    counts: dict[int, int] = {}
    kept = []
    for row in order:
        labels = index.labels[row]
        if any(counts.get(label, 0) < k for label in labels):
            kept.append(row)
        for label in labels:  # of rows that are not kept as well, so that k = 1 is within k = 5
            counts[label] = counts.get(label, 0) + 1
    return kept


class FewShotImages(few_shot.FewShotSource):
    """Source of a few-shot run of an image task; see the module docstring.

    Args:
        task: The task to train on, whose source is an `ImageSource`.
        draw: The draw that selects the images. `draw.task` is part of the hash.
    """

    source: ImageSource

    @property
    def splits(self) -> Sequence[str]:
        """The splits of the task, and validation."""
        return tuple(dict.fromkeys([*self.source.splits, "validation"]))

    @property
    def cut(self) -> tuple[str, ...]:
        """The splits that are selections."""
        has_validation = "validation" in self.source.splits
        return self.draw.splits if has_validation else ("train", "validation")

    def origin(self, split: str) -> str:
        """Returns the split of the task that a split of the run is selected from."""
        return split if split in self.source.splits else "train"

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of images of a split."""
        rows = self.few_shot_indices(split)
        return self.source.num_input_examples(split) if rows is None else len(rows)

    def few_shot_indices(self, split: str) -> list[int] | None:
        """Returns the selected row numbers of a split (of `origin`), in the order of the hash; None
        if the split is the task's.

        Raises:
            ValueError: the split would be empty, or there are fewer than k training images in
                total.
        """
        if split not in self.cut:
            return None
        if split not in self._drawn:
            self._drawn[split] = self._selected(split)
        return list(self._drawn[split])

    def few_shot_ids(self, split: str) -> list[str] | None:
        """Returns the ids of the selected images of a split; None if the split is the task's."""
        rows = self.few_shot_indices(split)
        return None if rows is None else list(self.source.index(self.origin(split)).take(rows).ids)

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **settings: Any
    ) -> tf.data.Dataset:
        """Returns the examples of a split: if it is selected, only those, in the order of the hash,
        whatever `shuffle` and `seed` are."""
        rows = self.few_shot_indices(split)
        if rows is None:
            return self.source.get_dataset(split=split, shuffle=shuffle, seed=seed, **settings)
        return self.source.select(self.origin(split), rows)

    def _selected(self, split: str) -> list[int]:
        draw, origin = self.draw, self.origin(split)
        index = self.source.index(origin)
        rows: Iterable[int] = range(len(index))
        if split != origin:  # what is left of the training images
            train = set(self.few_shot_indices("train") or ())
            rows = [row for row in rows if row not in train]
        order = ranked(draw.task, split, draw.seed, index, rows)
        if not draw.per_class:
            kept = order[: draw.k]
            if split == "train" and len(kept) < draw.k:
                raise ValueError(
                    f"{draw.task} has {len(kept):,} images in its train split, but {draw.name} "
                    f"needs k = {draw.k:,}. Use a smaller k in SHOTS or in the run's name."
                )
        else:
            k = draw.k if split == "train" else min(draw.k, DEV)
            kept = smallest(order, index, k)
            counts = {label: len(x) for label, x in index.rows_of_classes().items()}
            if split == "train" and (few := [n for n in counts.values() if n < k]):
                logging.warning(
                    "%s: %d of %d classes have fewer than %d images in train; all of these are "
                    "used.",
                    *(draw.name, len(few), len(counts), k),
                )
        if not kept:
            raise ValueError(
                f"The {split} split of {draw.name} would be empty, because {self.source} has no "
                f"images left in {origin}. Use a smaller k in SHOTS or in the run's name."
            )
        return kept


class _File(msgspec.Struct):
    """An index file."""

    version: Annotated[int, msgspec.Meta(ge=1, le=VERSION)]
    task: schema.Name
    splits: dict[str, schema.Names]
    sha256: str


def write_index(run: str, path: str | os.PathLike[str]) -> None:
    """Writes the ids of the selected images of a few-shot run to a JSON file with a digest, which
    `read_index` and `register_selection` read.

    Raises:
        ValueError: `run` is not a few-shot run of an image task.
        FileNotFoundError: the data is not on this machine.
    """
    source = task_lookup.find_task(run).source
    if not isinstance(source, FewShotImages):
        raise ValueError(
            f"{run} is not a few-shot run of an image task, so there is no selection to write. Use "
            "a name such as <task>_k5_per_class_s1."
        )
    splits = {split: source.few_shot_ids(split) for split in source.cut}
    seal_index(path, source.draw.task, {split: ids or [] for split, ids in splits.items()})


def seal_index(
    path: str | os.PathLike[str], task: str, splits: Mapping[str, Sequence[str]]
) -> None:
    """Writes an index file from split -> image ids; see `read_index`."""
    record = schema.sealed({"version": VERSION, "task": task, "splits": dict(splits)}, DIGEST)
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def read_index(path: str | os.PathLike[str]) -> tuple[str, dict[str, list[str]]]:
    """Reads an index file: a JSON object with `version` 1, `task`, `splits` (split -> image ids)
    and `sha256`, see `write_index`.

    Returns:
        The name of the task, and split -> ids.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an index file, or was changed after it was written.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The index file {path} does not exist. Correct the path.")
    what, advice = f"The index file {path}", "Write it again with image_few_shot.write_index."
    value = schema.parse(file.read_bytes(), what, advice)
    content = schema.check(value, _File, what, advice)
    schema.check_seal(value, DIGEST, what, advice)
    if not content.splits or set(content.splits) - {"train", "validation", "test"}:
        raise ValueError(
            f"{what} has the splits {', '.join(map(repr, content.splits)) or 'none'}, but train, "
            f"validation and test were expected. {advice}"
        )
    return content.task, content.splits


def register_selection(name: str, task: str, path: str | os.PathLike[str]) -> None:
    """Registers a task whose splits are the image ids of an index file, such as a published
    few-shot selection. Splits that the file does not name are those of `task`; it is an error if
    the file takes images from them for another split.

    Args:
        name: The name of the new task.
        task: The name of the image task that has the images.
        path: The index file.

    Raises:
        FileNotFoundError, ValueError: see `read_index`; or `task` is not an image task, or `name`
            is taken.
    """
    base = task_lookup.find_task(task)
    if not is_image_task(base) or not isinstance(base.source, ImageSource):
        raise ValueError(
            f"Task {task!r} is not an image task with a source of this library, so {path} cannot "
            "select from it. Name a task that mpt_jax.tasks.images.register registered."
        )
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(
            f"A task or mixture named {name!r} is already registered. Choose another name."
        )
    _, ids = read_index(path)
    few_shot._add(name, base, ChosenImages(base.source, ids, str(path)))

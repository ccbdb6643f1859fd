"""SeqIO sources of labeled images, and what few-shot draws and splits need of them.

Every source yields {image: string [] (an encoded file), labels: int32 [n], id: string []}, in an
order that does not depend on `shuffle`; batches are shuffled downstream. `index` lists the ids and
labels of a split without decoding an image.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.data.preprocessors import map_dataset
from mpt_jax.tasks.splits import where

SHOWN = 5  # bad rows that an error lists


@dataclasses.dataclass(frozen=True)
class Index:
    """The ids and labels of the images of a split, in the order of the source.

    Attributes:
        ids: The id of each image.
        labels: The class ids of each image, ascending.
    """

    ids: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Iterable[int]) -> Index:
        """Returns the index of some rows, in the order given."""
        chosen = list(rows)
        return Index(tuple(self.ids[i] for i in chosen), tuple(self.labels[i] for i in chosen))

    def rows_of_classes(self) -> dict[int, list[int]]:
        """Returns class id -> the rows with this class, ascending, for each class that occurs."""
        rows: dict[int, list[int]] = {}
        for row, labels in enumerate(self.labels):
            for label in labels:
                rows.setdefault(label, []).append(row)
        return dict(sorted(rows.items()))


class ImageSource(seqio.DataSource):
    """Source of labeled images. Subclasses implement `class_ids`, `read_index` and `stream`.

    Args:
        splits: The names of the splits.
        multi_label: Whether an image may have any number of classes, instead of exactly one.
    """

    def __init__(self, splits: Sequence[str], multi_label: bool = False):
        super().__init__(splits=tuple(splits))
        self.multi_label = multi_label
        self._indices: dict[str, Index] = {}

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The names of the classes in the data, in label order; None if the data has numbers."""
        raise NotImplementedError

    def read_index(self, split: str) -> Index:
        """Reads the ids and labels of a split."""
        raise NotImplementedError

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in order; only ascending `rows` [n] unless None."""
        raise NotImplementedError

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: examples are split among hosts after they are read."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard; SeqIO splits its examples among the hosts."""
        return [split]

    def index(self, split: str) -> Index:
        """Returns the ids and labels of a split, read at first use.

        Raises:
            ValueError: rows cannot be used, or two images have the same id.
        """
        if split not in self._indices:
            index = self.read_index(split)
            if len(set(index.ids)) < len(index):
                seen: set[str] = set()
                twice = [x for x in index.ids if x in seen or seen.add(x)]
                raise ValueError(
                    f"{self}, {split}: {len(twice):,} of {len(index):,} images are listed twice: "
                    f"{', '.join(twice[:SHOWN])}. Remove the repeated rows."
                )
            self._indices[split] = index
        return self._indices[split]

    def num_rows(self, split: str) -> int:
        """Returns the number of images of a split on this machine."""
        return len(self.index(split))

    def sha256(self, split: str) -> str | None:
        """Returns the SHA-256 of what a split has, for the record of a job's data; None if the data
        set is identified by its name and version."""
        del split
        return None

    def num_input_examples(self, split: str) -> int | None:  # type: ignore[override]
        """Returns the number of images of a split."""
        return self.num_rows(split)

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the examples of a split in order, regardless of `shuffle`.

        Raises:
            FileNotFoundError: the data is not on this machine.
            ValueError: rows cannot be used.
        """
        del shuffle, seed, unused
        return self.stream(split, None)

    def select(self, split: str, rows: Sequence[int]) -> tf.data.Dataset:
        """Returns the examples of some rows of a split, in the order given. Their encoded images
        are held in memory unless `rows` ascend."""
        ascending = np.unique(np.asarray(rows, np.int64))
        return in_order(self.stream(split, ascending), ascending, rows)

    def few_shot(self, task: seqio.Task, draw: Any) -> seqio.DataSource:
        """Returns the source of a few-shot run; see `few_shot.register_run`."""
        from mpt_jax.tasks.image_few_shot import FewShotImages  # imports this module

        return FewShotImages(task, draw)


class ListedImages(ImageSource):
    """Source whose images are listed in memory. Subclasses implement `read_listing` and `load`."""

    def read_listing(self) -> tuple[Sequence[str] | None, dict[str, tuple[Index, Sequence[Any]]]]:
        """Reads the class ids, and split -> (index, what `load` takes of each image)."""
        raise NotImplementedError

    def load(self, item: tf.Tensor) -> tf.Tensor:
        """Returns the encoded image, string [], of an item of the listing."""
        raise NotImplementedError

    @functools.cached_property
    def listing(self) -> tuple[Sequence[str] | None, dict[str, tuple[Index, Sequence[Any]]]]:
        """What `read_listing` returns, read at first use."""
        return self.read_listing()

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits that have images."""
        return tuple(self.listing[1])

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The names of the classes in the data, in label order; None if the data has numbers."""
        return self.listing[0]

    def read_index(self, split: str) -> Index:
        """Returns the index of a split."""
        return self.listing[1][split][0]

    def sha256(self, split: str) -> str:
        """Returns the SHA-256 of a split's ids and labels, see `index_sha256`."""
        return index_sha256(self.index(split))

    def select(self, split: str, rows: Sequence[int]) -> tf.data.Dataset:
        """Returns the examples of some rows of a split, in the order given."""
        return self.stream(split, np.asarray(rows, np.int64))

    def stream(self, split: str, rows: np.ndarray | None) -> tf.data.Dataset:
        """Returns the examples of a split in order; only `rows` [n] unless None."""
        index, items = self.index(split), self.listing[1][split][1]
        chosen = range(len(index)) if rows is None else rows.tolist()
        listed = {
            "image": tf.constant([items[i] for i in chosen], tf.string),
            "labels": ragged([index.labels[i] for i in chosen]),
            "id": tf.constant([index.ids[i] for i in chosen], tf.string),
        }
        return map_dataset(
            tf.data.Dataset.from_tensor_slices(listed),
            lambda x: {**x, "image": self.load(x["image"])},
        )


def index_sha256(index: Index) -> str:
    """Returns the SHA-256 of an index, in order. Each image is hashed as a line with the JSON list
    [id, class ids]."""
    digest = hashlib.sha256()
    for row in zip(index.ids, index.labels, strict=True):
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def ragged(rows: Sequence[Sequence[int]]) -> tf.RaggedTensor:
    """Returns lists of labels as a ragged tensor, int32 [n, any]."""
    flat = [np.asarray(row, np.int32) for row in rows]
    lengths = np.array([len(row) for row in flat], np.int64)
    values = np.concatenate([np.zeros(0, np.int32), *flat])
    return tf.RaggedTensor.from_row_lengths(values, lengths)


def in_order(
    stream: tf.data.Dataset, ascending: np.ndarray, rows: Sequence[int]
) -> tf.data.Dataset:
    """Returns the examples of a stream in the order of `rows`.

    Args:
        stream: The examples of the rows `ascending`.
        ascending: The different row numbers of `rows`, ascending.
        rows: The row numbers in the order wanted.
    """
    if ascending.tolist() == list(rows):
        return stream
    examples = list(stream.as_numpy_iterator())
    chosen = [examples[i] for i in np.searchsorted(ascending, np.asarray(rows, np.int64))]
    columns = {
        "image": tf.constant([x["image"] for x in chosen], tf.string),
        "labels": ragged([x["labels"] for x in chosen]),
        "id": tf.constant([x["id"] for x in chosen], tf.string),
    }
    return map_dataset(tf.data.Dataset.from_tensor_slices(columns), dict)


def only(stream: tf.data.Dataset, rows: np.ndarray | None, size: int) -> tf.data.Dataset:
    """Returns the `rows` [n] of a stream of `size` examples; all of them if None."""
    if rows is None:
        return stream
    chosen = np.zeros(size, bool)
    chosen[rows] = True
    return where(stream, chosen)


class BadRows:
    """The rows of a source that cannot be used.

    Args:
        where: The file or folder, for the error.
        skip: The number of such rows that is allowed.
    """

    def __init__(self, where: Any, skip: int):
        if skip < 0:
            raise ValueError(f"skip_broken={skip} is negative. Pass the number of rows to allow.")
        self.where, self.skip = where, skip
        self.found: list[str] = []

    def add(self, name: str, reason: str) -> None:
        """Records a row that cannot be used."""
        self.found.append(f"{name} ({reason})")

    def check(self, total: int) -> None:
        """Raises ValueError if more rows cannot be used than is allowed; logs those left out."""
        shown = ", ".join(self.found[:SHOWN])
        shown += f" and {len(self.found) - SHOWN:,} more" if len(self.found) > SHOWN else ""
        if len(self.found) > self.skip:
            raise ValueError(
                f"{self.where}: {len(self.found):,} of {total:,} rows cannot be used: {shown}. Fix "
                f"or remove them, or pass skip_broken={len(self.found)} to leave them out."
            )
        if self.found:
            logging.warning(
                "%s: left out %d of %d rows: %s.", self.where, len(self.found), total, shown
            )


def check_classes(where: Any, class_ids: Sequence[str] | None, indices: Iterable[Index]) -> None:
    """Raises ValueError if one of the classes has no image in any split."""
    used = {label for index in indices for labels in index.labels for label in labels}
    empty = [name for label, name in enumerate(class_ids or ()) if label not in used]
    if empty:
        raise ValueError(
            f"{where}: {len(empty):,} of {len(class_ids or ()):,} classes have no image: "
            f"{', '.join(empty[:SHOWN])}. Add images, or remove these classes."
        )

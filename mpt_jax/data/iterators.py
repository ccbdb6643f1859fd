"""Iterators over this host's rows of the batches, trimmed to length buckets.

The position of the training iterator can be saved at any step and restored exactly. It includes the
batches that tf.data has prefetched, except batches of images.
"""

from __future__ import annotations

import abc
import dataclasses
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow as tf
from absl import logging

from mpt_jax.batching import bucketing
from mpt_jax.batching.arrangements import Position
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.batching.collate import Batch
from mpt_jax.batching.table_batches import TrainBatches
from mpt_jax.core import schema
from mpt_jax.core.batch import num_rows
from mpt_jax.core.comparison import check_same
from mpt_jax.data.dataset_iterator import DatasetIterator

_POSITION, _PLACE = "position.json", "place.json"


class PositionHeader(msgspec.Struct):
    """The schema of a data position's header."""

    identity: dict[str, Any]
    batches_taken: schema.Count


class _Place(msgspec.Struct):
    """The schema of a place in token tables (see `arrangements.Position`)."""

    taken: schema.Amount
    counts: list[schema.Amount]
    rows: schema.Count


@dataclasses.dataclass(frozen=True)
class HostShard:
    """This host's shard of a global batch of `batch_size` rows.

    Raises:
        ValueError: `batch_size` is not a multiple of `num_hosts`.
    """

    batch_size: int
    num_hosts: int
    host_index: int

    def __post_init__(self):
        if self.batch_size % self.num_hosts:
            raise ValueError(
                "DatasetConfig.batch_size must be a multiple of the number of hosts "
                f"({self.num_hosts}), got {self.batch_size}. Use "
                f"{self.batch_size // self.num_hosts * self.num_hosts or self.num_hosts}, for "
                "example."
            )

    def rows_of_host(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Pads a global batch to `batch_size` with rows of zeros, and returns this host's rows."""
        num_rows = self.batch_size // self.num_hosts
        rows = slice(num_rows * self.host_index, num_rows * (self.host_index + 1))
        return {name: fill(x, self.batch_size)[rows] for name, x in batch.items()}


class Source(Iterator[Batch]):
    """Base class of sources of this host's rows of the training batches, with a position."""

    @abc.abstractmethod
    def save(self) -> dict[str, bytes]:
        """Returns the position as the contents of files, by name."""

    @abc.abstractmethod
    def restore(self, files: Mapping[str, bytes], batches: int) -> None:
        """Restores the position after `batches`; the files are those of any source."""


class DatasetSource(Source):
    """Batches of a tf.data dataset. Every host makes the global batches and keeps its own rows.

    Args:
        dataset: the dataset of global batches.
        share: this host's shard of a batch.
        buckets: the lengths that batches are trimmed to; None for one length.
    """

    def __init__(
        self, dataset: tf.data.Dataset, share: HostShard, buckets: LengthBuckets | None = None
    ):
        self._iterator = DatasetIterator(dataset)
        self._share, self._buckets = share, buckets

    def __next__(self) -> Batch:
        batch = _arrays(next(self._iterator))
        return self._share.rows_of_host(self._buckets.trim(batch) if self._buckets else batch)

    def save(self) -> dict[str, bytes]:
        """Returns TensorFlow's checkpoint of the position."""
        with tempfile.TemporaryDirectory() as folder:
            self._iterator.checkpoint.write(os.path.join(folder, "position"))
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    def restore(self, files: Mapping[str, bytes], batches: int) -> None:
        """Restores TensorFlow's checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, os.path.basename(name)).write_bytes(content)
            self._iterator.checkpoint.read(os.path.join(folder, "position")).assert_consumed()


class TableSource(Source):
    """Batches of token tables, of which every host makes its own rows."""

    def __init__(self, batches: TrainBatches):
        self._batches = batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def save(self) -> dict[str, bytes]:
        """Returns the numbers that describe the position."""
        taken, counts, rows = self._batches.arrangement.position
        place = _Place(taken, counts.tolist(), rows)
        return {_PLACE: msgspec.json.encode(place)}

    def restore(self, files: Mapping[str, bytes], batches: int) -> None:
        """Restores a position. One that tf.data saved is found again from the number of batches."""
        if _PLACE not in files:
            if "position.index" not in files:  # of TensorFlow's checkpoint
                raise ValueError(f"it has neither {_PLACE} nor a checkpoint of tf.data")
            logging.info("Finding the data position after %d batches.", batches)
            self._batches.arrangement.skip_to(batches)
            return
        place = schema.load(files[_PLACE], _Place, "its place", "")
        self._batches.arrangement.restore(
            Position(place.taken, np.array(place.counts, np.int64), place.rows)
        )


class TrainIterator(Iterator[Batch]):
    """Iterator over this host's rows of the training batches, with a position that can be saved.

    The batch of a step does not depend on the number of hosts, and a position can be restored on
    any number of hosts.

    Args:
        source: the batches.
        share: this host's shard of a batch.
        identity: JSON values that describe the data. A position is restored only if they are equal
            to the saved ones.
        prompt_length: P; errors subtract it from encoder lengths, to show the limits on text.
    """

    def __init__(
        self, source: Source, share: HostShard, identity: Mapping[str, Any], prompt_length: int = 0
    ):
        self._source, self._share = source, share
        self._prompt_length = prompt_length
        self._identity = json.loads(json.dumps(dict(identity)))
        self._taken = 0
        self._reported = False

    def __next__(self) -> Batch:
        try:
            batch = next(self._source)
        except StopIteration:
            if self._taken:
                raise
            raise ValueError(
                f"The {self._identity['split']!r} split of {', '.join(self._identity['tasks'])} "
                f"does not fill one batch of {self._share.batch_size} rows. Lower "
                "DatasetConfig.batch_size, or choose another split."
            ) from None
        self._taken += 1
        return batch

    def state(self) -> bytes:
        """Returns the position. After it is restored, iteration continues with the next batch."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            header = {"identity": self._identity, "batches_taken": self._taken}
            archive.writestr(_POSITION, json.dumps(header))
            for name, value in self._source.save().items():
                archive.writestr(name, value)
        if not self._reported:
            logging.info("Size of the data position: %.1f KB.", len(content.getvalue()) / 1000)
            self._reported = True
        return content.getvalue()

    def restore(self, state: bytes) -> None:
        """Restores a position returned by `state`.

        Raises:
            ValueError: `state` is corrupt, or was saved with another configuration.
        """
        advice = "Rename the checkpoint that holds it, to resume from the previous checkpoint."
        what = "The data position is corrupt"
        with schema.damage(what, advice):
            archive = zipfile.ZipFile(io.BytesIO(state))
            # Stored as they are, so that no entry can be larger than the position.
            if sum(entry.file_size for entry in archive.infolist()) > len(state):
                raise ValueError("it declares entries that are larger than the whole position")
            entries = {name: archive.read(name) for name in archive.namelist()}
            header = schema.load(entries.pop(_POSITION), PositionHeader, "its header", "")
        check_same(
            _with_limits(header.identity, self._prompt_length),
            _with_limits(self._identity, self._prompt_length),
            what="The data position",
            advice="Restore the saved values, or choose another MODEL_DIR to start over.",
        )
        with schema.damage(what, advice):
            self._source.restore(entries, header.batches_taken)
        self._taken = header.batches_taken


def _with_limits(identity: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
    """Returns an identity with its shapes replaced by the setting that determines them."""
    shown = dict(identity)
    shapes = shown.get("features")
    names = ("encoder_input_tokens", "decoder_target_tokens")
    if isinstance(shapes, dict) and all(len(shapes.get(name, ())) == 2 for name in names):
        (rows, inputs), (_, targets) = (shown["features"][name] for name in names)
        setting = "TASK_FEATURE_LENGTHS"
        if shown.get("pack_window") is None:
            inputs -= prompt_length
        else:
            setting = "PACK_LENGTHS (or, if None, TASK_FEATURE_LENGTHS)"
        del shown["features"]
        shown |= {setting: {"inputs": inputs, "targets": targets}, "rows of a batch": rows}
        shown["features of a batch"] = sorted(shapes)
    return shown


def are_too_large(dataset: tf.data.Dataset) -> bool:
    """Whether batches of these rows should not be kept in memory: decoded images take ten times as
    much as the files that they are decoded from."""
    return "image" in dict(dataset.element_spec)  # type: ignore[call-overload]


class EvalBatches:
    """This host's evaluation batches, which can be iterated over repeatedly.

    Args:
        dataset: the dataset of single rows.
        share: the batch size and this host's shard of a batch.
        keep: whether to keep the batches in memory, unless `are_too_large`.
        buckets: the lengths that batches are trimmed to; None for one length and the original
            order of the rows.
        trim_targets: see `LengthBuckets.trim`.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        share: HostShard,
        keep: bool,
        buckets: LengthBuckets | None = None,
        trim_targets: bool = True,
    ):
        self._share, self._keep = share, keep and not are_too_large(dataset)
        self._buckets, self._cut_targets = buckets, trim_targets
        window = bucketing.WINDOW if buckets else 1
        self._windows = dataset.batch(window * share.batch_size).prefetch(1)
        self._kept: list[tuple[np.ndarray, Batch]] | None = None

    def __call__(self) -> Iterable[Batch]:
        """Returns the batches in order."""
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterable[tuple[np.ndarray, Batch]]:
        """Returns (row indices, batch) pairs. The indices give the positions in the dataset of the
        rows of all hosts; the batch has only this host's rows."""
        if not self._keep:
            return self._read()
        if self._kept is None:
            self._kept = list(self._read())
        return self._kept

    def _read(self) -> Iterator[tuple[np.ndarray, Batch]]:
        first = 0
        for window in DatasetIterator(self._windows):
            rows = _arrays(window)
            batches = bucketing.batches_of(
                rows, self._share.batch_size, self._buckets, self._cut_targets
            )
            for indices, batch in batches:
                yield first + indices, self._share.rows_of_host(batch)
            first += num_rows(rows)


class KeptBatches:
    """This host's evaluation batches of each of several tasks, read together and kept in memory.

    tf.data needs about 50 ms to start converting the rows of a dataset. With a dataset for each of
    hundreds of small tasks, that would be most of the first evaluation.

    Args:
        dataset: the dataset of single rows of all tasks.
        sizes: {task: number of rows}, in the order of the dataset.
        share: the batch size and this host's shard of a batch.
        buckets: as for `EvalBatches`.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        sizes: Mapping[str, int],
        share: HostShard,
        buckets: LengthBuckets | None,
    ):
        self._dataset, self._sizes = dataset, dict(sizes)
        self._share, self._buckets = share, buckets
        self._kept: dict[str, list[Batch]] = {}

    def of_task(self, name: str) -> list[Batch]:
        """Returns the batches of a task, in order."""
        if not self._kept:
            self._kept = self._read()
        return self._kept[name]

    def _read(self) -> dict[str, list[Batch]]:
        kept = {}
        window = bucketing.WINDOW * self._share.batch_size
        parts = DatasetIterator(self._dataset.batch(window).prefetch(1))
        rows = _arrays(next(parts))
        for name, size in self._sizes.items():
            kept[name] = []
            for start in range(0, size, window):
                number = min(window, size - start)
                if num_rows(rows) < number:
                    more = _arrays(next(parts))
                    rows = {key: np.concatenate([x, more[key]]) for key, x in rows.items()}
                taken = {key: x[:number] for key, x in rows.items()}
                rows = {key: x[number:] for key, x in rows.items()}
                batches = bucketing.batches_of(taken, self._share.batch_size, self._buckets, True)
                kept[name] += [self._share.rows_of_host(batch) for _, batch in batches]
        return kept


def _arrays(features: Mapping[str, tf.Tensor]) -> Batch:
    return {name: value.numpy() for name, value in features.items()}


def fill(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns `array` with zeros appended along its first axis, so that it has `rows` rows."""
    missing = rows - array.shape[0]
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

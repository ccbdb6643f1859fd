"""Train, validation and test where test labels are not public, as the MPT paper has them.

The rule is Karimi Mahabadi's, and ATTEMPT's and MPT's after it. Small sets: the validation split
is permuted and halved. Large sets: the training split is permuted, its first 1,000 rows are the
validation set, and the official validation split is the test set. The permutation is
`torch.randperm` of seed 42 over the order of the original files; TFDS shuffles when it builds, so
rows are first ranked by their `idx`. Sets without one keep TFDS's order, which is fixed too, but
their rows cannot be matched with the paper's.

Row i of a split, as few-shot draws count them, is row i of the original file, or place start + i
of its permutation.

Only the permutation and the ranks are held in memory: rows are streamed and filtered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

SEED = 42
HALF = "half"


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one split of a data set: all of them, or places `start` to `stop` of its permutation.

    Attributes:
        split: TFDS's name of it.
        start, stop: places, from 0; `HALF` for half the rows, rounded down. Both None: all rows,
            whose order then does not matter.
    """

    split: str
    start: int | str | None = None
    stop: int | str | None = None

    def places(self, size: int) -> slice | None:
        """Returns the places among `size` rows, or None for all rows."""
        if self.start is None and self.stop is None:
            return None
        start, stop = (size // 2 if bound == HALF else bound for bound in (self.start, self.stop))
        return slice(start, stop)

    def num_rows(self, size: int) -> int:
        """Returns how many of `size` rows it has."""
        places = self.places(size)
        return size if places is None else len(range(*places.indices(size)))


Parts = Mapping[str, Part]


def own(train: str = "train", validation: str = "validation", test: str = "test") -> Parts:
    """The data set's own three splits."""
    return {"train": Part(train), "validation": Part(validation), "test": Part(test)}


def halved(validation: str = "validation") -> Parts:
    """For small sets: all of train; the first and second half of a permuted validation split."""
    return {
        "train": Part("train"),
        "validation": Part(validation, 0, HALF),
        "test": Part(validation, HALF, None),
    }


def carved(
    train: str = "train", test: str = "validation", held_out: int = 1000, most: int | None = None
) -> Parts:
    """For large sets: `held_out` rows of a permuted train split; of the rest, at most `most`."""
    return {
        "train": Part(train, held_out, None if most is None else held_out + most),
        "validation": Part(train, 0, held_out),
        "test": Part(test),
    }


def permutation(size: int, seed: int = SEED) -> np.ndarray:
    """Returns `torch.randperm(size)` on a CPU after `torch.manual_seed(seed)`, [size] int64.

    A forward Fisher-Yates shuffle; one 32-bit draw of the Mersenne Twister a step.
    """
    order = list(range(size))
    draws = np.random.RandomState(seed).randint(0, 2**32, size=max(0, size - 1), dtype=np.uint32)
    for here, draw in enumerate(draws.tolist()):
        there = here + draw % (size - here)
        order[here], order[there] = order[there], order[here]
    return np.array(order, np.int64)


class PartsSource(seqio.DataSource):
    """A SeqIO source over a prepared TFDS data set, with splits of our making.

    Nothing is downloaded: a job of many hosts would do it many times, and one without a network
    would wait for it.

    Args:
        data: TFDS's name with config and version, 'glue/mnli:2.0.0'.
        parts: {'train', 'validation', 'test'} -> which rows.
        sizes: {TFDS split: rows} that the data set should have; others are warned of.
        keys: features that order the rows as the original files do, the first one first, with '/'
            into nested ones; () for sets without any.
        reads: the features that rows have; () for all. Decoding the others would cost time.
    """

    def __init__(
        self,
        data: str,
        parts: Parts,
        sizes: Mapping[str, int],
        keys: Sequence[str] = (),
        reads: Sequence[str] = (),
    ):
        super().__init__(splits=tuple(parts))
        self.data, self.parts, self.sizes = data, parts, sizes
        self.keys, self.reads = tuple(keys), tuple(reads)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Examples are dealt to hosts after they are read."""
        return False

    def __str__(self) -> str:
        return f"TensorFlow Datasets, {self.data}"

    def list_shards(self, split: str) -> Sequence[str]:
        """One shard: SeqIO deals its examples to the hosts."""
        return [split]

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the rows of a split, in TFDS's order whatever `shuffle` says.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
            ValueError: it has no such split, or two rows have the same keys.
        """
        del shuffle, seed, unused  # batches are shuffled downstream
        part, builder = self.parts[split], self._builder()
        size = self._size(builder, part.split)
        rows = _read(builder, part.split, self.reads)
        if part.places(size) is None:
            return rows
        chosen = np.zeros(size, bool)
        chosen[self._places(builder, part, size)] = True
        return where(rows, chosen)

    def positions(self, split: str) -> np.ndarray:
        """Returns where the rows [n] of a split come in what `get_dataset` yields.

        Raises:
            FileNotFoundError, ValueError: see `get_dataset`.
        """
        part, builder = self.parts[split], self._builder()
        places = self._places(builder, part, self._size(builder, part.split))
        return np.searchsorted(np.sort(places), places)

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has on this machine."""
        part = self.parts[split]
        return part.num_rows(self._size(self._builder(), part.split))

    def num_input_examples(self, split: str) -> int:  # type: ignore[override]
        """Returns how many rows a split of the published data set has; nothing is read."""
        part = self.parts[split]
        return part.num_rows(self.sizes[part.split])

    def is_prepared(self) -> bool:
        """Whether the data set is on this machine."""
        try:
            self._builder()
        except FileNotFoundError:
            return False
        return True

    def other_sizes(self) -> dict[str, tuple[int, int]]:
        """Returns {TFDS split: (rows on this machine, rows as published)} where the two differ.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
        """
        splits = self._builder().info.splits
        here = {name: splits[name].num_examples if name in splits else 0 for name in self.sizes}
        return {
            name: (rows, self.sizes[name])
            for name, rows in here.items()
            if rows != self.sizes[name]
        }

    def _places(self, builder: tfds.core.DatasetBuilder, part: Part, size: int) -> np.ndarray:
        """Returns the places in TFDS's order [n] of the part's rows, row 0 first."""
        order, places = self._file_order(builder, part.split, size), part.places(size)
        return order if places is None else order[permutation(size)[places]]

    def _builder(self) -> tfds.core.DatasetBuilder:
        # A new loader each time, so that it sees the data folder that the command line has set.
        loader = seqio.utils.LazyTfdsLoader(self.data, read_only=True)
        try:
            builder = loader.builder
            found = builder.is_prepared()
        except (tfds.core.registered.DatasetNotFoundError, AssertionError):
            builder, found = None, False  # the version is neither on disk nor in this TFDS
        if builder is None or not found:
            raise FileNotFoundError(self._absent(loader.data_dir))
        return builder

    def _absent(self, folder: str | None) -> str:
        name, _, version = self.data.partition(":")
        folder = folder or tfds.core.constants.DATA_DIR
        there = _versions(epath.Path(folder) / name)
        but = f" (it has version {', '.join(there)} of it)" if there else ""
        return (
            f"The data set {name}, version {version}, is not in {folder}{but}. Run `tfds build "
            f"{self.data} --data_dir DIR` where there is a network, copy DIR, and pass "
            "--tfds_data_dir=DIR or set TFDS_DATA_DIR."
        )

    def _size(self, builder: tfds.core.DatasetBuilder, split: str) -> int:
        if split not in builder.info.splits:
            raise ValueError(
                f"{self.data} has no {split!r} split; it has {', '.join(builder.info.splits)}."
            )
        size = builder.info.splits[split].num_examples
        if size != self.sizes[split]:
            logging.warning(
                "%s, %s: %d rows, where the published set has %d. Splits made of it are not the "
                "published ones.",
                *(self.data, split, size, self.sizes[split]),
            )
        return size

    def _file_order(self, builder: tfds.core.DatasetBuilder, split: str, size: int) -> np.ndarray:
        """Returns the places in TFDS's order [size] of the rows in the original files' order."""
        if not self.keys:
            return np.arange(size)
        names = [key.split("/") for key in self.keys]
        rows = _read(builder, split, sorted({name[0] for name in names}))
        read = tf.autograph.experimental.do_not_convert(
            lambda row: tf.stack([_nested(row, name) for name in names])
        )
        keys = np.concatenate(list(rows.map(read).batch(4096).as_numpy_iterator()))
        if len(np.unique(keys, axis=0)) < size:
            raise ValueError(
                f"{self.data}, {split}: several rows have the same {', '.join(self.keys)}, so the "
                "order of the original files is unknown. Build the data set anew."
            )
        return np.lexsort(keys.T[::-1])


def _read(builder: Any, split: str, features: Sequence[str]) -> tf.data.Dataset:
    """The rows of a split in an order that depends on the data set alone, not on its shards."""
    decoders = tfds.decode.PartialDecoding(dict.fromkeys(features, True)) if features else None
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, skip_prefetch=True)
    return builder.as_dataset(
        split=split, shuffle_files=False, read_config=config, decoders=decoders
    )


def _nested(row: Any, names: Sequence[str]) -> tf.Tensor:
    for name in names:
        row = row[name]
    return row


def _versions(folder: epath.Path) -> list[str]:
    """The versions of a data set below its folder."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name))


def where(rows: tf.data.Dataset, chosen: np.ndarray) -> tf.data.Dataset:
    """Returns the rows whose place is chosen [size]."""
    table = tf.constant(chosen)
    keep = tf.autograph.experimental.do_not_convert(lambda place, _: table[place])
    bare = tf.autograph.experimental.do_not_convert(lambda _, row: row)
    return rows.enumerate().filter(keep).map(bare)

"""The MPT paper's train, validation and test splits of data sets without public test labels.

The rule is due to Karimi Mahabadi et al. and is also used by ATTEMPT and MPT. For small data sets,
the validation split is permuted and halved. For large ones, the training split is permuted, its
first 1,000 rows are the validation split, and the official validation split is the test split. The
permutation is `torch.randperm` with seed 42 over the order of the original files. TFDS shuffles
rows when it builds a data set, so rows are first sorted by their `idx`. Data sets without an `idx`
keep TFDS's order, which is fixed, but their splits differ from the paper's.

Few-shot draws number the rows of a split from 0: row i is row i of the original file, or position
start + i of its permutation.

Only the permutation and the sort order are held in memory; rows are streamed and filtered.
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

from mpt_jax.runtime.files import read_json

SEED = 42
HALF = "half"
FEATURES = "features.json"
CLASS_NAMES = ("pythonClassName", "python_class_name", "type")  # the last in files of older TFDS


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one TFDS split: all rows, or positions `start` to `stop` of its permutation.

    Attributes:
        split: TFDS's name of the split.
        start, stop: The positions, which count from 0. `HALF` is half the number of rows, rounded
            down. If only `stop` is None, the part extends to the last row. If both are None, the
            part is all rows, without a permutation.
    """

    split: str
    start: int | str | None = None
    stop: int | str | None = None

    def places(self, size: int) -> slice | None:
        """Returns the positions of this part among `size` permuted rows, or None for all rows."""
        if self.start is None and self.stop is None:
            return None
        start, stop = (size // 2 if bound == HALF else bound for bound in (self.start, self.stop))
        return slice(start, stop)

    def num_rows(self, size: int) -> int:
        """Returns the number of rows of this part if the TFDS split has `size` rows."""
        places = self.places(size)
        return size if places is None else len(range(*places.indices(size)))


Parts = Mapping[str, Part]


def own(train: str = "train", validation: str = "validation", test: str = "test") -> Parts:
    """Returns the train, validation and test splits of the data set, unchanged."""
    return {"train": Part(train), "validation": Part(validation), "test": Part(test)}


def halved(validation: str = "validation") -> Parts:
    """Returns the splits for small data sets: the training split, and the two halves of the
    permuted validation split."""
    return {
        "train": Part("train"),
        "validation": Part(validation, 0, HALF),
        "test": Part(validation, HALF, None),
    }


def carved(
    train: str = "train", test: str = "validation", held_out: int = 1000, most: int | None = None
) -> Parts:
    """Returns the splits for large data sets.

    Validation is the first `held_out` rows of the permuted training split. Train is the remaining
    rows, at most `most` of them. Test is all rows of the TFDS split `test`.
    """
    return {
        "train": Part(train, held_out, None if most is None else held_out + most),
        "validation": Part(train, 0, held_out),
        "test": Part(test),
    }


def permutation(size: int, seed: int = SEED) -> np.ndarray:
    """Returns `torch.randperm(size)` on a CPU after `torch.manual_seed(seed)`, [size] int64.

    It is computed by a forward Fisher-Yates shuffle with one 32-bit draw of the Mersenne Twister
    per step.
    """
    order = list(range(size))
    draws = np.random.RandomState(seed).randint(0, 2**32, size=max(0, size - 1), dtype=np.uint32)
    for i, draw in enumerate(draws.tolist()):
        j = i + draw % (size - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


class PartsSource(seqio.DataSource):
    """A SeqIO source over a prepared TFDS data set, with splits defined by `parts`.

    The source never downloads the data set, because each host of a job would download it, and a job
    without network access would hang.

    Args:
        data: TFDS's name of the data set with config and version, such as 'glue/mnli:2.0.0'.
        parts: Split ('train', 'validation' or 'test') -> its rows.
        sizes: TFDS split -> number of rows in the published data set. A mismatch logs a warning.
        keys: The features that sort the rows into the order of the original files, most significant
            first, with '/' for nested features; () for data sets without such features.
        reads: The features to decode; () for all. Decoding unused features takes time.
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
        """False: examples are split among hosts after they are read."""
        return False

    def __str__(self) -> str:
        return f"TensorFlow Datasets, {self.data}"

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard; SeqIO splits its examples among the hosts."""
        return [split]

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the rows of a split in TFDS's order, regardless of `shuffle`.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
            ValueError: the data set lacks the split, or two rows have the same keys.
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
        """Returns the positions of a split's rows [n], row 0 first, in the output of `get_dataset`.

        Raises:
            FileNotFoundError, ValueError: see `get_dataset`.
        """
        part, builder = self.parts[split], self._builder()
        places = self._places(builder, part, self._size(builder, part.split))
        return np.searchsorted(np.sort(places), places)

    def fingerprint(self, split: str) -> Any:
        """Returns what the rows of a split depend on, as JSON values (see `data.fingerprints`): the
        names, sizes and times of the prepared files, which are too large to be read for this.

        Raises:
            FileNotFoundError: the data set is not prepared on this machine.
        """
        files = sorted(epath.Path(self._builder().data_dir).iterdir(), key=str)
        stats = [(path.name, path.stat().length, path.stat().mtime) for path in files]
        part = dataclasses.asdict(self.parts[split])
        return [self.data, split, part, list(self.keys), list(self.reads), stats]

    def num_rows(self, split: str) -> int:
        """Returns the number of rows of a split on this machine."""
        part = self.parts[split]
        return part.num_rows(self._size(self._builder(), part.split))

    def num_input_examples(self, split: str) -> int:  # type: ignore[override]
        """Returns the number of rows of a split of the published data set, without reading it."""
        part = self.parts[split]
        return part.num_rows(self.sizes[part.split])

    def is_prepared(self) -> bool:
        """Whether the data set is prepared on this machine."""
        try:
            self._builder()
        except FileNotFoundError:
            return False
        return True

    def other_sizes(self) -> dict[str, tuple[int, int]]:
        """Returns TFDS split -> (rows on this machine, rows published), for splits that differ.

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
        """Returns the positions of the part's rows [n] in TFDS's order, row 0 first."""
        order, places = self._file_order(builder, part.split, size), part.places(size)
        return order if places is None else order[permutation(size)[places]]

    def _builder(self) -> tfds.core.DatasetBuilder:
        # A new loader each time, so that it uses the data folder set by the command line.
        loader = seqio.utils.LazyTfdsLoader(self.data, read_only=True)
        name, _, version = self.data.partition(":")
        _check_features(self._folder(loader.data_dir) / name / version / FEATURES, self.data)
        try:
            builder = loader.builder
            prepared = builder.is_prepared()
        except (tfds.core.registered.DatasetNotFoundError, AssertionError):
            builder, prepared = None, False  # the version is neither on disk nor in this TFDS
        if builder is None or not prepared:
            raise FileNotFoundError(self._absent(loader.data_dir))
        return builder

    def _folder(self, data_dir: str | None) -> epath.Path:
        return epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()

    def _absent(self, data_dir: str | None) -> str:
        name, _, version = self.data.partition(":")
        folder = self._folder(data_dir)
        versions = _versions(folder / name)
        others = f" (found version {', '.join(versions)})" if versions else ""
        return (
            f"The data set {name}, version {version}, is not in {folder}{others}. Run `tfds build "
            f"{self.data} --data_dir DIR` on a machine with network access, copy DIR to this "
            "machine, and pass --tfds_data_dir=DIR or set TFDS_DATA_DIR."
        )

    def _size(self, builder: tfds.core.DatasetBuilder, split: str) -> int:
        if split not in builder.info.splits:
            raise ValueError(
                f"The data set {self.data} has no {split!r} split on this machine, only "
                f"{', '.join(builder.info.splits)}. Rebuild it with "
                f"`tfds build {self.data} --data_dir DIR --overwrite`, with DIR as in "
                "--tfds_data_dir or TFDS_DATA_DIR."
            )
        size = builder.info.splits[split].num_examples
        if size != self.sizes[split]:
            logging.warning(
                "The %s split of %s has %d rows on this machine, but %d in the published data set, "
                "so splits made from it differ from the published ones.",
                *(split, self.data, size, self.sizes[split]),
            )
        return size

    def _file_order(self, builder: tfds.core.DatasetBuilder, split: str, size: int) -> np.ndarray:
        """Returns the positions of the original files' rows [size] in TFDS's order, row 0 first."""
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
                "order of the original files is unknown. Rebuild the data set with `tfds build "
                f"{self.data} --data_dir DIR --overwrite`, with DIR as in --tfds_data_dir or "
                "TFDS_DATA_DIR."
            )
        return np.lexsort(keys.T[::-1])


def _check_features(path: epath.Path, data: str) -> None:
    """Raises ValueError if the features.json of a data set refers to a class outside TFDS. TFDS
    would import the class's module and thus run code that the data set chooses."""
    if not path.exists():
        return
    waiting: list[Any] = [read_json(path)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            names = [value[key] for key in CLASS_NAMES if isinstance(value.get(key), str)]
            if others := [name for name in names if not name.startswith("tensorflow_datasets.")]:
                raise ValueError(
                    f"{path} refers to the class {others[0]!r}, which is not part of TensorFlow "
                    "Datasets. The data set was not loaded, because loading it would run that "
                    f"class's code. Rebuild it with `tfds build {data} --data_dir DIR "
                    "--overwrite`, with DIR as in --tfds_data_dir or TFDS_DATA_DIR."
                )


def _read(builder: Any, split: str, features: Sequence[str]) -> tf.data.Dataset:
    """Returns the rows of a split in an order that does not depend on the data set's shards."""
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
    """Returns the versions of a data set that are in its folder."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name))


def where(rows: tf.data.Dataset, chosen: np.ndarray) -> tf.data.Dataset:
    """Returns the rows whose entry of `chosen`, bool [size], is True."""
    table = tf.constant(chosen)
    keep = tf.autograph.experimental.do_not_convert(lambda index, _: table[index])
    bare = tf.autograph.experimental.do_not_convert(lambda _, row: row)
    return rows.enumerate().filter(keep).map(bare)

"""SeqIO sources of examples in files: one file per split, or one file that is split.

The first request for examples of any split reads all files of a task. `file_readers` describes how.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from mpt_jax.tasks import splits
from mpt_jax.tasks.file_readers import Examples, check_readable

SPLITS = ("train", "validation", "test")

Read = Callable[[epath.Path], Examples]


class FileSource(seqio.DataSource):
    """Source of examples in files, which are read at first use and kept in memory as text.

    Args:
        split_names: The names of the splits.
        paths: The files, which the constructor checks without reading them.

    Attributes:
        template: The text templates, labels and names of metrics, as JSON values.
    """

    template: Mapping[str, Any] = {}

    def __init__(self, split_names: Sequence[str], paths: Sequence[epath.Path]):
        for path in paths:
            check_readable(path)
        super().__init__(splits=split_names)
        self.paths = tuple(paths)
        self._digests: dict[str, str] = {}

    def read(self) -> Mapping[str, Examples]:
        """Reads the examples of each split. Raises ValueError like `file_readers.read`."""
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Mapping[str, Examples]:
        """The examples of each split, read at first use."""
        return self.read()

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: examples are split among hosts after they are read."""
        return False

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard; SeqIO splits its examples among the hosts."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows of a split. Reads all files if they have not been read."""
        return len(self.examples[split].inputs)

    def sha256(self, split: str) -> str:
        """Returns the SHA-256 of a split's texts in file order. Each row is hashed as a line with
        the JSON list [input, target]. Reads all files if they have not been read."""
        if split not in self._digests:
            examples, digest = self.examples[split], hashlib.sha256()
            for row in zip(examples.inputs, examples.targets, strict=True):
                digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._digests[split] = digest.hexdigest()
        return self._digests[split]

    def fingerprint(self, split: str) -> Any:
        """Returns the digest of a split's rows (see `data.fingerprints`)."""
        return self.sha256(split)

    def texts(self, split: str) -> dict[str, np.ndarray]:
        """Returns the rows of `get_dataset` as {feature: UTF-8 texts [rows]}.

        Raises:
            ValueError: rows of a file cannot be used.
        """
        examples = self.examples[split]
        return {
            name: np.array([text.encode() for text in texts], object)
            for name, texts in (("inputs", examples.inputs), ("targets", examples.targets))
        }

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the {inputs, targets} of a split in file order, regardless of `shuffle`.

        Raises:
            ValueError: rows of a file cannot be used.
        """
        del shuffle, seed, unused  # batches are shuffled downstream
        return tf.data.Dataset.from_tensor_slices(self.texts(split))


class Files(FileSource):
    """Source with one file per split. Logs a warning if another split shares inputs with train.

    Args:
        name: The name of the task.
        files: Split -> path.
        reader: The function that reads a file.
    """

    def __init__(self, name: str, files: Mapping[str, epath.Path], reader: Read):
        super().__init__(tuple(files), tuple(files.values()))
        self.name, self.files, self.reader = name, files, reader

    def read(self) -> Mapping[str, Examples]:
        """Reads the file of each split; see `FileSource.read`."""
        examples = {split: self.reader(path) for split, path in self.files.items()}
        train_inputs = set(examples["train"].inputs) if "train" in examples else set()
        for split in examples:
            if split == "train":
                continue
            shared = sum(text in train_inputs for text in examples[split].inputs)
            if shared:
                logging.warning(
                    "%s: %d of the %d inputs of %s also occur in train, so scores on %s are too "
                    "optimistic. Remove these inputs from one of the two files.",
                    *(self.name, shared, len(examples[split].inputs), split, split),
                )
        return examples


class SplitFile(FileSource):
    """Source with one file, split by a hash of each input into train, validation and test.

    The split of a row depends only on its input and the seed (`divide`). It does not depend on the
    order of rows or, except in very small files, on other rows.

    Args:
        path: The file.
        shares: The shares of train, validation and test.
        seed: The seed of the hash; None for `splits.SEED`.
        reader: The function that reads the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `shares` are not three numbers of at least 0 that sum to 1, the seed is out of
            range, or the file's format is not supported.
    """

    def __init__(self, path: epath.Path, shares: Sequence[float], seed: int | None, reader: Read):
        self.seed = splits.SEED if seed is None else seed
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed={seed} is out of range, so {path} cannot be split. Use a seed from 0 to "
                "2^32 - 1."
            )
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"split={tuple(shares)} for {path} is not three numbers of at least 0 that sum to "
                "1. Pass one share for each of train, validation and test."
            )
        self.shares = {name: share for name, share in zip(SPLITS, shares, strict=True) if share}
        super().__init__(list(self.shares), [path])
        self.reader = reader

    def read(self) -> Mapping[str, Examples]:
        """Reads the file and splits its rows. Raises ValueError if a split would be empty."""
        (path,) = self.paths
        whole = self.reader(path)
        inputs = set(whole.inputs)
        if len(inputs) < len(self.shares):
            raise ValueError(
                f"{path} has {len(inputs)} different inputs, too few for the splits "
                f"{', '.join(self.shares)}. Add rows, change split=, or use one file per split."
            )
        parts = divide(whole.inputs, tuple(self.shares.values()), self.seed)
        examples = {split: whole.take(rows) for split, rows in zip(self.shares, parts, strict=True)}
        sizes = ", ".join(f"{split} {len(part.inputs)}" for split, part in examples.items())
        logging.info("%s: %d rows, split into %s.", path, len(whole.inputs), sizes)
        return examples


def divide(inputs: Sequence[str], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Returns the row numbers of each split in ascending order.

    The place of an input is the first 64 bits of the SHA-256 of the seed, a line end and the text,
    as a fraction of 2^64. The unit interval is cut by the shares, and the place of an input
    determines its split. So equal inputs are in the same split, and added rows do not move others.

    In a small file, a split may be empty. It then takes one input from the split with the largest
    share: the one whose place is nearest to the empty split's part of the interval. Several empty
    splits are filled from last to first. Once an added row falls into the split, the input
    returns. So if train has the largest share, an added row never moves another row from train to
    a held-out split.

    Args:
        inputs: The input of each row.
        shares: The share of each split, all positive, which sum to 1.
        seed: The seed of the hash.
    """
    ends = np.cumsum(shares)
    starts = np.concatenate([[0.0], ends[:-1]])
    places = {text: _place(text, seed) for text in inputs}
    texts = list(places)
    where = np.array([places[text] for text in texts])
    split_of = np.searchsorted(ends[:-1], where, side="right")
    for split in reversed(range(len(shares))):
        counts = np.bincount(split_of, minlength=len(shares))
        if counts[split]:
            continue
        largest = int(np.argmax(shares))
        giver = largest if counts[largest] > 1 else int(np.argmax(counts))
        distance = np.maximum(starts[split] - where, where - ends[split])
        nearest = np.argmin(np.where(split_of == giver, distance, np.inf))
        if counts[giver] > 1:
            split_of[nearest] = split
    number = dict(zip(texts, split_of.tolist(), strict=True))
    part = np.array([number[text] for text in inputs])
    return [np.flatnonzero(part == split) for split in range(len(shares))]


def _place(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

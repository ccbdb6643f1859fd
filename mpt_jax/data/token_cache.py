"""Cache of tokenized splits on disk, shared by runs and, on a shared file system, by hosts.

An entry is a folder named after its fingerprint (`fingerprints`), with one file for each array and
`entry.json`. Files are read once, for their checksums, and then mapped into memory, which therefore
holds no more than batches touch. The folder of the cache is `MPT_JAX_TOKEN_CACHE` if set (empty
switches it off), else `~/.cache/mpt_jax/tokens`. It may be deleted at any time between runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from absl import logging

from mpt_jax.core import schema

VARIABLE = "MPT_JAX_TOKEN_CACHE"
_ENTRY = "entry.json"
_FEATURES = ("inputs", "targets")
_TYPES = {
    **dict.fromkeys(_FEATURES, np.int32),
    **{f"{name}.offsets": np.int64 for name in _FEATURES},
    "overlong": np.bool_,
}
_PART = 2**24  # bytes that are read at a time
_OLD = 86400  # seconds after which an unfinished entry is removed


class Counts(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers of tokens of a feature.

    Attributes:
        tokens: the tokens that do not end a text.
        unknown: those that the vocabulary does not know.
        zeros: those with the id 0.
    """

    tokens: schema.Amount = 0
    unknown: schema.Amount = 0
    zeros: schema.Amount = 0

    def plus(self, other: Counts) -> Counts:
        """Returns the sums."""
        sums = (self.tokens + other.tokens, self.unknown + other.unknown, self.zeros + other.zeros)
        return Counts(*sums)


class Tokens(NamedTuple):
    """The tokens of some examples.

    Attributes:
        values: the token ids of the `inputs` and of the `targets` of all examples [N].
        offsets: where each text of these features starts, and where the last one ends [n + 1].
        overlong: whether a text of the example was truncated [n].
        counts: the numbers of tokens of the features.
    """

    values: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    overlong: np.ndarray
    counts: dict[str, Counts]


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    size: schema.Amount
    crc32: schema.Amount


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    arrays: dict[str, _Array]
    counts: dict[str, Counts]
    crc32: schema.Amount = 0  # of the other fields

    def checksum(self) -> int:
        return zlib.crc32(msgspec.json.encode([self.arrays, self.counts]))


def folder() -> Path | None:
    """Returns the folder of the cache; None if it is switched off."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return Path.home() / ".cache" / "mpt_jax" / "tokens"
    return Path(given) if given else None


def load(fingerprint: str) -> Tokens | None:
    """Returns the tokens of an entry, mapped into memory; None if there is none, or if it is
    damaged, which is logged."""
    root = folder()
    if root is None or not (root / fingerprint / _ENTRY).is_file():
        return None
    path = root / fingerprint
    try:
        entry = schema.load((path / _ENTRY).read_bytes(), _Entry, str(path / _ENTRY), "")
        if set(entry.arrays) != set(_TYPES) or set(entry.counts) != set(_FEATURES):
            raise ValueError(f"{path} has the arrays {schema.short(sorted(entry.arrays))}")
        if entry.crc32 != entry.checksum():
            raise ValueError(f"the checksum of {path / _ENTRY} differs")
        arrays = {name: _mapped(path, name, entry.arrays[name]) for name in _TYPES}
        values = {name: arrays[name] for name in _FEATURES}
        offsets = {name: arrays[f"{name}.offsets"] for name in _FEATURES}
        _check(path, values, offsets, arrays["overlong"])
    except (OSError, ValueError) as error:
        logging.warning("The token cache has a damaged entry, which is made again: %s", error)
        shutil.rmtree(path, ignore_errors=True)
        return None
    return Tokens(values, offsets, arrays["overlong"], entry.counts)


def _mapped(entry: Path, name: str, array: _Array) -> np.ndarray:
    """Returns an array, mapped into memory after its size and checksum were compared."""
    path, dtype = entry / name, np.dtype(_TYPES[name])
    if path.stat().st_size != array.size * dtype.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size} bytes for {array.size} values")
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            checksum = zlib.crc32(part, checksum)
    if checksum != array.crc32:
        raise ValueError(f"the checksum of {path} differs")
    return np.memmap(path, dtype, "r", shape=(array.size,)) if array.size else np.empty(0, dtype)


def _check(
    path: Path,
    values: Mapping[str, np.ndarray],
    offsets: Mapping[str, np.ndarray],
    overlong: np.ndarray,
) -> None:
    for name in _FEATURES:
        found = offsets[name]
        if len(found) != len(overlong) + 1:
            raise ValueError(f"{path} has {len(overlong)} examples and {len(found)} offsets")
        if found[0] or found[-1] != len(values[name]) or (np.diff(found) < 0).any():
            raise ValueError(f"the offsets of {name} in {path} do not fit")


def save(fingerprint: str, parts: Iterable[Tokens]) -> bool:
    """Writes an entry, one part after another. Returns whether that succeeded: a failure is logged,
    and leaves nothing behind. If another process has written the entry meanwhile, that one stays.

    Args:
        fingerprint: the name of the entry.
        parts: the tokens of the examples, in order.
    """
    root = folder()
    if root is None:
        return False
    try:
        with _new(root, fingerprint) as path, _Writer(path) as writer:
            for part in parts:
                writer.add(part)
            (path / _ENTRY).write_bytes(msgspec.json.encode(writer.entry()))
    except OSError as error:
        logging.warning(
            "Tokens cannot be cached in %s (%s), so every run tokenizes them. Set %s to another "
            "folder, or to '' to switch the cache off.",
            *(root, error, VARIABLE),
        )
        return False
    return True


class _Writer(contextlib.ExitStack):
    """Writer of the arrays of an entry."""

    def __init__(self, path: Path):
        super().__init__()
        self._files = {name: self.enter_context((path / name).open("wb")) for name in _TYPES}
        self._arrays = {name: _Array(0, 0) for name in _TYPES}
        self._counts = {name: Counts() for name in _FEATURES}
        for name in _FEATURES:
            self._append(f"{name}.offsets", np.zeros(1))

    def add(self, part: Tokens) -> None:
        for name in _FEATURES:
            ends = part.offsets[name][1:] + self._arrays[name].size
            self._append(f"{name}.offsets", ends)
            self._append(name, part.values[name])
            self._counts[name] = self._counts[name].plus(part.counts[name])
        self._append("overlong", part.overlong)

    def _append(self, name: str, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, _TYPES[name]).tobytes()
        self._files[name].write(content)
        array = self._arrays[name]
        crc32 = zlib.crc32(content, array.crc32)
        self._arrays[name] = _Array(array.size + len(values), crc32)

    def entry(self) -> _Entry:
        """Returns the description of what was written, after it is on the disk."""
        for file in self._files.values():
            file.flush()
        entry = _Entry(self._arrays, self._counts)
        return msgspec.structs.replace(entry, crc32=entry.checksum())


@contextlib.contextmanager
def _new(root: Path, fingerprint: str) -> Iterator[Path]:
    """A folder that becomes the entry if nothing fails."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*.unfinished"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _OLD:
                shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(".unfinished", dir=root))
    try:
        yield path
        try:
            path.rename(root / fingerprint)
        except OSError:
            if not (root / fingerprint / _ENTRY).is_file():
                raise
    finally:
        shutil.rmtree(path, ignore_errors=True)

"""Cache of tokenized splits on disk, shared by runs and, on a shared file system, by hosts.

An entry is a folder named after its fingerprint (`fingerprints`), with one file for each array and
`entry.json`. Files are mapped into memory, so a run reads only what its batches touch. The folder
is `MPT_JAX_TOKEN_CACHE` if set (empty switches the cache off), else `~/.cache/mpt_jax/tokens`. It
may be deleted at any time between runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from absl import logging

from mpt_jax.core import schema

VARIABLE = "MPT_JAX_TOKEN_CACHE"
_ENTRY = "entry.json"
_TYPES = {
    "inputs": np.int32,
    "input_offsets": np.int64,
    "targets": np.int32,
    "target_offsets": np.int64,
    "overlong": np.bool_,
}
_PART = 2**24  # bytes that are read at a time
_OLD = 86400  # seconds after which an unfinished entry is removed


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    size: schema.Amount
    crc32: schema.Amount


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    arrays: dict[str, _Array]
    unknown: dict[str, float]
    with_zeros: list[str]


class Tokens(NamedTuple):
    """The tokens of a split.

    Attributes:
        arrays: `inputs` and `targets`, the token ids of all texts [N]; `input_offsets` and
            `target_offsets`, where each text starts and the last one ends [n + 1]; `overlong`,
            whether a text of the example was truncated [n].
        unknown: the share of unknown tokens, from 0 to 1, of each feature.
        with_zeros: the features in which the id 0 occurs.
    """

    arrays: dict[str, np.ndarray]
    unknown: dict[str, float]
    with_zeros: list[str]


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
        if set(entry.arrays) != set(_TYPES):
            raise ValueError(f"{path} has the arrays {schema.short(sorted(entry.arrays))}")
        arrays = {name: _mapped(path, name, entry.arrays[name]) for name in _TYPES}
        _check(path, arrays)
    except (OSError, ValueError) as error:
        logging.warning("The token cache has a damaged entry, which is made again: %s", error)
        shutil.rmtree(path, ignore_errors=True)
        return None
    return Tokens(arrays, entry.unknown, entry.with_zeros)


def _mapped(folder: Path, name: str, array: _Array) -> np.ndarray:
    """Returns an array, mapped into memory after its size and checksum were compared."""
    path, dtype = folder / name, np.dtype(_TYPES[name])
    if path.stat().st_size != array.size * dtype.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size} bytes for {array.size} values")
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            checksum = zlib.crc32(part, checksum)
    if checksum != array.crc32:
        raise ValueError(f"the checksum of {path} differs")
    return np.memmap(path, dtype, "r", shape=(array.size,)) if array.size else np.empty(0, dtype)


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name in ("input", "target"):
        values, offsets = arrays[f"{name}s"], arrays[f"{name}_offsets"]
        bounds = (offsets[0], offsets[-1]) if len(offsets) else ()
        if bounds != (0, len(values)) or (np.diff(offsets) < 0).any():
            raise ValueError(f"the offsets of {name}s in {path} do not fit")
        if len(offsets) != len(arrays["overlong"]) + 1:
            raise ValueError(
                f"{path} has {len(arrays['overlong'])} and {len(offsets) - 1} examples"
            )


def save(fingerprint: str, tokens: Tokens) -> None:
    """Writes an entry. A failure is logged, and leaves nothing behind; if another process has
    written the entry meanwhile, that one stays."""
    root = folder()
    if root is None:
        return
    try:
        with _new(root, fingerprint) as path:
            arrays = {}
            for name, dtype in _TYPES.items():
                values = np.ascontiguousarray(tokens.arrays[name], dtype)
                with (path / name).open("wb") as file:
                    file.write(values.data.cast("B") if values.size else b"")
                arrays[name] = _Array(values.size, zlib.crc32(values.data) if values.size else 0)
            entry = _Entry(arrays, tokens.unknown, tokens.with_zeros)
            (path / _ENTRY).write_bytes(msgspec.json.encode(entry))
    except OSError as error:
        logging.warning(
            "Tokens cannot be cached in %s (%s), so every run tokenizes them. Set %s to another "
            "folder, or to '' to switch the cache off.",
            *(root, error, VARIABLE),
        )


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

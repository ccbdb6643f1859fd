"""The tensors of a Hugging Face folder, for any model.

Safetensors are read and written here, in one file or in shards with an index. Pickled weights
(`*.bin`) are only read, and only by torch, whose loader can be restricted to tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mpt_jax.runtime.files import is_local, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a folder's weights, by name; prefers safetensors to pickled weights.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: shards are truncated or missing; or weights are pickled, and hold more than
            tensors or torch is not installed.
    """
    for single, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).exists():
            files = [single]
        elif (folder / index).exists():
            files = _shards(folder, index)
        else:
            continue
        tensors: dict[str, np.ndarray] = {}
        for name in files:
            tensors.update(read_file(folder / name))
        return tensors
    raise FileNotFoundError(
        f"{folder} has no weights. Expected {WEIGHTS}, {INDEX}, {PICKLED} or {PICKLED_INDEX}."
    )


def _shards(folder: epath.Path, index: str) -> list[str]:
    """The files that an index lists."""
    try:
        files = sorted(set(read_json(folder / index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / index} is damaged: {error!r}.") from error
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {index} names {missing}, which do not exist. Copy them."
        )
    return files


def read_file(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of one file, `*.safetensors` or pickled by torch.

    Raises:
        ValueError: the file is truncated or damaged; or it is pickled, and torch rejects it or is
            not installed.
    """
    with _local(path) as local_path:
        if path.suffix != ".safetensors":
            return _pickled(local_path, path)
        try:
            return load_file(local_path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """Yields a path on this machine. Both libraries need one: bfloat16 is read no other way."""
    if is_local(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield os.fspath(path.copy(os.path.join(folder, path.name)))


def _pickled(local_path: str, path: epath.Path) -> dict[str, np.ndarray]:
    """Tensors pickled by torch. A file with anything else is rejected, and no code is run."""
    try:
        import torch  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise ValueError(
            f"{path} is pickled, and only torch can read it without running code from it. "
            "Install torch, or save the model again as safetensors: "
            "save_pretrained(folder, safe_serialization=True)."
        ) from error
    try:
        # The older of torch's two formats is not a zip file and cannot be memory-mapped.
        mapped = zipfile.is_zipfile(local_path)
        state = torch.load(local_path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than tensors (nothing was run): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} does not hold a mapping from names to tensors.")
    return {name: _as_numpy(tensor, torch) for name, tensor in state.items()}


def _as_numpy(tensor: Any, torch: Any) -> np.ndarray:
    """A torch tensor as a NumPy array on the same memory; NumPy itself has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write_tensors(
    folder: epath.Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes safetensors: one file if they fit, else shards and their index.

    Args:
        folder: an existing folder without weights.
        tensors: by name; at most one shard is copied at a time.
        max_shard_bytes: the size limit of a file; a larger tensor gets a separate file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, tensors, shards[0])
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, tensors, names)
        file_of |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: epath.Path, tensors: Mapping[str, np.ndarray], names: list[str]) -> None:
    shard = {name: np.ascontiguousarray(tensors[name]) for name in names}
    path.write_bytes(save(shard, metadata={"format": "pt"}))

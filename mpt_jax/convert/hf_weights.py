"""Reader and writer of the tensors in a Hugging Face folder, for any model.

Safetensors are read and written, as one file or as shards with an index. Pickled weights (`*.bin`)
are only read, and only with torch, whose loader can be restricted to tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file, save

from mpt_jax.core import schema
from mpt_jax.core.comparison import abbreviate
from mpt_jax.runtime.files import is_local, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_READ = ("F16", "BF16", "F32", "F64")  # safetensors' names of dtypes
MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default
# Tied tensors are views of one tensor in a pickled file: the embedding, its copies and the head.
MOST_VIEWS = 4


class Index(msgspec.Struct):
    """The schema of an index, which maps each tensor's name to its file."""

    weight_map: dict[str, schema.Name]


def read_tensors(folder: epath.Path, ignored: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Reads every tensor of a folder's weights, by name; prefers safetensors to pickled weights.

    Args:
        folder: the folder.
        ignored: names of tensors that are not returned, and may have any dtype.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: shards are truncated or missing; or the weights are pickled, and torch is not
            installed or finds more than tensors in them.
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
            tensors.update(read_file(folder / name, ignored))
        return tensors
    raise FileNotFoundError(
        f"{folder} has no weights. Download or copy {WEIGHTS}, or {PICKLED}, or an index "
        f"({INDEX} or {PICKLED_INDEX}) with its shards."
    )


def _shards(folder: epath.Path, index: str) -> list[str]:
    """Returns the names of the files that an index lists."""
    path, advice = folder / index, "Download or copy the index again."
    files = sorted(set(schema.check(read_json(path), Index, f"{path}", advice).weight_map.values()))
    if outside := [name for name in files if epath.Path(name).name != name or "\0" in name]:
        raise ValueError(
            f"{path} refers to files outside its folder: {', '.join(map(repr, outside[:3]))}. "
            f"{advice}"
        )
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} is incomplete: these files, listed in {index}, do not exist: "
            f"{abbreviate(missing)}. Download or copy them."
        )
    return files


def read_file(path: epath.Path, ignored: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Reads the tensors of one file, `*.safetensors` or pickled by torch.

    Args:
        path: the file.
        ignored: names of tensors that are not returned, and may have any dtype.

    Raises:
        ValueError: the file is truncated or damaged; a tensor has an unsupported dtype, such as
            float8; or the file is pickled, and torch rejects it or is not installed.
    """
    with _local(path) as local_path:
        if path.suffix != ".safetensors":
            tensors = _pickled(local_path, path)
        else:
            _check_dtypes(local_path, path, ignored)
            with schema.damage(f"{path} is truncated or damaged", "Download or copy it again."):
                tensors = load_file(local_path)
        return {name: x for name, x in tensors.items() if name not in ignored}


def _check_dtypes(local_path: str, path: epath.Path, ignored: Collection[str]) -> None:
    """Raises ValueError if a file's header lists tensors of a dtype that is not supported, except
    those that are ignored."""
    with schema.damage(f"{path} is truncated or damaged", "Download or copy it again."):
        with safe_open(local_path, "np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    read = {name: dtype for name, dtype in dtypes.items() if name not in ignored}
    if others := [f"{name} ({dtype})" for name, dtype in read.items() if dtype not in _READ]:
        raise ValueError(
            f"{path} has tensors of a dtype that is not supported: {abbreviate(others)}. Use "
            "weights in float16, bfloat16, float32 or float64; quantized weights are not supported."
        )


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """Yields a local path with the same content. A file in a bucket is copied first, since neither
    safetensors nor torch can read bfloat16 from a bucket."""
    if is_local(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield os.fspath(path.copy(os.path.join(folder, path.name)))


def _pickled(local_path: str, path: epath.Path) -> dict[str, np.ndarray]:
    """Reads tensors that torch pickled. Rejects a file with anything else, without running code
    from it."""
    try:
        import torch  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise ValueError(
            f"{path} holds pickled weights, which only torch can read without running code from "
            "the file, but torch is not installed. Install torch, or save the model again as "
            "safetensors: save_pretrained(folder, safe_serialization=True)."
        ) from error
    try:
        # The older of torch's two formats is not a zip file and cannot be memory-mapped.
        mapped = zipfile.is_zipfile(local_path)
        state = torch.load(local_path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # whatever torch raises for damaged pickles
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than tensors. No code from it was run. "
            "Download or copy it again, or save the model again as safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(
            f"{path} does not hold a mapping from names to tensors. Save the model again with "
            "save_pretrained(folder)."
        )
    # A view may repeat its values without end: its strides are numbers from the file.
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > MOST_VIEWS * (held := os.path.getsize(local_path)):
        raise ValueError(
            f"{path} declares {size:,} bytes of tensors, but the file has only {held:,} bytes. "
            "Download or copy it again, or save the model again as safetensors."
        )
    advice = "Save the model again as safetensors."
    with schema.damage(f"{path} holds tensors that NumPy cannot read", advice):
        return {str(name): _as_numpy(tensor, torch) for name, tensor in state.items()}


def _as_numpy(tensor: Any, torch: Any) -> np.ndarray:
    """Converts a torch tensor to a NumPy array. torch cannot convert bfloat16, so its bits are read
    as int16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write_tensors(
    folder: epath.Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes tensors as safetensors: one file if they fit, otherwise shards with an index.

    Args:
        folder: an existing folder without weights.
        tensors: the tensors, by name. At most one shard is copied at a time.
        max_shard_bytes: the maximum size of a file in bytes. A larger tensor gets a separate file.
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
        write_file(folder / WEIGHTS, tensors, shards[0])
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, tensors, names)
        file_of |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: epath.Path, tensors: Mapping[str, np.ndarray], names: Collection[str]) -> None:
    """Writes the tensors of some names as one safetensors file."""
    shard = {name: np.asarray(tensors[name], order="C") for name in names}
    path.write_bytes(save(shard, metadata={"format": "pt"}))

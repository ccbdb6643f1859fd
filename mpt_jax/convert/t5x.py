"""Reader and writer of T5X's checkpoints: its own format (msgpack, with large leaves as zarr
folders) and Orbax.

Only the model's parameters (`target`) are read. Scanned trees are returned unscanned. If the layers
of each scanned stack have equal relative position tables, one table is returned per stack.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mpt_jax.backbones.t5.scanned_params import is_stacked, unstack_layers
from mpt_jax.convert.architecture import with_even_tables
from mpt_jax.core.tree import check_floats, flatten, unflatten
from mpt_jax.runtime.files import absolute, is_local, new_folder

FORMAT_VERSION = 3  # of T5X's own format
FILE = "checkpoint"


def load_t5x(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a T5X checkpoint.

    Args:
        path: the folder `checkpoint_<step>` in either format, or the msgpack file itself.

    Returns:
        The unscanned tree of NumPy arrays, in the dtype of the file.

    Raises:
        FileNotFoundError: `path` does not exist or is not a checkpoint.
        ValueError: the checkpoint is truncated, parts of it are missing, or a parameter is of a
            dtype that is not supported, or not finite.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Check the path.")
    if not path.is_dir():
        params = _load_msgpack(path)
    elif (path / FILE).exists():
        params = _load_msgpack(path / FILE)
    elif (path / "state" / FILE).exists():
        params = _load_msgpack(path / "state" / FILE)
    elif (path / "state" / "_METADATA").exists():
        params = _load_orbax(path / "state")
    elif (path / "_METADATA").exists():
        params = _load_orbax(path)
    else:
        raise FileNotFoundError(
            f"{path} is neither a T5X checkpoint nor a Hugging Face folder with a config.json."
            f"{_suggestion(path)}"
        )
    check_floats(flatten(params), str(path))
    return with_even_tables(unstack_layers(params)) if is_stacked(params) else params


def _suggestion(path: epath.Path) -> str:
    """Returns a hint that names the checkpoints inside a folder, in case the user gave their parent
    folder."""
    names = sorted(child.name for child in path.iterdir() if child.name.startswith("checkpoint_"))
    if names:
        return f" Give one of the checkpoints inside it: {names}."
    return " Check the path, or download or copy the missing files."


def _load_msgpack(file: epath.Path) -> dict[str, Any]:
    try:
        contents = flax.serialization.msgpack_restore(file.read_bytes())
        target = contents["optimizer"]["target"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated, damaged, or not a T5X checkpoint: {_reason(error)}. Check the "
            "path, or download or copy the checkpoint again."
        ) from error
    return _read_arrays(target, file.parent)


def _reason(error: Exception) -> str:
    """Returns an error's text; a KeyError's is only the key."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _read_arrays(node: Any, folder: epath.Path) -> Any:
    """Replaces references to arrays stored beside the msgpack file with the arrays."""
    if isinstance(node, Mapping):
        if "driver" in node and "kvstore" in node:
            return _read_zarr(folder / node["kvstore"]["path"].rstrip("/"))
        return {name: _read_arrays(child, folder) for name, child in node.items()}
    return np.asarray(node)


def _read_zarr(folder: epath.Path) -> np.ndarray:
    """Reads a zarr array. Missing chunks are errors, although zarr itself reads them as zeros."""
    if not (folder / ".zarray").exists():
        raise ValueError(
            f"The checkpoint is incomplete: {folder} is missing. Download or copy it again."
        )
    store: Any = os.fspath(folder) + "/"
    if is_local(folder):
        store = {"driver": "file", "path": os.fspath(absolute(folder)) + "/"}
    spec = {"driver": "zarr", "kvstore": store}
    try:
        array = ts.open(spec, read=True).result()
        sizes: Any = array.chunk_layout.read_chunk.shape
        counts = [math.ceil(n / c) for n, c in zip(array.shape, sizes, strict=True)]
        present = {child.name for child in folder.iterdir()}
        chunks = {".".join(map(str, i)) for i in itertools.product(*map(range, counts))} or {"0"}
        if missing := chunks - present:
            raise ValueError(f"chunks {sorted(missing)[:3]} are missing")
        return np.asarray(array.read().result())
    except ValueError as error:
        raise ValueError(
            f"The checkpoint's array {folder} is incomplete: {error}. Download or copy it again."
        ) from error


def _load_orbax(folder: epath.Path) -> dict[str, Any]:
    """Reads the `target` of an Orbax checkpoint, without the optimizer's state."""
    folder = absolute(folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            tree = checkpointer.metadata(folder).item_metadata.tree
            item = {"target": tree["target"]}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restore = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
            return checkpointer.restore(folder, args=restore)["target"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{folder} is truncated, damaged, or not a T5X checkpoint: {_reason(error)}. Check "
                "the path, or download or copy the checkpoint again."
            ) from error


def save_t5x(path: str | os.PathLike[str], params: Mapping[str, Any], step: int = 0) -> epath.Path:
    """Writes parameters in T5X's own format, as one msgpack file without optimizer state.

    Args:
        path: the parent of the folder `checkpoint_<step>`. If writing fails, the folder is not
            created.
        params: the model's parameters.
        step: the training step, for the checkpoint and its name.

    Returns:
        The folder `checkpoint_<step>`.

    Raises:
        FileExistsError: the checkpoint already exists.
    """
    folder = epath.Path(path) / f"{FILE}_{step}"
    with new_folder(folder) as scratch:
        write_t5x(scratch, params, step)
    return folder


def write_t5x(folder: epath.Path, params: Mapping[str, Any], step: int) -> None:
    """Writes the files of `save_t5x` into an existing, empty folder."""
    contents = {"version": FORMAT_VERSION, "optimizer": _state(params, step)}
    (folder / FILE).write_bytes(flax.serialization.msgpack_serialize(contents))


def write_orbax(folder: epath.Path, params: Mapping[str, Any], step: int) -> None:
    """Writes parameters into an existing, empty folder in T5X's Orbax format: as the item `state`,
    without optimizer state."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            absolute(folder) / "state", args=ocp.args.PyTreeSave(_state(params, step))
        )


def _state(params: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns the tree of T5X's train state, without optimizer state."""
    target = unflatten({name: np.asarray(x) for name, x in flatten(params).items()})
    state = {"step": np.asarray(step, np.int32), "param_states": {}}
    return {"target": target, "state": state}

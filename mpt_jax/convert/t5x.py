"""T5X's checkpoints: its own format (msgpack, large leaves as zarr folders) and Orbax.

Only the model's parameters (`target`) are read. Scanned trees come back unscanned; relative
position tables that are equal in all layers of a stack (in one layer they always are) as one.
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
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.runtime.files import absolute, is_local, new_folder

FORMAT_VERSION = 3  # of T5X's own format
FILE = "checkpoint"


def load_t5x(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a T5X checkpoint.

    Args:
        path: `checkpoint_<step>`, a folder in either format, or the msgpack file itself.

    Returns:
        the unscanned tree, NumPy arrays in the dtype of the file.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint.
        ValueError: truncated, or parts of it missing.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
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
        raise FileNotFoundError(f"{path} is no checkpoint of T5X.{_suggestion(path)}")
    return with_even_tables(unstack_layers(params)) if is_stacked(params) else params


def _suggestion(path: epath.Path) -> str:
    """Where somebody named the folder around the checkpoints, the checkpoints."""
    names = sorted(child.name for child in path.iterdir() if child.name.startswith("checkpoint_"))
    return f" Name one of the checkpoints inside it: {names}." if names else " It holds none."


def _load_msgpack(file: epath.Path) -> dict[str, Any]:
    try:
        contents = flax.serialization.msgpack_restore(file.read_bytes())
        target = contents["optimizer"]["target"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated, damaged, or no checkpoint of T5X: {error}"
        ) from error
    return _read_arrays(target, file.parent)


def _read_arrays(node: Any, folder: epath.Path) -> Any:
    """Replaces the descriptions of arrays that lie beside the msgpack file by the arrays."""
    if isinstance(node, Mapping):
        if "driver" in node and "kvstore" in node:
            return _read_zarr(folder / node["kvstore"]["path"].rstrip("/"))
        return {name: _read_arrays(child, folder) for name, child in node.items()}
    return np.asarray(node)


def _read_zarr(folder: epath.Path) -> np.ndarray:
    """One zarr array; absent chunks are errors, where zarr itself reads them as zeros."""
    if not (folder / ".zarray").exists():
        raise ValueError(f"The checkpoint is incomplete: {folder} is missing.")
    store: Any = os.fspath(folder) + "/"
    if is_local(folder):
        store = {"driver": "file", "path": os.fspath(absolute(folder)) + "/"}
    spec = {"driver": "zarr", "kvstore": store}
    try:
        array = ts.open(spec, read=True).result()
        sizes: Any = array.chunk_layout.read_chunk.shape
        counts = [math.ceil(n / c) for n, c in zip(array.shape, sizes, strict=True)]
        there = {child.name for child in folder.iterdir()}
        chunks = {".".join(map(str, i)) for i in itertools.product(*map(range, counts))} or {"0"}
        if chunks - there:
            raise ValueError(f"chunks {sorted(chunks - there)[:3]} are missing")
        return np.asarray(array.read().result())
    except ValueError as error:
        raise ValueError(f"The checkpoint's array {folder} is incomplete: {error}") from error


def _load_orbax(folder: epath.Path) -> dict[str, Any]:
    """The `target` part of an Orbax checkpoint; the optimizer's state is not read."""
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
                f"{folder} is truncated, damaged, or no checkpoint of T5X: {error}"
            ) from error


def save_t5x(path: str | os.PathLike[str], params: Mapping[str, Any], step: int = 0) -> epath.Path:
    """Writes parameters as T5X's own format does, in one msgpack file without optimizer state.

    Args:
        path: the folder in which `checkpoint_<step>` is made; it appears complete or not at all.
        params: the tree as the model has it.
        step: the training step that the checkpoint is named for.

    Returns:
        the folder `checkpoint_<step>`.

    Raises:
        FileExistsError: there is such a checkpoint already.
    """
    folder = epath.Path(path) / f"{FILE}_{step}"
    with new_folder(folder) as made:
        write_t5x(made, params, step)
    return folder


def write_t5x(folder: epath.Path, params: Mapping[str, Any], step: int) -> None:
    """`save_t5x` into an empty folder that is there."""
    contents = {"version": FORMAT_VERSION, "optimizer": _state(params, step)}
    (folder / FILE).write_bytes(flax.serialization.msgpack_serialize(contents))


def write_orbax(folder: epath.Path, params: Mapping[str, Any], step: int) -> None:
    """Writes parameters into an empty folder as T5X does with Orbax: item `state`, without an
    optimizer's state."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            absolute(folder) / "state", args=ocp.args.PyTreeSave(_state(params, step))
        )


def _state(params: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What T5X calls a train state."""
    target = unflatten({name: np.asarray(x) for name, x in flatten(params).items()})
    state = {"step": np.asarray(step, np.int32), "param_states": {}}
    return {"target": target, "state": state}

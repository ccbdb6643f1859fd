"""Reader and writer of T5X checkpoints, in T5X's own format (msgpack, with large leaves as zarr
folders) or Orbax.

Only the model's parameters (`target`) are read. Scanned trees are returned unscanned. If the layers
of each scanned stack have equal relative position tables, one table is returned per stack.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import flax.serialization
import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mpt_jax.backbones.t5.scanned_params import is_stacked, unstack_layers
from mpt_jax.convert import msgpack_check
from mpt_jax.convert.architecture import with_even_tables
from mpt_jax.core import schema
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.tree import check_floats, flatten, unflatten
from mpt_jax.runtime.files import absolute, is_local, new_folder

FORMAT_VERSION = 3  # of T5X's own format
FILE = "checkpoint"
ZARR = ".zarray"
COPY_AGAIN = "Check the path, or download or copy the checkpoint again."
# What compression may save: gzip's limit. Stores of constant values save more, so that small
# arrays are always read.
MOST_VALUES_PER_BYTE, SMALL = 1032, 2**24


class ZarrHeader(msgspec.Struct):
    """The schema of `.zarray`."""

    shape: Annotated[list[schema.Count], msgspec.Meta(max_length=32)]
    chunks: Annotated[list[schema.Positive], msgspec.Meta(max_length=32)]
    dimension_separator: Literal[".", "/"] = "."

    def num_chunks(self) -> list[int]:
        """Returns the number of chunks along each axis."""
        pairs = zip(self.shape, self.chunks, strict=True)
        return [math.ceil(size / chunk) for size, chunk in pairs]


def load_t5x(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a T5X checkpoint.

    Args:
        path: the folder `checkpoint_<step>` in either format, the msgpack file itself, or a folder
            whose only checkpoint is in the msgpack format, such as MODEL_DIR/backbone.

    Returns:
        The unscanned tree of NumPy arrays, in the dtype of the file.

    Raises:
        FileNotFoundError: `path` does not exist or is not a checkpoint.
        ValueError: the checkpoint is truncated or incomplete, or a parameter has an unsupported
            dtype or is not finite.
    """
    path = only_checkpoint(epath.Path(path))
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


def only_checkpoint(path: epath.Path) -> epath.Path:
    """Returns the checkpoint in a folder that has only one, if it is in the msgpack format;
    otherwise the path."""
    children = list(path.glob("checkpoint_*")) if path.is_dir() else []
    return children[0] if len(children) == 1 and (children[0] / FILE).is_file() else path


def _suggestion(path: epath.Path) -> str:
    """Returns advice for a folder that is not a checkpoint. If it holds checkpoints, the advice
    lists them."""
    names = sorted(child.name for child in path.iterdir() if child.name.startswith("checkpoint_"))
    if names:
        return f" Use the path of one of the checkpoints in it: {abbreviate(names)}."
    return " Check the path, or download or copy the missing files."


def _load_msgpack(file: epath.Path) -> dict[str, Any]:
    content = file.read_bytes()
    with schema.damage(f"{file} is truncated, damaged, or not a T5X checkpoint", COPY_AGAIN):
        msgpack_check.check(content)
        target = flax.serialization.msgpack_restore(content)["optimizer"]["target"]
        if not isinstance(target, Mapping):
            raise ValueError(f"its target is a {type(target).__name__}, not a tree of parameters")
    return _read_arrays(target, file.parent, "")


def _read_arrays(node: Any, folder: epath.Path, name: str) -> Any:
    """Replaces references to arrays stored beside the msgpack file with the arrays."""
    if isinstance(node, Mapping):
        if "driver" in node and "kvstore" in node:
            return _read_zarr(folder / _relative(node["kvstore"], folder))
        return {str(k): _read_arrays(x, folder, f"{name}/{k}") for k, x in node.items()}
    if not isinstance(node, np.ndarray | np.generic | int | float):
        raise ValueError(
            f"The parameter {name[1:]!r} of the checkpoint {folder} is a {type(node).__name__}, "
            f"not an array. {COPY_AGAIN}"
        )
    return np.asarray(node)


def _relative(kvstore: Any, folder: epath.Path) -> str:
    """Returns an array's path within its checkpoint. Raises ValueError if it is outside."""
    path = kvstore.get("path") if isinstance(kvstore, Mapping) else None
    if not isinstance(path, str) or path.startswith("/") or {"..", ""} & {*path[:-1].split("/")}:
        raise ValueError(
            f"The checkpoint {folder} refers to the array {path!r}, which is not inside it. "
            f"{COPY_AGAIN}"
        )
    return path.rstrip("/")


def _read_zarr(folder: epath.Path) -> np.ndarray:
    """Reads a zarr array. Missing chunks are errors, although zarr itself reads them as zeros."""
    if not (folder / ZARR).exists():
        raise ValueError(
            f"The checkpoint is incomplete: {folder} is missing. Download or copy it again."
        )
    what = f"The checkpoint's array {folder}"
    header = schema.load((folder / ZARR).read_bytes(), ZarrHeader, f"{what} ({ZARR})", COPY_AGAIN)
    store: Any = os.fspath(folder) + "/"
    if is_local(folder):
        store = {"driver": "file", "path": os.fspath(absolute(folder)) + "/"}
    spec = {"driver": "zarr", "kvstore": store}
    with schema.damage(f"{what} is incomplete", COPY_AGAIN):
        sizes = {child.name: child.stat().length for child in folder.iterdir()}
        counts = header.num_chunks()
        _check_stored(math.prod(header.chunks) * math.prod(counts), sum(sizes.values()))
        if math.prod(counts) > len(sizes):  # before their names are listed
            raise ValueError(f"it has {math.prod(counts)} chunks, but {len(sizes)} files exist")
        numbers = itertools.product(*map(range, counts))
        separator = header.dimension_separator
        chunks = {separator.join(map(str, i)) for i in numbers} or {"0"}
        if missing := chunks - set(sizes):
            raise ValueError(f"it lacks the chunks {', '.join(sorted(missing)[:3])}")
        return np.asarray(ts.open(spec, read=True).result().read().result())


def _check_stored(values: int, stored: int) -> None:
    """Raises ValueError if `stored` bytes of compressed files cannot hold so many values."""
    if values > MOST_VALUES_PER_BYTE * stored + SMALL:
        raise ValueError(f"it declares {values:,} values, but its files have {stored:,} bytes")


def _load_orbax(folder: epath.Path) -> dict[str, Any]:
    """Reads the `target` of an Orbax checkpoint, without the optimizer's state."""
    folder = absolute(folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            for name in ("_METADATA", ZARR):  # JSON that Orbax reads without bounds
                if (folder / name).exists():
                    schema.parse((folder / name).read_bytes(), f"{folder / name}")
            tree = checkpointer.metadata(folder).item_metadata.tree
            item = {"target": tree["target"]}
            stored = sum(path.stat().length for path in _files(folder))
            for leaf in jax.tree.leaves(item):
                _check_stored(math.prod(leaf.shape), stored)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restore = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
            return checkpointer.restore(folder, args=restore)["target"]
        except MemoryError:
            raise
        except Exception as error:  # whatever Orbax raises for damaged files
            raise ValueError(
                f"{folder} is truncated, damaged, or not a T5X checkpoint: {schema.reason(error)}. "
                f"{COPY_AGAIN}"
            ) from error


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields all files below a folder."""
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files(child)
        else:
            yield child


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

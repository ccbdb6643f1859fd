"""Checkpoints of the trainable state: a thin layer over Orbax, asynchronous and atomic.

    MODEL_DIR/checkpoint_N/state    trainable parameters, optimizer state, step
    MODEL_DIR/checkpoint_N/meta     names, shapes and checksums, digests, the data position

The backbone is not included, so a checkpoint is about the size of the prompts. When a job resumes
and finds a corrupt checkpoint, it renames the checkpoint and uses the previous one; an error in the
log names both. A checkpoint that cannot be read for another reason (for example, storage does not
answer) is kept, and an error is raised. A checkpoint that was saved with another configuration also
raises an error.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mpt_jax.checkpointing import checksums, corruption
from mpt_jax.core import schema
from mpt_jax.core.comparison import check_same
from mpt_jax.core.tree import flatten
from mpt_jax.runtime.files import absolute
from mpt_jax.training.state import TrainState

PREFIX = "checkpoint"
NAME = re.compile(rf"{PREFIX}_(\d+)")  # the folder of a complete checkpoint


class DataPosition(msgspec.Struct):
    """The schema of a position in the training data; see `data_position`."""

    packed: str | list[str] | None
    skip: schema.Count


class RunStatus(msgspec.Struct):
    """The schema of `Trainer.run_status`: one value per group."""

    ended: list[Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]]
    failed: list[bool]
    placed: list[bool]


class Meta(msgspec.Struct):
    """The schema of a checkpoint's `meta`."""

    shapes: dict[str, list[schema.Count]]
    identity: dict[str, Any] = {}
    data: DataPosition | None = None
    runs: RunStatus | None = None
    checksums: dict[str, int] = {}


class Checkpoints:
    """The checkpoints of one MODEL_DIR.

    Args:
        model_dir: the path of MODEL_DIR; created unless `read_only`.
        keep: the number of latest checkpoints to keep; None keeps all.
        read_only: whether to write nothing. Unfinished saves are then not removed, since the job
            that writes them may be alive.

    Raises:
        OSError: the checkpoints cannot be listed.
    """

    def __init__(self, model_dir: str, keep: int | None = 1, read_only: bool = False):
        self.model_dir = epath.Path(model_dir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            step_prefix=PREFIX,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._handlers = handlers
        try:
            self._manager = ocp.CheckpointManager(
                epath.Path(model_dir).absolute(),
                item_names=tuple(handlers),
                item_handlers=handlers,
                options=options,
            )
        except RecursionError as error:  # Orbax ignores files that are damaged otherwise
            raise OSError(
                f"A _CHECKPOINT_METADATA file in {model_dir} is damaged "
                f"({corruption.reason(error)}). Rename the checkpoint that holds it to use the "
                "other checkpoints, or restore the file from a copy."
            ) from error

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts an asynchronous save; does nothing if the step is already saved.

        Args:
            state: the state to save; its frozen parameters are not written.
            meta: the JSON values that `restore` returns with the state.

        Raises:
            OSError: this save could not start, or the previous one failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        tree = _saved(state)
        meta = {**meta, "shapes": _shapes(tree), "process_count": jax.process_count()}
        meta = checksums.sealed({**meta, "checksums": checksums.of_leaves(tree)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.save(step, args=args)

    def restore(
        self, state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads a checkpoint into a state of the same structure.

        Args:
            state: a state with the structure, shapes, shardings and frozen parameters of the
                restored one.
            step: the step of the checkpoint to read. None reads the latest that is not corrupt;
                corrupt ones are logged.

        Returns:
            The state and the `meta` saved with it, or None if nothing was saved.

        Raises:
            ValueError: the checkpoint was saved with another configuration.
            OSError: the checkpoint of `step`, or every checkpoint if `step` is None, is corrupt; or
                a checkpoint could not be read for another reason. In a job of several processes,
                all of them raise it.
        """
        steps = self.steps if step is None else [step]
        failures = []
        for candidate in reversed(steps):
            path = self.path(candidate)
            try:
                meta = corruption.read_on_all_processes(
                    functools.partial(self._read_meta, candidate), f"{path}"
                )
                _check_configuration(state, meta, path)
                tree = corruption.read_on_all_processes(
                    functools.partial(self._read, candidate, "state", _restore_args(_saved(state))),
                    f"{path}",
                )
                if "checksums" in meta:  # earlier versions saved none
                    # Every process computes the sums, and all must know if one finds a mismatch.
                    sums = checksums.of_leaves(tree)
                    compare = functools.partial(checksums.check, sums, meta["checksums"])
                    corruption.read_on_all_processes(compare, f"{path}")
            except checksums.Damaged as error:
                failures.append(f"{path} cannot be read ({error}).")
                continue
            for failure in failures:
                logging.error("%s Resuming from %s instead.", failure, path)
            return _replaced(state, tree), meta
        if failures:
            raise OSError(" ".join([*failures, self._fix_of_corruption(step)]))
        return None

    def _fix_of_corruption(self, step: int | None) -> str:
        """Returns what the user can do about corrupt checkpoints, for the end of the error.

        Args:
            step: the requested step, whose checkpoint is corrupt; None if all are corrupt.
        """
        if step is None:
            return (
                f"No readable checkpoint is left in {self.model_dir}. Restore a checkpoint from a "
                "copy, or choose another MODEL_DIR to start again."
            )
        name = self.path(step).name
        others = ", ".join(self.path(saved).name for saved in self.steps if saved != step)
        if not others:
            return f"No other checkpoint is in {self.model_dir}. Restore {name} from a copy."
        return (
            f"{self.model_dir} has other checkpoints ({others}). Use one of them, or restore "
            f"{name} from a copy."
        )

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` saved with a state; all processes must call it together.

        Raises:
            OSError: the `meta` cannot be read; raised in all processes of a job.
        """
        path = self.path(step)
        try:
            return corruption.read_on_all_processes(
                functools.partial(self._read_meta, step), f"{path}"
            )
        except checksums.Damaged as error:
            raise OSError(
                f"{path} cannot be read ({error}). {self._fix_of_corruption(step)}"
            ) from error

    def rename_unreadable_after(self, step: int) -> None:
        """Renames the checkpoints of all later steps, which `restore` has found to be corrupt.

        Raises:
            OSError: some of them could not be renamed; raised in all processes.
        """
        unreadable = [saved for saved in self.steps if saved > step]
        if not unreadable:
            return
        error = None
        try:
            self._set_aside(unreadable if jax.process_index() == 0 else [])
        except OSError as caught:
            error = caught  # raised below, since the other processes wait at the barrier
        multihost_utils.sync_global_devices("unreadable checkpoints are out of the way")
        self._manager.reload()
        if left := [str(self.path(saved)) for saved in self.steps if saved > step]:
            cause = corruption.reason(error) if error else "see the log of process 0"
            raise OSError(
                f"Unreadable checkpoints could not be renamed: {', '.join(left)} ({cause}). "
                f"Move them out of {self.model_dir}, then rerun the same command to resume from "
                f"{self.path(step).name}."
            ) from error

    def _set_aside(self, steps: Sequence[int]) -> None:
        for path in map(self.path, steps):
            target = path.parent / f"unreadable_{path.name}"
            if target.exists():
                target.rmtree()
            path.rename(target)
            logging.error("Renamed the unreadable checkpoint %s to %s.", path, target)

    def path(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint."""
        return self.model_dir / f"{PREFIX}_{step}"

    def wait(self) -> None:
        """Waits until a save in progress has finished.

        Raises:
            OSError: the save failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a save in progress and closes Orbax's manager; raises errors as `wait` does."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of a save into an OSError that names the last complete checkpoint, if any.

        Saves are asynchronous, so their errors appear in a later call.
        """
        try:
            yield
        except Exception as error:
            complete = [self.path(step).name for step in saved_steps(self.model_dir)]
            last = f"The last complete checkpoint is {complete[-1]}." if complete else ""
            raise OSError(
                f"A checkpoint in {self.model_dir} could not be written "
                f"({corruption.reason(error)}). {last or 'No checkpoint is complete yet.'} Fix the "
                "cause (for example, free disk space), then rerun the same command to "
                f"{'resume' if complete else 'start again'}."
            ) from error

    def _read(self, step: int, item: str, args: Any) -> Any:
        # Bypasses the manager, which would wait for the other processes, even for one that failed.
        return self._handlers[item].restore(absolute(self.path(step)) / item, args=args)

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._read(step, "meta", ocp.args.JsonRestore())
        checksums.check_seal(meta)
        try:
            schema.check(meta, Meta, "The metadata of the checkpoint")
        except ValueError as error:
            raise checksums.Damaged(str(error)) from error
        return meta


def _check_configuration(state: TrainState, meta: dict[str, Any], path: epath.Path) -> None:
    """Compares the names and shapes of the arrays in a checkpoint with those of a state.

    Raises:
        ValueError: the checkpoint was saved with another configuration; the message shows the
            differences.
    """
    saved, current = meta["shapes"], _shapes(_saved(state))
    check_same(
        saved,
        current,
        sorted({*saved, *current}),
        what=f"{path}",
        advice="Restore the saved tasks, prompt method and settings, or choose another MODEL_DIR.",
    )


def saved_steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, oldest first."""
    children = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(match[1]) for path in children if (match := NAME.fullmatch(path.name)))


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def _replaced(state: TrainState, tree: dict[str, Any]) -> TrainState:
    return state.replace(
        step=tree["step"], trainable=tree["trainable"], opt_state=tree["opt_state"]
    )


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {name: list(np.shape(leaf)) for name, leaf in flatten(tree).items()}


def _restore_args(tree: Any) -> Any:
    abstract = functools.partial(jax.tree.map, ocp.utils.to_shape_dtype_struct)
    return ocp.args.StandardRestore(abstract(tree))

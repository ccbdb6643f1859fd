"""Checkpoints of what learns: a thin layer over Orbax, prompt-sized, asynchronous, atomic.

    MODEL_DIR/checkpoint_N/state    trainable parameters, optimizer state, step
    MODEL_DIR/checkpoint_N/meta     names, shapes and checksums, digests, the data's position

The backbone is not in them. A checkpoint that is damaged, or does not hold what was saved, is moved
aside and the one before it is used, with an error in the log that names both. One that cannot be
read for another reason (a store that does not answer, say) is left alone, and that raises. So does
one of another configuration, which is readable but does not match: the user's to resolve.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mpt_jax.checkpointing import checksums, corruption
from mpt_jax.core.comparison import check_same
from mpt_jax.core.tree import flatten
from mpt_jax.runtime.files import absolute
from mpt_jax.training.state import TrainState

PREFIX = "checkpoint"
NAME = re.compile(rf"{PREFIX}_(\d+)")  # of a complete one


class Checkpoints:
    """The checkpoints of one MODEL_DIR.

    Args:
        model_dir: the folder; created unless `read_only`.
        keep: how many stay.
        read_only: never writes, and never cleans up behind a run that may be alive.
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
        self._manager = ocp.CheckpointManager(
            epath.Path(model_dir).absolute(),
            item_names=tuple(handlers),
            item_handlers=handlers,
            options=options,
        )

    @property
    def steps(self) -> list[int]:
        """The steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts an asynchronous save; a step that is saved already is left as it is.

        Args:
            state: the state; only what learns is written.
            meta: JSON values that come back with it.
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
            state: gives structure, shapes and shardings, and the frozen parameters.
            step: which; None takes the latest that can be read.

        Returns:
            The state and what `save` was given beside it, or None where nothing was saved.

        Raises:
            ValueError: the checkpoint was saved with another configuration.
            OSError: it could not be read, for another reason than damage; or all are damaged. In a
                job of several processes all raise alike.
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
                    # Adding up is every process's work, and what one of them finds all must know.
                    sums = checksums.of_leaves(tree)
                    compare = functools.partial(checksums.check, sums, meta["checksums"])
                    corruption.read_on_all_processes(compare, f"{path}")
            except checksums.Damaged as error:
                failures.append(f"{path} cannot be read ({error}).")
                continue
            for failure in failures:
                logging.error("%s Going on from %s instead.", failure, path)
            return _replaced(state, tree), meta
        if failures:
            raise OSError(
                " ".join(failures) + f" No other checkpoint is left in {self.model_dir}; remove "
                "it to start again."
            )
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state; all processes call it together.

        Raises:
            OSError: it cannot be read; in a job of several processes in all of them.
        """
        path = self.path(step)
        try:
            return corruption.read_on_all_processes(
                functools.partial(self._read_meta, step), f"{path}"
            )
        except checksums.Damaged as error:
            raise OSError(f"{path} cannot be read ({error}).") from error

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints later than a step, which could not be read, out of the way.

        Raises:
            OSError: that failed; in all processes.
        """
        unreadable = [found for found in self.steps if found > step]
        if not unreadable:
            return
        error = None
        try:
            self._set_aside(unreadable if jax.process_index() == 0 else [])
        except OSError as caught:
            error = caught  # after the others, who wait
        multihost_utils.sync_global_devices("unreadable checkpoints are out of the way")
        self._manager.reload()
        if left := [str(self.path(found)) for found in self.steps if found > step]:
            raise OSError(
                f"{', '.join(left)} cannot be read, and could not be moved aside "
                f"({corruption.reason(error) if error else 'the first process says why'}). "
                "Remove them."
            ) from error

    def _set_aside(self, steps: Sequence[int]) -> None:
        for path in map(self.path, steps):
            aside = path.parent / f"unreadable_{path.name}"
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
            logging.error("Moved the unreadable checkpoint %s to %s.", path, aside)

    def path(self, step: int) -> epath.Path:
        """Where the checkpoint of a step lies."""
        return self.model_dir / f"{PREFIX}_{step}"

    def wait(self) -> None:
        """Waits for a save under way.

        Raises:
            OSError: it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases; raises as `wait` does."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A save runs beside training, so that what goes wrong in it comes up at a later call."""
        try:
            yield
        except Exception as error:
            there = [self.path(step).name for step in saved_steps(self.model_dir)]
            last = there[-1] if there else "none"
            raise OSError(
                f"A checkpoint in {self.model_dir} could not be written "
                f"({corruption.reason(error)}). The last complete one is: {last}. "
                "Once there is room to write, the same command goes on from it."
            ) from error

    def _read(self, step: int, item: str, args: Any) -> Any:
        # Past the manager, which would wait for the other processes, also for one that could not
        # read.
        return self._handlers[item].restore(absolute(self.path(step)) / item, args=args)

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._read(step, "meta", ocp.args.JsonRestore())
        checksums.check_seal(meta)
        if "shapes" not in meta:
            raise checksums.Damaged("The record of the checkpoint names no shapes")
        return meta


def _check_configuration(state: TrainState, meta: dict[str, Any], path: epath.Path) -> None:
    """Compares the shapes that a checkpoint was saved with.

    Raises:
        ValueError: it was saved with another configuration; shows what differs.
    """
    saved, current = meta["shapes"], _shapes(_saved(state))
    check_same(
        saved,
        current,
        sorted({*saved, *current}),
        what=f"{path}",
        advice=f"Choose another MODEL_DIR, or remove {path.parent}.",
    )


def saved_steps(folder: epath.Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first; none where there is none."""
    children = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(named[1]) for path in children if (named := NAME.fullmatch(path.name)))


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

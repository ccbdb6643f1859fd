"""Preemption handling for the real T5X's trainer: save on SIGTERM or Ctrl-C, then exit.

T5X saves and exits when its trainer raises `PreemptionError`, but nothing in T5X raises it, and
the exit shows a traceback. With this module, T5X's trainer handles signals like this library's
trainer (see `preemption`): it checks before every step whether to stop, and then raises an error
that ends the process with the exit code of `preemption`.

    train_script.train.trainer_cls = @initializer.stoppable()
    initializer.stoppable.trainer_cls = @trainer.Trainer

This module uses one private name of T5X, `Trainer._compiled_train_step`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import logging

from mpt_jax.runtime import preemption


class _Due(Exception):
    """Ends T5X's training loop from inside its data iterator."""


class _Listener:
    """Makes one T5X trainer stop on request.

    It checks for a stop request after every step, by the step's number: JAX stops all processes of
    a job at the same step only if every process checks at every step.

    Args:
        trainer: T5X's trainer, of which three methods are replaced.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._compile, self._train, self._close = (
            trainer.compile_train,
            trainer.train,
            trainer.close,
        )
        trainer.compile_train, trainer.train, trainer.close = self.compile, self.train, self.close
        self._state: Any = None  # after the last step that was dispatched to the devices
        self._open = contextlib.ExitStack()
        self._request = self._open.enter_context(preemption.stop_requests())

    def compile(self, batch: Mapping[str, Any]) -> None:
        """Compiles like T5X, and keeps the state after each step. T5X's loop sets the trainer's
        state only at its end."""
        self._compile(batch)
        step = self._trainer._compiled_train_step

        def step_and_keep(state: Any, batch: Any) -> tuple[Any, Any]:
            self._state, metrics = step(state, batch)
            return self._state, metrics

        self._trainer._compiled_train_step = step_and_keep

    def train(self, batch_iter: Any, num_steps: int, start_step: int | None = None) -> Any:
        """Trains `num_steps` steps like T5X, or fewer after a stop request.

        Raises:
            PreemptionError: T5X's error, after a stop request. The trainer's `train_state` is the
                state after the last step, which T5X saves.
        """
        first = int(self._trainer.train_state.step if start_step is None else start_step)
        try:
            summary = self._train(self._until_due(batch_iter, first), num_steps, first)
        except _Due as due:
            self._trainer.train_state = self._state
            self._stop(due.args[0])
        # T5X may save next. The step must be saved there or after this error, not twice.
        if self._request.is_due(first + num_steps):
            self._stop(first + num_steps)
        return summary

    def _until_due(self, batches: Any, first: int) -> Iterator[Any]:
        """Yields the batches of the steps after `first`. After a stop request it raises `_Due`, and
        takes no further batch, because T5X also saves the data position."""
        yield next(batches)
        step = first + 1
        while not self._request.is_due(step):
            yield next(batches)
            step += 1
        raise _Due(step)

    def _stop(self, step: int) -> NoReturn:
        code = self._request.exit_code
        logging.info("Signal %s: stopping after step %d.", self._request.signal, step)
        self._close()  # writes pending metrics, which T5X does not do after the error
        preempted = importlib.import_module("t5x.trainer").PreemptionError
        # T5X catches the first class, saves and raises again. Python takes the exit code from the
        # second. It is a class attribute, because gin makes another exception of the same class.
        raise type("Stopped", (preempted, SystemExit), {"code": code})(
            f"Stopped by signal {self._request.signal} after step {step}. Run the same command "
            "again to resume."
        )

    def close(self) -> None:
        """Closes T5X's trainer, and stops handling signals."""
        self._close()
        self._open.close()


def stoppable(trainer_cls: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a constructor of T5X trainers that stop on request, for `train.trainer_cls`.

    Args:
        trainer_cls: T5X's trainer class, with its gin fields bound.
    """

    def make(**arguments: Any) -> Any:
        trainer = trainer_cls(**arguments)
        _Listener(trainer)
        return trainer

    return make

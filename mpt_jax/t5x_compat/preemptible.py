"""Real T5X's trainer, stopped on request: SIGTERM and Ctrl-C save first, then exit.

T5X saves and goes when its trainer raises `PreemptionError`, but nothing in it raises one, and it
ends with a traceback. Here the trainer listens as this library's own does (`preemption`), asks
before every step whether to stop, and what it raises ends the process with that module's code.

    train_script.train.trainer_cls = @initializer.stoppable()
    initializer.stoppable.trainer_cls = @trainer.Trainer

Beside T5X's public names this reads one private one, `Trainer._compiled_train_step`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import logging

from mpt_jax.runtime import preemption


class _Due(Exception):
    """Ends T5X's loop over steps from inside its data."""


class _Listener:
    """Makes one T5X trainer stop on request.

    A process is asked after every step, with the step's number: JAX lets all processes of a job
    stop at one step only if each of them counts without a gap.

    Args:
        trainer: T5X's; three of its methods are replaced.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._compile, self._train, self._close = (
            trainer.compile_train,
            trainer.train,
            trainer.close,
        )
        trainer.compile_train, trainer.train, trainer.close = self.compile, self.train, self.close
        self._state: Any = None  # after the last step that was sent to the devices
        self._open = contextlib.ExitStack()
        self._request = self._open.enter_context(preemption.stop_requests())

    def compile(self, batch: Mapping[str, Any]) -> None:
        """T5X's, keeping each step's state: T5X's loop over steps shows it only at its end."""
        self._compile(batch)
        step = self._trainer._compiled_train_step

        def remembered(state: Any, batch: Any) -> tuple[Any, Any]:
            self._state, metrics = step(state, batch)
            return self._state, metrics

        self._trainer._compiled_train_step = remembered

    def train(self, batch_iter: Any, num_steps: int, start_step: int | None = None) -> Any:
        """T5X's: `num_steps` steps, or fewer where somebody asks to stop.

        Raises:
            PreemptionError: T5X's; the state of the last step is in `train_state` to be saved.
        """
        first = int(self._trainer.train_state.step if start_step is None else start_step)
        try:
            summary = self._train(self._until_due(batch_iter, first), num_steps, first)
        except _Due as due:
            self._trainer.train_state = self._state
            self._stop(due.args[0])
        # T5X saves next, perhaps: a step must be saved here or there, not twice.
        if self._request.is_due(first + num_steps):
            self._stop(first + num_steps)
        return summary

    def _until_due(self, batches: Any, first: int) -> Iterator[Any]:
        """The batches of steps from `first` on. Where the run must stop, the next one is not taken:
        T5X saves the data's position too."""
        yield next(batches)
        step = first + 1
        while not self._request.is_due(step):
            yield next(batches)
            step += 1
        raise _Due(step)

    def _stop(self, step: int) -> NoReturn:
        code = self._request.exit_code
        logging.info("Signal %s: stopping after step %d.", self._request.signal, step)
        self._close()  # writes metrics that wait; T5X itself does not, once this is raised
        preempted = importlib.import_module("t5x.trainer").PreemptionError
        # T5X catches the first, saves and raises it again; Python takes its exit code of the
        # second. A class attribute, because gin makes another exception of the same class.
        raise type("Stopped", (preempted, SystemExit), {"code": code})(
            f"stopped by a signal after step {step}"
        )

    def close(self) -> None:
        """T5X's, and listens no more."""
        self._close()
        self._open.close()


def stoppable(trainer_cls: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor of T5X trainers that stop on request, for `train.trainer_cls`.

    Args:
        trainer_cls: T5X's, with its gin fields bound.
    """

    def make(**arguments: Any) -> Any:
        trainer = trainer_cls(**arguments)
        _Listener(trainer)
        return trainer

    return make

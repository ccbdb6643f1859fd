"""Profiler trace of a few training steps, for TensorBoard, XProf and Perfetto."""

from __future__ import annotations

from typing import Any

import jax
from absl import logging

from mpt_jax.training.trainer import Trainer

# Steps before the trace. The first step and other lengths of batches compile in them. The default
# of clu's profiler is the same.
WARM_UP = 10


class StepTrace:
    """Traces a few steps of this process with `jax.profiler`, once.

    As a context manager, it ends and writes a running trace at the end of the block, also after an
    error. clu's periodic action leaves such a trace open, and continues if a trace cannot start.

    Args:
        model_dir: MODEL_DIR; the trace is below `plugins/profile` there.
        num_steps: the number of steps to trace; None traces nothing. Only process 0 traces.

    Raises:
        ValueError: `num_steps` is less than 1.
    """

    def __init__(self, model_dir: str, num_steps: int | None):
        if num_steps is not None and (isinstance(num_steps, bool) or num_steps < 1):
            raise ValueError(
                f"train.profile_steps must be a whole number of at least 1, got {num_steps!r}. "
                "Bind train_script.train.profile_steps = 5, or leave it out for no trace."
            )
        self._folder = model_dir
        self._num_steps = num_steps if jax.process_index() == 0 else None
        self._start: int | None = None  # the step to start at, known after the first step
        self._running = False

    def after_step(self, trainer: Trainer) -> None:
        """Starts or ends the trace if it is due. Call it after every step.

        Raises:
            JaxRuntimeError: the trace cannot be written.
        """
        if self._num_steps is None:
            return
        if self._start is None:
            self._start = trainer.step - 1 + WARM_UP
        if trainer.step == self._start:
            trainer.wait()  # keeps earlier steps out of the trace
            last = trainer.step + self._num_steps
            logging.info("Tracing steps %d to %d.", trainer.step + 1, last)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif trainer.step == self._start + self._num_steps:
            trainer.wait()  # the device is behind the host
            self._end()

    def _end(self) -> None:
        self._num_steps, self._running = None, False
        jax.profiler.stop_trace()
        logging.info("Wrote the trace to %s/plugins/profile.", self._folder.rstrip("/"))

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._running:
            self._end()
        elif self._num_steps is not None and kind is None:
            logging.warning(
                "No trace was written, because this start took at most %d steps, and these are not "
                "traced. Increase TRAIN_STEPS, or remove train.profile_steps.",
                WARM_UP,
            )

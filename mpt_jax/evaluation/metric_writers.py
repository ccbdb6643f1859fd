"""Metric writers, progress line and run record. Only process 0 writes."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from logging import StreamHandler
from typing import Any

import jax
from absl import logging
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.scalar import summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import mpt_jax
from mpt_jax.artifacts.provenance import git_revision, package_versions
from mpt_jax.runtime.files import write_atomic

METRICS = "metrics.jsonl"


class Writers:
    """Writer of scalars to TensorBoard files and to MODEL_DIR/metrics.jsonl. The TensorBoard files
    are below MODEL_DIR, in one folder for each kind of metric, as in T5X."""

    def __init__(self, model_dir: str):
        self._model_dir = epath.Path(model_dir)
        self._writers: dict[str, EventFileWriter] = {}
        self._lines: Any = None

    def write(self, folder: str, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars to `MODEL_DIR/<folder>/events*`, and as one line to metrics.jsonl."""
        if jax.process_index() != 0 or not scalars:
            return
        if self._lines is None:
            _mend(self._model_dir / METRICS)
            self._lines = (self._model_dir / METRICS).open("a")
        self._lines.write(json.dumps({"folder": folder, "step": step, **scalars}) + "\n")
        self._lines.flush()
        if folder not in self._writers:
            self._writers[folder] = EventFileWriter(str(self._model_dir / folder))
        self._writers[folder].add_event(_event(step, scalars))

    def close(self) -> None:
        """Waits until all scalars are written, and closes the files."""
        for writer in self._writers.values():
            writer.close()
        if self._lines is not None:
            self._lines.close()


class ProgressLine:
    """Progress of a job: a live bar on a terminal, log lines otherwise."""

    def __init__(self, total_steps: int, first_step: int, batch_size: int):
        self._total, self._batch = total_steps, batch_size
        self._mark = (first_step, time.monotonic())
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and jax.process_index() == 0:
            # A narrow terminal cuts the losses, never the count, the bar and the time.
            whole, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}", table_column=whole),
                BarColumn(bar_width=24, table_column=Column(min_width=12)),
                TimeRemainingColumn(table_column=whole.copy()),
                TextColumn("{task.description}", table_column=rest),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=total_steps, completed=first_step)
            self._bar.start()
            # Rich has replaced standard error, so that other lines appear above the bar.
            self._log_stream = _log_handler().setStream(sys.stderr)

    def restart_clock(self, step: int) -> None:
        """Restarts the clock at a step, so that compilation, evaluation and saving do not count."""
        self._mark = (step, time.monotonic())

    def update(self, step: int, found: Mapping[str, float]) -> dict[str, float]:
        """Shows the progress at a step, with its metrics `found`. Returns the speeds since the last
        update, for the metric writers."""
        last, since = self._mark
        seconds = max(time.monotonic() - since, 1e-9)
        steps = max(step - last, 1)
        # A packed row holds several examples, and a padding row holds none.
        examples = steps * self._batch * found.get("batch/examples_per_row", 1.0)
        speeds = {
            "timing/seconds_per_step": seconds / steps,
            "timing/examples_per_second": examples / seconds,
        }
        tasks = [
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in found.items()
            if name.startswith("loss/")
        ]
        shown = tasks if len(tasks) <= 8 else [*tasks[:8], f"and {len(tasks) - 8} more"]
        text = (
            f"loss {found.get('loss', float('nan')):.4f}  "
            f"{speeds['timing/seconds_per_step'] * 1e3:.0f} ms/step  "
            f"{speeds['timing/examples_per_second']:.0f} examples/s  {' | '.join(shown)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif jax.process_index() == 0:
            left = (self._total - step) * speeds["timing/seconds_per_step"]
            logging.info("step %d/%d  ETA %s  %s", step, self._total, _clock(left), text)
        self.restart_clock(step)
        return speeds

    def close(self) -> None:
        """Restores the terminal."""
        if self._bar is not None:
            _log_handler().setStream(self._log_stream)
            self._bar.stop()


def write_run_record(model_dir: str, facts: Mapping[str, Any]) -> None:
    """Appends a line to MODEL_DIR/run.jsonl, which has one line for each start of the job.

    Args:
        model_dir: MODEL_DIR.
        facts: JSON values to record in addition, such as seeds, counts and digests.
    """
    if jax.process_index() != 0:
        return
    devices = jax.devices()
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "mpt_jax": mpt_jax.__version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "devices": [f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"],
        "processes": jax.process_count(),
        **facts,
    }
    path = epath.Path(model_dir) / "run.jsonl"
    before = path.read_text() if path.exists() else ""
    write_atomic(path, before + json.dumps(record) + "\n")


def _event(step: int, scalars: Mapping[str, float]) -> event_pb2.Event:
    """Returns the scalars of a step as TensorFlow's `tf.summary.scalar` writes them."""
    summary = summary_pb2.Summary()
    for name, value in scalars.items():
        summary.MergeFrom(summary_v2.scalar_pb(name, value))
    return event_pb2.Event(wall_time=time.time(), step=step, summary=summary)


def _mend(path: epath.Path) -> None:
    """Removes the incomplete last line that a killed job may have left."""
    content = path.read_text() if path.exists() else ""
    whole, newline, rest = content.rpartition("\n")
    if rest:
        write_atomic(path, whole + newline)


def describe_counts(trainable: int, total: int, labels: Sequence[str]) -> str:
    """Returns the log line with the number of trainable parameters, for the start of a job."""
    return (
        f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.3%}; labels: "
        f"{', '.join(sorted(labels))})."
    )


def _log_handler() -> StreamHandler:
    return logging.get_absl_handler().python_handler


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

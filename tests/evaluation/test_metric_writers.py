"""Metric writers (TensorBoard and metrics.jsonl), progress line and run record."""

import io
import json
import re
import subprocess

import pytest
from absl import logging
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import mpt_jax
from mpt_jax.evaluation import metric_writers


def test_writers_write_scalars_to_tensorboard_and_jsonl(tmp_path):
    writers = metric_writers.Writers(str(tmp_path))
    writers.write("train", 5, {"loss": 0.5, "loss/rte": 0.25})
    writers.write("train", 10, {"loss": 0.4})
    writers.write("training_eval/rte", 10, {"loss": 0.75})
    writers.write("train", 15, {})
    writers.close()
    lines = [
        json.loads(line) for line in (tmp_path / metric_writers.METRICS).read_text().splitlines()
    ]
    assert lines == [
        {"folder": "train", "step": 5, "loss": 0.5, "loss/rte": 0.25},
        {"folder": "train", "step": 10, "loss": 0.4},
        {"folder": "training_eval/rte", "step": 10, "loss": 0.75},
    ]
    for folder, expected in (("train", [(5, 0.5), (10, 0.4)]), ("training_eval/rte", [(10, 0.75)])):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        found = [
            (event.step, round(float(tensor_util.make_ndarray(event.tensor_proto)), 6))
            for event in events.Tensors("loss")
        ]
        assert found == expected


def test_writers_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / metric_writers.METRICS
    path.write_text('{"folder": "train", "step": 5}\n{"folder": "tra')
    writers = metric_writers.Writers(str(tmp_path))
    writers.write("train", 10, {"loss": 0.4})
    writers.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]
    path.write_text("half")
    writers = metric_writers.Writers(str(tmp_path))
    writers.write("train", 5, {"loss": 0.4})
    writers.close()
    assert json.loads(path.read_text())["step"] == 5


def test_progress_line_without_terminal_logs_text(monkeypatch, caplog):
    clock = iter([100.0, 100.0, 104.0, 104.0, 105.0, 105.0])
    monkeypatch.setattr(metric_writers.time, "monotonic", lambda: next(clock))
    line = metric_writers.ProgressLine(total_steps=1000, first_step=0, batch_size=32)
    line.restart_clock(0)
    others = {"accuracy/rte": 0.9, "attention/mnli/rte": 0.3, "attention_entropy/rte": 1.1}
    with caplog.at_level("INFO", logger="absl"):
        speeds = line.update(40, {"loss": 0.5, "loss/rte": 0.25, **others})
        line.update(50, {"loss": 0.5} | {f"loss/t{i}": 1.0 for i in range(10)})
    line.close()
    assert speeds == {"timing/seconds_per_step": 0.1, "timing/examples_per_second": 320.0}
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "step 40/1000  ETA 0:01:36  loss 0.5000  100 ms/step  320 examples/s  rte 0.250"
    )
    assert second.endswith("t7 1.000 | and 2 more"), "a line shows at most eight tasks"


def test_progress_bar_keeps_log_lines_apart_and_fits_the_terminal(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(metric_writers, "Console", lambda stderr: console)
    handler = logging.get_absl_handler().python_handler
    before = handler.stream
    line = metric_writers.ProgressLine(total_steps=300, first_step=0, batch_size=32)
    try:
        line.update(100, {"loss": 0.5} | {f"loss/a_long_task_name_{i}": 1.0 for i in range(9)})
        handler.stream.write("12:00:00 a log line\n")
    finally:
        line.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")
    assert "12:00:00 a log line" in [text.strip() for text in shown]
    (bar,) = {text for text in shown if text.startswith("100/300 ━")}
    assert "loss 0.5" in bar and len(bar) <= 80
    assert handler.stream is before


def test_run_record_has_one_line_per_start(tmp_path):
    metric_writers.write_run_record(str(tmp_path), {"seed": 7, "trainable_parameters": 12})
    metric_writers.write_run_record(str(tmp_path), {"seed": 8})
    first, second = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert (first["seed"], second["seed"], first["trainable_parameters"]) == (7, 8, 12)
    assert first["mpt_jax"] == mpt_jax.__version__
    import jax

    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"] == ["1 x cpu (cpu)"] and first["processes"] == 1
    assert re.match(r"\d{4}-\d\d-\d\dT", first["started"])


def test_git_revision_marks_uncommitted_changes(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    package = tmp_path / "mpt_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(metric_writers.mpt_jax, "__file__", str(package / "__init__.py"))
    assert metric_writers.git_revision() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert metric_writers.git_revision() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = 1\n")
    assert metric_writers.git_revision() == git("rev-parse", "HEAD") + "+changes"


@pytest.mark.parametrize(("seconds", "text"), [(59.9, "0:00:59"), (3661.0, "1:01:01")])
def test_clock_formats_hours_minutes_seconds(seconds, text):
    assert metric_writers._clock(seconds) == text


def test_describe_counts_prints_full_numbers():
    text = metric_writers.describe_counts(77_668, 222_981_316, ["task", "shared"])
    assert text == "Trainable parameters: 77,668 of 222,981,316 (0.035%; labels: shared, task)."

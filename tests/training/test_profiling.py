"""Profiler traces of training: which steps they hold, and when they are written."""

from __future__ import annotations

import gzip
import json
from unittest import mock

import jax
import pytest

from mpt_jax.checkpointing.checkpoint_config import SaveCheckpointConfig
from mpt_jax.training.profiling import WARM_UP, StepTrace
from mpt_jax.training.trainer import Trainer
from tests.fixtures.training_runs import run


def traced_steps(model_dir) -> list[int]:
    """Returns the numbers of the annotated steps in the only trace of a MODEL_DIR."""
    assert len(list(model_dir.glob("plugins/profile/*/*.xplane.pb"))) == 1
    (path,) = model_dir.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")


def train(backbone, model_dir, steps, **settings):
    run(backbone, model_dir, steps=steps, save=SaveCheckpointConfig(100), **settings)


def test_train_profile_steps_traces_those_after_warm_up(backbone, tmp_path):
    train(backbone, tmp_path, WARM_UP + 4, profile_steps=2)
    assert traced_steps(tmp_path) == [WARM_UP, WARM_UP + 1]


def test_train_that_ends_early_still_writes_its_trace(backbone, tmp_path):
    train(backbone, tmp_path, WARM_UP + 3, profile_steps=50)
    assert traced_steps(tmp_path) == [WARM_UP, WARM_UP + 1, WARM_UP + 2]


def test_train_without_profile_steps_writes_no_trace(backbone, tmp_path):
    train(backbone, tmp_path, 3)
    assert (tmp_path / "artifact").exists() and not (tmp_path / "plugins").exists()


def test_train_shorter_than_warm_up_warns(backbone, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        train(backbone, tmp_path, 3, profile_steps=2)
    assert "No trace was written, because this start took at most 10 steps" in caplog.text
    assert not (tmp_path / "plugins").exists()


@pytest.mark.parametrize("value", [0, -3, True])
def test_train_invalid_profile_steps_error_before_model_dir_is_made(backbone, tmp_path, value):
    with pytest.raises(ValueError, match=f"at least 1, got {value}"):
        train(backbone, tmp_path / "run", 3, profile_steps=value)
    assert not (tmp_path / "run").exists()


def take_steps(trace: StepTrace, number: int) -> None:
    for step in range(1, number + 1):
        trace.after_step(mock.Mock(spec=Trainer, step=step))


def test_step_trace_error_in_training_still_writes_the_trace(tmp_path):
    with pytest.raises(FloatingPointError), StepTrace(str(tmp_path), 50) as trace:
        take_steps(trace, WARM_UP + 1)
        raise FloatingPointError("a step")
    assert traced_steps(tmp_path) == []  # nothing was annotated, and the file is there
    jax.profiler.start_trace(str(tmp_path / "next"))  # would raise if the first had not ended
    jax.profiler.stop_trace()


def test_step_trace_only_process_0_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with StepTrace(str(tmp_path), 1) as trace:
        take_steps(trace, WARM_UP + 2)
    assert not list(tmp_path.iterdir())

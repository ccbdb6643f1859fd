"""Stop requests with a stand-in for T5X's trainer; test_real_t5x.py tests the real one."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import types
from pathlib import Path

import pytest

from mpt_jax.runtime import preemption
from mpt_jax.t5x_compat import preemptible
from tests.fixtures.processes import run_python
from tests.fixtures.t5x_trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def preempted(monkeypatch):
    """T5X's exception, in the module where T5X defines it."""
    module = types.ModuleType("t5x.trainer")
    module.PreemptionError = type("PreemptionError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "t5x.trainer", module)
    return module.PreemptionError


def made(actions=None) -> Trainer:
    trainer = preemptible.stoppable(Trainer)(actions=actions)
    trainer.compile_train({})
    return trainer


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_stoppable_without_signal_trains_like_t5x():
    trainer, batches = made(), iter(range(10, 20))
    assert trainer.train(batches, 3, start_step=0) == [10, 11, 12]
    assert trainer.train(batches, 2, start_step=3) == [13, 14]
    assert trainer.train_state.step == 5 and next(batches) == 15
    trainer.close()
    assert trainer.closed == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("during", "step"), [(10, 1), (12, 3), (14, 5)])
def test_stoppable_signal_stops_after_step_without_losing_a_batch(
    during, step, number, code, preempted
):
    trainer, batches = made({during: send(number)}), iter(range(10, 20))
    with pytest.raises(preempted) as caught:
        trainer.train(batches, 5, start_step=0)
    assert isinstance(caught.value, SystemExit) and caught.value.code == code
    assert trainer.train_state.step == step and trainer.closed == 1
    assert next(batches) == 10 + step
    trainer.close()


def test_stoppable_signal_between_loops_stops_after_next_step(preempted):
    """The step before may have been saved already, and T5X cannot save a step twice."""
    trainer, batches = made(), iter(range(10, 20))
    trainer.train(batches, 3, start_step=0)
    send(signal.SIGTERM)()
    with pytest.raises(preempted):
        trainer.train(batches, 3, start_step=3)
    assert trainer.train_state.step == 4
    trainer.close()


def test_stoppable_checks_for_stop_once_per_step(monkeypatch, preempted):
    asked = []

    def is_due(request, step):
        asked.append(step)
        return step == 7

    monkeypatch.setattr(preemption.StopRequest, "is_due", is_due)
    trainer, batches = made(), iter(range(10, 30))
    trainer.train(batches, 3, start_step=0)
    with pytest.raises(preempted):
        trainer.train(batches, 6, start_step=3)
    assert asked == [1, 2, 3, 4, 5, 6, 7] and trainer.train_state.step == 7
    trainer.close()


def test_stoppable_exit_code_survives_gin_and_absl(tmp_path):
    """Like T5X, catches the exception and raises it again, through gin and absl."""
    script = f"""
        import os, signal, sys, types
        sys.path.insert(0, {str(ROOT)!r})
        from absl import app
        import gin
        from mpt_jax.t5x_compat import preemptible as t5x_trainer
        from tests.fixtures.t5x_trainer import Trainer
        sys.modules["t5x.trainer"] = t5x = types.ModuleType("t5x.trainer")
        class PreemptionError(Exception): pass
        t5x.PreemptionError = PreemptionError
        @gin.configurable
        def train():
            trainer = t5x_trainer.stoppable(Trainer)()
            trainer.compile_train(dict())
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                trainer.train(iter(range(9)), 5, 0)
            except PreemptionError as error:
                print("saved", trainer.train_state.step, flush=True)
                raise error
        app.run(lambda argv: train())
    """
    child = run_python("-c", textwrap.dedent(script), cwd=tmp_path, check=False)
    assert (child.returncode, child.stdout) == (75, "saved 1\n"), child.stderr
    assert "Traceback" not in child.stderr

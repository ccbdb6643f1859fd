"""A run that is killed, again and again, ends with the very prompts of one that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import assert_same_bits, backbone, prompts  # noqa: F401 - a fixture

STEPS, KILLS = 200, 3
CHILD = """
import sys
from mpt_jax import checkpoints
from tests import test_train as t
t.register_all()
save = checkpoints.SaveCheckpointConfig(period=5)
t.run(sys.argv[1], sys.argv[2], steps={steps}, save=save, eval_period={steps})
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(backbone, tmp_path):  # noqa: F811
    command = [sys.executable, "-c", CHILD.format(steps=STEPS), backbone]
    start = lambda folder: subprocess.Popen(  # noqa: E731
        [*command, str(tmp_path / folder)], cwd=Path(__file__).parents[1]
    )
    assert start("whole").wait() == 0
    kills, rng = 0, random.Random(0)
    for _ in range(4 * KILLS):
        child, seen = start("killed"), set((tmp_path / "killed").glob("checkpoint_*"))
        while child.poll() is None and kills < KILLS:
            if len(set((tmp_path / "killed").glob("checkpoint_*")) - seen) >= 1:
                time.sleep(rng.random() * 0.5)  # anywhere: between saves or in the middle of one
                child.send_signal(signal.SIGKILL)
                kills += child.wait() == -signal.SIGKILL
        if child.wait() == 0:
            break
    assert kills == KILLS
    assert_same_bits(prompts(tmp_path / "whole"), prompts(tmp_path / "killed"))

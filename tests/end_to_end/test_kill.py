"""A run that is killed repeatedly ends with the same prompts, bit for bit, as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.training_runs import assert_same_bits, prompts

STEPS, KILLS = 100, 3
STAGE = (
    "--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin",
    f"--gin.TRAIN_STEPS={STEPS}", f"--gin.EVAL_PERIOD={STEPS}", "--gin.SAVE_PERIOD=5",
    "--gin.EVAL_STEPS=1", "--gin.EVALUATOR_NUM_EXAMPLES=8",
)  # fmt: skip


def start(root: Path) -> subprocess.Popen:
    environment = os.environ | {"MPT_JAX_ROOT": str(root)}
    command = [sys.executable, "-m", "mpt_jax.train", *STAGE]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)


def model_dir(root: Path) -> Path:
    return root / "tiny" / "mpt_source"


@pytest.mark.slow
def test_train_killed_repeatedly_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    kills, rng = 0, random.Random(0)
    for _ in range(4 * KILLS):
        child, seen = start(killed), set(model_dir(killed).glob("checkpoint_*"))
        while child.poll() is None and kills < KILLS:
            if set(model_dir(killed).glob("checkpoint_*")) - seen:
                time.sleep(rng.random())  # anywhere: between saves or in the middle of one
                child.send_signal(signal.SIGKILL)
                kills += child.wait() == -signal.SIGKILL
        if child.wait() == 0:
            break
    assert kills == KILLS
    assert_same_bits(prompts(model_dir(whole)), prompts(model_dir(killed)))

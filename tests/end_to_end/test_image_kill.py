"""An image job with augmentation that is killed ends with the same prompts as one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures import image_jobs
from tests.fixtures.training_runs import assert_same_bits, prompts

STEPS, KILLS = 200, 2


def start(clip: Path, root: Path) -> subprocess.Popen:
    given = image_jobs.bindings(
        clip,
        root,
        ["job_pets", "job_tags"],
        TRAIN_STEPS=STEPS,
        EVAL_PERIOD=STEPS,
        SAVE_PERIOD=5,
        STEPS_PER_EPOCH=10,
        IMAGE_TOKENS=2,
        AUGMENTATION="@image_transforms.Augmentation()",
    )
    flags = [f"--gin.{binding.replace(' = ', '=', 1)}" for binding in given]
    command = [sys.executable, "-m", "mpt_jax.train", "--gin_file=gin/vpt_target.gin", *flags]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ})


@pytest.mark.slow
def test_killed_vpt_job_same_bits(tmp_path):
    clip = image_jobs.write_clip(tmp_path / "clip")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(clip, whole).wait() == 0
    folder = killed / "vpt_target"
    kills = 0
    for _ in range(KILLS + 1):
        child, seen = start(clip, killed), set(folder.glob("checkpoint_*"))
        while kills < KILLS and child.poll() is None:
            if set(folder.glob("checkpoint_*")) - seen:
                child.send_signal(signal.SIGKILL)
                kills += child.wait() == -signal.SIGKILL
            time.sleep(0.01)
        if child.wait() == 0:
            break
    assert kills == KILLS
    assert_same_bits(prompts(whole / "vpt_target"), prompts(folder))

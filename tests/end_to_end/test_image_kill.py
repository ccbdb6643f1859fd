"""An image job of any stage that is killed ends with the same prompts as one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fixtures import image_jobs, lane_jobs
from tests.fixtures.training_runs import assert_same_bits, prompts

pytestmark = pytest.mark.slow

KILLS = 2
AUGMENTED = {"AUGMENTATION": "@image_transforms.Augmentation()"}
TOKENS = {"CONTEXT_LENGTH": 2, "IMAGE_TOKENS": 2, **AUGMENTED}
UNIFIED = {**TOKENS, "MIXER_WIDTH": 8}
TWO_SHOTS = {"SHOTS": [2], "SEEDS": [1]}
STUDENT = {**TWO_SHOTS, "DISTILL_FROM": "zero_shot"}  # needs no teachers
BOTH = {**TOKENS, **TWO_SHOTS}
PAIR = ["job_pets", "job_tags"]


class Stage(NamedTuple):
    """A stage that is killed.

    Attributes:
        file: the name of its gin file.
        settings: its macros besides the tasks.
        folder: its folder below ROOT, if it has another name than the file.
        before: the stage that it needs, with the macros that this has in addition.
    """

    file: str
    settings: dict[str, Any]
    folder: str = ""
    before: tuple[str, dict[str, Any]] | None = None


STAGES = {
    "vpt_target": Stage("vpt_target", {"IMAGE_TOKENS": 2, **AUGMENTED}),
    "coop_target": Stage("coop_target", {"CONTEXT_LENGTH": 2, **AUGMENTED}),
    "linear_probe": Stage("linear_probe", {}),
    # Two draws, each with one prompt for both tasks; each step has examples drawn from them.
    "mvlpt_source": Stage("mvlpt_source", {**BOTH, "SEEDS": [1, 2], "MIXER_WIDTH": 8}),
    "mvlpt_target": Stage("mvlpt_target", UNIFIED, before=("mvlpt_source", TWO_SHOTS)),
    "clip_pt_source": Stage("clip_pt_source", BOTH),
    "clip_mpt_source": Stage("clip_mpt_source", BOTH, before=("clip_pt_source", {})),
    "clip_mpt_target": Stage("clip_mpt_target", TOKENS, before=("clip_mpt_source", STUDENT)),
    # The second lane trains beside the first, which is held.
    "multilane": Stage("multilane", {"STEP": 2}, "multilane_2", ("multilane", {"STEP": 1})),
}


def start(clip: Path, root: Path, file: str, steps: int, **settings: Any) -> subprocess.Popen:
    lengths = {"TRAIN_STEPS": steps, "EVAL_PERIOD": steps, "SAVE_PERIOD": 5}
    if file == "multilane":
        given = lane_jobs.bindings(clip, root, **lengths, **settings)
    else:
        given = image_jobs.bindings(clip, root, PAIR, **lengths, STEPS_PER_EPOCH=10, **settings)
    if file.endswith("source"):
        given = [x.replace("TARGET_TASKS", "SOURCE_TASKS") for x in given]
    flags = [f"--gin.{binding.replace(' = ', '=', 1)}" for binding in given]
    command = [sys.executable, "-m", "mpt_jax.train", f"--gin_file=gin/{file}.gin", *flags]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ})


@pytest.mark.parametrize("name", STAGES)
def test_killed_image_job_same_bits(name, tmp_path):
    stage = STAGES[name]
    clip = image_jobs.write_clip(tmp_path / "clip")
    roots = whole, killed = tmp_path / "whole", tmp_path / "killed"
    if stage.before is not None:
        file, own = stage.before
        assert start(clip, whole, file, 10, **{**stage.settings, **own}).wait() == 0
        killed.mkdir()
        (made,) = whole.iterdir()
        (killed / made.name).symlink_to(made)

    def job(root: Path) -> subprocess.Popen:
        return start(clip, root, stage.file, 100, **stage.settings)

    assert job(whole).wait() == 0
    folder = killed / (stage.folder or stage.file)
    kills = 0
    for _ in range(KILLS + 1):
        child, seen = job(killed), set(folder.glob("checkpoint_*"))
        while kills < KILLS and child.poll() is None:
            if set(folder.glob("checkpoint_*")) - seen:
                child.send_signal(signal.SIGKILL)
                kills += child.wait() == -signal.SIGKILL
            time.sleep(0.01)
        if child.wait() == 0:
            break
    assert kills == KILLS
    one, other = (prompts(root / folder.name) for root in roots)
    assert_same_bits(one, other)

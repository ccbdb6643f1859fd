"""Whole jobs: a prompt is trained on base classes, and evaluated on the new classes of the task."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_jax.runtime import paths
from tests.fixtures.image_jobs import bindings, run_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cleared_gin")]

BASE, NEW = "toy_tint_base_k5_per_class_s1", "toy_tint_new"
TRAINING = ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "SAVE_PERIOD", "STATS_PERIOD")
TOY = {"TASK_MODULES": ["mpt_jax.tasks.toy_image_tasks"]}


def given(root, task, **macros):
    return bindings(Path(paths.shipped(name="tiny_clip")), root, [task], **TOY, **macros)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("coop", {"CONTEXT_LENGTH": 4}),
        ("vpt", {"IMAGE_TOKENS": 4}),
        ("upt", {"CONTEXT_LENGTH": 4, "IMAGE_TOKENS": 4, "MIXER_WIDTH": 8}),
        ("cocoop", {"CONTEXT_LENGTH": 4, "CONTEXT_INIT": "@init.Normal()"}),
        ("clip_mpt", {"CONTEXT_LENGTH": 4, "IMAGE_TOKENS": 4}),
    ],
)
def test_prompts_of_base_classes_score_new_classes(tmp_path, method, own):
    stage = "vpt_target" if method == "vpt" else "coop_target"
    files = [stage] if method in ("vpt", "coop") else [stage, f"methods/{method}"]
    train = given(tmp_path, BASE, **own, STEPS_PER_EPOCH=1, LEARNING_RATE=0.02)
    scores = run_job(files, train)
    assert list(scores) == [BASE]
    artifact = str(tmp_path / stage / "artifact")
    read = given(tmp_path, NEW, **own, INITIAL_ARTIFACT=artifact, START_FROM={NEW: BASE})
    read = [x for x in read if x.split(" = ")[0] not in TRAINING]
    found = run_job(["eval", "models/prompted_clip", f"methods/{method}"], read, "eval")
    assert list(found[0]) == [NEW] and 0 <= found[0][NEW]["accuracy"] <= 100

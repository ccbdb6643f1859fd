"""Every image stage under the real T5X: trained, evaluated and saved as by this library's trainer.

See test_real_t5x.py for how to run these tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.tree import flatten
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import real_t5x
from tests.fixtures.real_t5x import run

pytestmark = real_t5x.NEEDED

CLIP = real_t5x.ROOT / "mpt_jax" / "tasks" / "data" / "tiny_clip"
STEPS = 3
LENGTHS = (
    f"--gin.TRAIN_STEPS={STEPS}",
    f"--gin.EVAL_PERIOD={STEPS}",
    f"--gin.SAVE_PERIOD={STEPS}",
    "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=64",
    "--gin.train.actions={}",  # T5X's artifact is the last step's, ours the best one's
)
ONE = ("--gin.TRAIN_STEPS=1", "--gin.SAVE_PERIOD=1", *real_t5x.NO_EVALUATION)
AUGMENTED = "--gin.AUGMENTATION=@image_transforms.Augmentation()"
FLEET = ("--gin.SOURCE_TASKS=['toy_shape','toy_color']", "--gin.SHOTS=[2]", "--gin.SEEDS=[1]")
TARGET = ("--gin.LEARNING_RATE=0.05", "--gin.STEPS_PER_EPOCH=1")  # the first epoch warms up
SOURCE = (*TARGET, *FLEET)
LANES = ("--gin.LEARNING_RATE=0.02",)
# Stage -> its file, its settings, and the stage whose artifact it reads, by the name of the macro.
STAGES = {
    "coop_target": ("coop_target", (*TARGET, AUGMENTED), {}),
    "vpt_target": ("vpt_target", (*TARGET, AUGMENTED), {}),
    "mvlpt_source": ("mvlpt_source", (*SOURCE, "--gin.SEEDS=[1,2]"), {}),
    "mvlpt_target": ("mvlpt_target", TARGET, {"INITIAL_ARTIFACT": "mvlpt_source"}),
    "clip_pt_source": ("clip_pt_source", SOURCE, {}),
    "clip_mpt_source": ("clip_mpt_source", SOURCE, {"TEACHERS": "clip_pt_source"}),
    "clip_mpt_target": ("clip_mpt_target", TARGET, {"INITIAL_ARTIFACT": "clip_mpt_source"}),
    "multilane_1": ("multilane", (*LANES, "--gin.STEP=1"), {}),
    "multilane_2": ("multilane", (*LANES, "--gin.STEP=2"), {"INITIAL_ARTIFACT": "multilane_1"}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A ROOT for the outputs of all stages."""
    folder = tmp_path_factory.mktemp("images") / "tiny"
    folder.mkdir()
    return folder


def train(root: Path, stage: str, folder: Path, *more: str, trainer: str = "own") -> None:
    file, settings, reads = STAGES[stage]
    given = [f"--gin_file=gin/{file}.gin", "--gin_file=gin/tiny_vision.gin", "--gin.BATCH_SIZE=8"]
    given += settings
    for macro, other in reads.items():
        given.append(f"--gin.{macro}='{started(root, other) / 'artifact'}'")
    run("train", *given, *more, f"--gin.MODEL_DIR='{folder}'", root=root.parent, trainer=trainer)


def started(root: Path, stage: str) -> Path:
    """The MODEL_DIR of a stage after one step of this library's trainer, since the two trainers
    would draw different initial values."""
    folder = root / f"{stage}_first"
    if not (folder / "artifact").exists():
        train(root, stage, folder, *ONE)
    return folder


def scores(folder: Path, names: Sequence[str], trainer: str) -> dict[str, dict[str, float]]:
    """Returns the metrics of each run at the last step."""
    found = {}
    for name in names:
        if trainer == "t5x":
            path = folder / "inference_eval" / f"{name}-metrics.jsonl"
            line = json.loads(path.read_text().splitlines()[-1])
            assert line.pop("step") == STEPS
            found[name] = line
        else:
            recorded = artifacts.load_artifact(folder / "artifact").config["metrics"]["scores"]
            found[name] = recorded[name]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_both_trainers_image_stage_same_prompts_and_scores(stage, root):
    """Images are decoded, augmented and classified by the same code; the artifact of T5X serves."""
    start = started(root, stage)
    again = (*LENGTHS, f"--gin.INITIAL_ARTIFACT='{start / 'artifact'}'", "--gin.START_FROM='same'")
    folders = {trainer: root / f"{stage}_{trainer}" for trainer in ("own", "t5x")}
    for trainer, folder in folders.items():
        train(root, stage, folder, *again, trainer=trainer)
    first, own, theirs = (
        artifacts.load_artifact(x / "artifact") for x in (start, *folders.values())
    )
    assert own.config["step"] == theirs.config["step"] == STEPS
    assert own.runs == theirs.runs and own.config["images"] == theirs.config["images"]
    values, old = flatten(theirs.params), flatten(first.params)
    assert set(values) == set(flatten(own.params))
    for leaf, value in flatten(own.params).items():
        np.testing.assert_allclose(values[leaf], value, rtol=0, atol=1e-5, err_msg=leaf)
        # A softmax over keys does not change with their bias.
        moved = np.abs(value - old[leaf]).max() > 1e-4
        assert moved or leaf.endswith("key/bias"), f"{leaf} did not move"
    names = own.runs.run_names
    ours, found = (scores(folders[x], names, x) for x in ("own", "t5x"))
    for name in names:
        assert found[name] == {key: pytest.approx(x, abs=1e-3) for key, x in ours[name].items()}
    assert ImageServer.load([theirs.path], str(CLIP)).names == names

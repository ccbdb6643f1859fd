"""Every image stage under the real T5X: trained, evaluated, saved and resumed as by this library's
trainer, then served and exported.

See test_real_t5x.py for how to run these tests.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.tree import flatten
from mpt_jax.serving import export
from mpt_jax.serving.export.images import write_images
from mpt_jax.serving.export.writing import Settings
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import real_t5x
from tests.fixtures.image_files import encoded
from tests.fixtures.real_t5x import run
from tests.fixtures.training_runs import assert_same_bits

pytestmark = real_t5x.NEEDED

CLIP = real_t5x.ROOT / "mpt_jax" / "tasks" / "data" / "tiny_clip"
STEPS = 3
LENGTHS = (
    f"--gin.TRAIN_STEPS={STEPS}",
    f"--gin.EVAL_PERIOD={STEPS}",
    "--gin.SAVE_PERIOD=1",
    "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=64",
    "--gin.train.actions={}",  # T5X's artifact is the last step's, ours the best one's
)
ONE = ("--gin.TRAIN_STEPS=1", "--gin.SAVE_PERIOD=1", *real_t5x.NO_EVALUATION)
AUGMENTED = "--gin.AUGMENTATION=@image_transforms.Augmentation()"
FLEET = ("--gin.SOURCE_TASKS=['toy_shape','toy_color']", "--gin.SHOTS=[2]", "--gin.SEEDS=[1]")
TARGET = ("--gin.LEARNING_RATE=0.05", "--gin.STEPS_PER_EPOCH=1")  # the first epoch warms up
SOURCE = (*TARGET, *FLEET)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
LANES = ("--gin.LEARNING_RATE=0.02",)
# Stage -> its file, its settings, and the stage whose artifact it reads, by the name of the macro.
STAGES = {
    "coop_target": ("coop_target", (*TARGET, AUGMENTED), {}),
    "vpt_target": ("vpt_target", (*TARGET, AUGMENTED), {}),
    "linear_probe": ("linear_probe", TARGET, {}),
    "mvlpt_source": ("mvlpt_source", (*SOURCE, "--gin.SEEDS=[1,2]"), {}),
    "mvlpt_target": ("mvlpt_target", TARGET, {"INITIAL_ARTIFACT": "mvlpt_source"}),
    "clip_pt_source": ("clip_pt_source", SOURCE, {}),
    "clip_mpt_source": ("clip_mpt_source", SOURCE, {"TEACHERS": "clip_pt_source"}),
    "clip_mpt_target": ("clip_mpt_target", TARGET, {"INITIAL_ARTIFACT": "clip_mpt_source"}),
    "multilane_1": ("multilane", (*LANES, "--gin.STEP=1"), {}),
    "multilane_2": ("multilane", (*LANES, "--gin.STEP=2"), {"INITIAL_ARTIFACT": "multilane_1"}),
}
HEADS = "linear_probe"  # the only stage whose artifact servers do not run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A ROOT for the outputs of all stages."""
    folder = tmp_path_factory.mktemp("images") / "tiny"
    folder.mkdir()
    return folder


def train(root: Path, stage: str, folder: Path, *more: str, trainer: str = "own") -> str:
    file, settings, reads = STAGES[stage]
    given = [f"--gin_file=gin/{file}.gin", "--gin_file=gin/tiny_vision.gin", "--gin.BATCH_SIZE=8"]
    given += settings
    for macro, other in reads.items():
        given.append(f"--gin.{macro}='{started(root, other) / 'artifact'}'")
    return run(
        "train", *given, *more, f"--gin.MODEL_DIR='{folder}'", root=root.parent, trainer=trainer
    )


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


def stage_arguments(root: Path, stage: str) -> tuple[str, ...]:
    """Returns the settings of a stage that starts from `started`."""
    own_rows = () if stage == HEADS else ("--gin.START_FROM='same'",)  # heads never start elsewhere
    return (*LENGTHS, f"--gin.INITIAL_ARTIFACT='{started(root, stage) / 'artifact'}'", *own_rows)


def trained(root: Path, stage: str, trainer: str) -> Path:
    """The MODEL_DIR of a whole stage."""
    folder = root / f"{stage}_{trainer}"
    if not (folder / "artifact").exists():
        train(root, stage, folder, *stage_arguments(root, stage), trainer=trainer)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_both_trainers_image_stage_same_prompts_and_scores(stage, root):
    """Images are decoded, augmented and classified by the same code; the artifact of T5X serves."""
    folders = {trainer: trained(root, stage, trainer) for trainer in ("own", "t5x")}
    first, own, theirs = (
        artifacts.load_artifact(x / "artifact") for x in (started(root, stage), *folders.values())
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


@pytest.mark.parametrize("stage", STAGES)
def test_t5x_image_stage_that_lost_its_last_step_same_bits(stage, root, tmp_path):
    whole = trained(root, stage, "t5x")
    lost = shutil.ignore_patterns(f"checkpoint_{STEPS}", "artifact")
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed", ignore=lost))
    assert [x.name for x in resumed.glob("checkpoint_*")] == [f"checkpoint_{STEPS - 1}"]
    log = train(
        root, stage, resumed, *stage_arguments(root, stage), *real_t5x.NO_EVALUATION, trainer="t5x"
    )
    assert f"Starting main loop over steps {STEPS - 1}-{STEPS}" in log
    once, twice = (artifacts.load_artifact(x / "artifact") for x in (whole, resumed))
    assert twice.config["step"] == STEPS
    assert_same_bits(flatten(once.params), flatten(twice.params))


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {HEADS}))
def test_prompts_of_t5x_image_stage_are_served_and_exported(stage, root, tmp_path):
    artifact = trained(root, stage, "t5x") / "artifact"
    server = ImageServer.load([str(artifact)], str(CLIP), batch_size=2)
    assert server.names == artifacts.load_artifact(artifact).runs.run_names
    content = base64.b64encode(encoded(PIXELS, "PNG")).decode()
    line = json.dumps({"task": server.names[-1], "image_base64": content})
    request: Any = server.reader("score").read(line.encode(), 1)
    (answer,) = server.answer([request])
    write_images(tmp_path / "exported", server, Settings(("cpu",)))
    exported = export.load(tmp_path / "exported")
    last = len(server.names) - 1
    lone = np.asarray(exported.score_images(request.image[None], [last]))[0]
    answered = list(answer["scores"].values())
    np.testing.assert_allclose(lone[: len(answered)], answered, atol=2e-5)


def test_both_trainers_same_predictions_of_a_linear_probe(root):
    folder = trained(root, HEADS, "t5x")
    names = ("infer", "models/clip_classifier", "methods/linear_probe", "tiny_vision")
    files = [f"--gin_file=gin/{name}.gin" for name in names]
    origins = {
        "t5x": (f"--gin.CHECKPOINT_PATH='{folder / f'checkpoint_{STEPS}'}'",),
        "own": (f"--gin.INITIAL_ARTIFACT='{folder / 'artifact'}'",),
    }
    lines = {}
    for trainer, origin in origins.items():
        out = root / f"infer_{trainer}"
        given = (*origin, f"--gin.INFER_OUTPUT_DIR='{out}'")
        run("infer", *files, *given, root=root.parent, trainer=trainer)
        (path,) = out.glob("*.jsonl-00000-of-00001")
        lines[trainer] = [json.loads(x) for x in path.read_text().splitlines()]
    assert len(lines["own"]) > 100
    predictions = [[x["prediction"] for x in lines[trainer]] for trainer in origins]
    assert predictions[0] == predictions[1] and len(set(map(str, predictions[0]))) > 1

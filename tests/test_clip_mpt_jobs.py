"""MPT's stages on images, as whole jobs from the shipped gin files: teachers, source, target."""

from __future__ import annotations

import json

import gin
import numpy as np
import pytest

from mpt_jax.artifacts.artifacts import load_artifact
from tests.fixtures.image_jobs import bindings, run_job
from tests.fixtures.training_runs import assert_same_bits, prompts

pytestmark = pytest.mark.usefixtures("cleared_gin")

pytestmark = pytest.mark.slow

SOURCES, TARGETS = ("job_pets", "job_shapes"), ("job_tags",)  # the target is multi-label
RECIPE = {
    "CONTEXT_LENGTH": 2,
    "IMAGE_TOKENS": 2,
    "STEPS_PER_EPOCH": 1,
    "EVAL_PERIOD": 4,
    "LEARNING_RATE": 0.05,
}
FLEET = {"SHOTS": [2], "SEEDS": [1]}
RUNS = [f"{task}_k2_per_class_s1" for task in SOURCES]


def source_bindings(clip, root, **macros):
    given = bindings(clip, root, SOURCES, **{**RECIPE, **FLEET, **macros})
    return [x.replace("TARGET_TASKS", "SOURCE_TASKS") for x in given]


@pytest.fixture(scope="module")
def root(clip, tmp_path_factory):
    """The root of the teachers and the source stage."""
    root = tmp_path_factory.mktemp("clip_mpt")
    run_job(["clip_pt_source"], source_bindings(clip, root))
    gin.clear_config()
    run_job(["clip_mpt_source"], source_bindings(clip, root, LAYER_FACTORS="each"))
    gin.clear_config()
    return root


def logged(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["folder"] == "train" and "loss" in x]


def test_source_stage_learns_from_its_teachers(clip, root, tmp_path):
    folder = root / "clip_mpt_source"
    artifact = load_artifact(folder / "artifact")
    assert artifact.config["run_names"] == RUNS and artifact.config["groups"] == [0, 0]
    assert artifact.config["shapes"] == {
        "text_context/shared": [1, 2, 16],
        "text_context/task_left": [2, 2, 1],
        "text_context/task_right": [2, 1, 16],
        "image_tokens/shared": [1, 6, 24],
        "image_tokens/task_left": [2, 6, 1],
        "image_tokens/task_right": [2, 3, 1, 24],
    }
    terms = {f"term/{name}" for name in ("cross_entropy", "kl", "hidden_image", "hidden_text")}
    assert all(terms <= set(line) and all(line[x] > 0 for x in terms) for line in logged(folder))
    given = source_bindings(clip, tmp_path, LAYER_FACTORS="each", DISTILLATION=None)
    run_job(["clip_mpt_source"], given)
    other = tmp_path / "clip_mpt_source"
    assert not any(name.startswith("term/kl") for name in logged(other)[0])
    ours, theirs = prompts(folder), prompts(other)
    assert any((np.asarray(ours[name]) != np.asarray(theirs[name])).any() for name in ours)


def test_source_stage_resumes_with_its_teachers_and_refuses_others(clip, root, tmp_path):
    given = {"LAYER_FACTORS": "each", "TEACHERS": str(root / "clip_pt_source" / "artifact")}
    limit = {**given, "train_script.train.actions": {}}
    for steps in (2, 4):
        limit["train_script.train.total_steps"] = steps
        run_job(["clip_mpt_source"], source_bindings(clip, tmp_path / "parts", **limit))
    run_job(["clip_mpt_source"], source_bindings(clip, tmp_path / "whole", **limit))
    whole, parts = (prompts(tmp_path / name / "clip_mpt_source") for name in ("whole", "parts"))
    assert_same_bits(whole, parts)
    with pytest.raises(ValueError, match=r"(?s)another configuration.*objective"):
        changed = {**limit, "DISTILL_FROM": "zero_shot", "train_script.train.total_steps": 6}
        run_job(["clip_mpt_source"], source_bindings(clip, tmp_path / "parts", **changed))


def test_zero_shot_teacher_needs_no_stage(clip, tmp_path):
    run_job(["clip_mpt_source"], source_bindings(clip, tmp_path, DISTILL_FROM="zero_shot"))
    assert all(line["term/kl"] > 0 for line in logged(tmp_path / "clip_mpt_source"))
    with pytest.raises(FileNotFoundError, match="--gin_file=gin/clip_pt_source.gin"):
        run_job(["clip_mpt_source"], source_bindings(clip, tmp_path / "other"))


def test_target_stage_starts_from_shared_prompt_and_mean_factors(clip, root):
    given = {**RECIPE, "ROOT": str(root), "LAYER_FACTORS": "each"}
    run_job(["clip_mpt_target"], bindings(clip, root, TARGETS, **given, TRAIN_STEPS=0))
    source = load_artifact(root / "clip_mpt_source" / "artifact").params
    start = prompts(root / "clip_mpt_target")
    for site in ("text_context", "image_tokens"):
        np.testing.assert_array_equal(start[f"{site}/shared"], source[site]["shared"])
        rows = np.asarray(source[site]["task_left"], np.float64)
        layers = rows.reshape(2, -1, 2, 1)  # two positions in each layer
        norms = np.linalg.norm(layers, axis=2, keepdims=True) / 2**0.5
        mean = (layers / norms).mean(0).reshape(-1, 1)
        np.testing.assert_allclose(start[f"{site}/task_left"][0], mean, rtol=1e-5)
    artifact = str(root / "clip_mpt_source" / "artifact")
    given = {**RECIPE, "LAYER_FACTORS": "each", "INITIAL_ARTIFACT": artifact}
    scores = run_job(["clip_mpt_target"], bindings(clip, root / "b", TARGETS, **given))
    assert set(scores) == set(TARGETS)
    training = ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "SAVE_PERIOD", "STATS_PERIOD")
    trained = str(root / "b" / "clip_mpt_target" / "artifact")
    given |= {"IMAGE_MODE": "squash", "INITIAL_ARTIFACT": trained}
    given["utils.DatasetConfig.split"] = "validation"
    own = bindings(clip, root / "read", TARGETS, **given)
    unused = (*training, "STEPS_PER_EPOCH", "LEARNING_RATE")
    files = ["eval", "models/prompted_clip", "methods/clip_mpt"]
    found = run_job(files, [x for x in own if x.split(" = ")[0] not in unused], "eval")
    (again,) = found.values()
    assert again == {task: pytest.approx(x, abs=1e-4) for task, x in scores.items()}

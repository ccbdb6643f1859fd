"""Whole jobs of linear probes from the shipped gin files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.serving.predict.image_artifacts import refuse_heads
from tests.fixtures import image_jobs
from tests.fixtures.gin_files import parse, trained, value
from tests.fixtures.image_jobs import bindings, run_job
from tests.fixtures.training_runs import prompts

pytestmark = pytest.mark.usefixtures("cleared_gin")

PAIR = ("job_pets", "job_tags")  # the second is multi-label
JOB = {"STEPS_PER_EPOCH": 1, "EVAL_PERIOD": 4}
TRAINING = ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "SAVE_PERIOD", "STATS_PERIOD")
READ = ["eval", "models/prompted_vit", "methods/linear_probe"]
U = 10  # of the tiny CLIP


@pytest.fixture(scope="module")
def job(clip, tmp_path_factory):
    """The root and the scores of a job without an image cache."""
    root = tmp_path_factory.mktemp("probe")
    return root, run_job(["linear_probe"], bindings(clip, root, PAIR, **JOB))


def inference(clip, root, tasks=PAIR, **macros):
    macros = {"utils.DatasetConfig.split": "validation", **macros}
    given = bindings(clip, root, tasks, **macros)
    return [x for x in given if x.split(" = ")[0] not in TRAINING]


def test_job_trains_a_head_for_each_run(job):
    root, scores = job
    assert list(scores) == list(PAIR)
    record = json.loads((root / "linear_probe" / "run.jsonl").read_text())
    assert record["trainable_parameters"] == 2 * 4 * (U + 1)
    assert prompts(root / "linear_probe")["head/kernel"].shape == (2, 4, U)


def test_image_cache_has_the_same_result(clip, job, tmp_path):
    root, scores = job
    found = run_job(["linear_probe", "runs/image_cache"], bindings(clip, tmp_path, PAIR, **JOB))
    assert found == scores
    one, other = (prompts(x / "linear_probe") for x in (root, tmp_path))
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, atol=1e-5)


def test_evaluation_of_the_artifact_gives_the_scores_of_training(clip, job, tmp_path):
    root, scores = job
    artifact = str(root / "linear_probe" / "artifact")
    given = inference(clip, tmp_path, INITIAL_ARTIFACT=artifact)
    assert run_job(READ, given, "eval") == {0: scores}
    files = "gin/models/clip_classifier.gin and gin/methods/linear_probe.gin"
    with pytest.raises(ValueError, match=f"has heads .*'linear_probe'.*with {files}"):
        refuse_heads([artifacts.load_artifact(artifact)])


def test_evaluation_needs_trained_heads(clip, job, tmp_path):
    with pytest.raises(ValueError, match="CHECKPOINT_PATH and INITIAL_ARTIFACT are both empty"):
        run_job(READ, inference(clip, tmp_path), "eval")
    artifact = str(job[0] / "linear_probe" / "artifact")
    given = inference(clip, tmp_path, ["job_shapes"], INITIAL_ARTIFACT=artifact)
    with pytest.raises(ValueError, match="no head for the run 'job_shapes'"):
        run_job(READ, given, "eval")


@pytest.mark.parametrize(("name", "width"), [("clip_vit_b16", 512), ("vit_b16", 768)])
def test_stage_has_the_recipe_and_trains_the_number_of_parameters(own_trainer, name, width):
    given = {
        "TARGET_TASKS": list(PAIR),
        "TASK_MODULES": [image_jobs.__name__],
        "CLIP_NAME": name,
        "INITIAL_CHECKPOINT_PATH": "none",
    }
    parse(["gin/linear_probe.gin"], [f"{key} = {x!r}" for key, x in given.items()])
    model = value("MODEL")
    assert trained(model) == 2 * 4 * (width + 1) and model.runs.num_groups == 2
    schedule = model.optimizer_def.learning_rates["head"]
    assert (schedule.peak, schedule.warmup_rate) == (1.0, 0.1)
    assert schedule.total_steps / schedule.steps_per_epoch == 200
    assert value("GLOBAL_BATCH_SIZE") == 64 and model.image_transform == ImageTransform(224)

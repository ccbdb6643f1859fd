"""Zero-shot CLIP: scores against NumPy in float64, evaluation as a job, and no training."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from mpt_jax.core.tree import flatten
from mpt_jax.prompts.zero_shot import ZeroShot
from mpt_jax.runtime import paths
from tests.fixtures import clip_models, reference_classes, tiny_clip
from tests.fixtures.image_jobs import bindings, run_job

pytestmark = pytest.mark.usefixtures("cleared_gin")

TOLERANCE = 1e-4  # logits are at most exp(1) in size; float32 against float64
TRAINING = ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "SAVE_PERIOD", "STATS_PERIOD")
FILES = ["eval", "models/prompted_clip", "methods/zero_shot"]


def given(folder, root, tasks, **macros):
    """The bindings of an evaluation."""
    every = bindings(folder, root, tasks, **macros)
    return [x for x in every if x.split(" = ")[0] not in TRAINING]


def test_scores_are_cosines_with_the_mean_features_of_templates():
    config = clip_models.tiny()
    model = tiny_clip.model(ZeroShot(), optimizer_def=None)
    params = tiny_clip.params(model)
    assert not [name for name in flatten(params) if name.startswith(("prompt", "text_encoder"))]
    whole = clip_models.random_params(config)
    batch = tiny_clip.batch([0, 1, 0, 1, 0], [2, 0, 0, 1, 1])
    tasks = (tiny_clip.PETS, tiny_clip.SHAPES)  # the first has two templates
    texts = [reference_classes.texts(config, whole, task, None) for task in tasks]
    expected = reference_classes.logits(config, whole, batch, texts)
    found = np.asarray(jax.jit(model.score_batch)(params, batch))
    for row, logits in enumerate(expected):
        values = [-reference_classes.cross_entropy(logits, i) for i in range(len(logits))]
        np.testing.assert_allclose(found[row][: len(values)], values, atol=TOLERANCE)
        assert (found[row][len(values) :] == -np.inf).all()


def test_eval_needs_the_backbone_only(clip, tmp_path):
    split = {"utils.DatasetConfig.split": "validation"}
    scores = run_job(FILES, given(clip, tmp_path, ["job_pets", "job_tags"], **split), "eval")
    assert list(scores) == [0] and list(scores[0]) == ["job_pets", "job_tags"]


@pytest.mark.slow
def test_eval_of_the_shipped_clip(tmp_path):
    folder = Path(paths.shipped(name="tiny_clip"))
    toy = {"TASK_MODULES": ["mpt_jax.tasks.toy_image_tasks"]}
    scores = run_job(FILES, given(folder, tmp_path, ["toy_tint"], **toy), "eval")
    assert scores == {0: {"toy_tint": {"accuracy": pytest.approx(39.6, abs=0.41)}}}  # 2 of 500


def test_training_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="'zero_shot' cannot be trained.*gin/eval.gin"):
        run_job(["coop_target", "methods/zero_shot"], bindings(clip, tmp_path, ["job_pets"]))


def test_artifacts_are_refused():
    prompt = tiny_clip.prompts()
    with pytest.raises(ValueError, match="cannot start from the initial artifact .*'site_prompts'"):
        ZeroShot().transfer({}, prompt, tiny_clip.RUNS, tiny_clip.RUNS)

"""Shipped gin files of jobs with lanes parse, and build models of the published sizes."""

from __future__ import annotations

import gin
import pytest

from mpt_jax.batching.samplers import EqualQuotas, LastOfEach
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.plan import stand_ins
from tests.fixtures import lane_jobs
from tests.fixtures.gin_files import abstract_params, parse, trained, value

pytestmark = pytest.mark.usefixtures("own_trainer")

STAGE = "gin/multilane.gin"


def full(step=3, sequences=(lane_jobs.TAGS,), **macros):
    given = {
        "TASK_MODULES": [lane_jobs.__name__],
        "SEQUENCES": [list(x) for x in sequences],
        "STEP": step,
        "CLIP_NAME": "vit_b16",
        "INITIAL_CHECKPOINT_PATH": "none",
        **macros,
    }
    return [f"{name} = {x!r}" for name, x in given.items()]


@pytest.mark.parametrize(
    ("name", "sizes"), [("vit_b16", (12, 768, 768)), ("clip_vit_b16", (12, 768, 512))]
)
def test_stage_trains_the_published_number_of_parameters(name, sizes):
    layers, width, features = sizes
    parse([STAGE], full(CLIP_NAME=name))
    numbers = 3 * 10 * width + 5 * 2 * 3 * 10 * width + (features + 1) * 6
    assert trained(value("MODEL")) == numbers
    names = [x for x in abstract_params(value("MODEL")) if not x.startswith("prompt/")]
    assert all(x.startswith("image_encoder/") for x in names)
    assert sum("attention/query/kernel" in x for x in names) == layers


def test_stage_has_the_published_recipe():
    parse([STAGE], full(1))
    model = value("MODEL")
    schedule = model.optimizer_def.learning_rates["head"]
    assert (schedule.peak, schedule.total_steps, schedule.decay) == (0.05, 600, "cosine")
    assert (model.optimizer_def.weight_decay, model.optimizer_def.clip_norm) == (0.0, None)
    assert model.optimizer_def.rule is None and model.optimizer_def.absent_tasks == "hold"
    assert (model.normalize, model.temperature, model.objective.all_classes) == (True, 1.0, 0)
    assert value("GLOBAL_BATCH_SIZE") == 256 and value("INITIAL_ARTIFACT") is None
    assert model.image_transform == ImageTransform(224)


def test_macros_reach_the_model():
    macros = {"ALL_CLASSES": 20, "NORMALIZE": False, "DROP_AND_REPLACE": False, "RESIZE_TO": 256}
    parse([STAGE], full(2, LANES=5, SELECTOR_INIT="zero", LANE_INIT="uniform", **macros))
    model = value("MODEL")
    assert model.objective.all_classes == 20 and not model.normalize
    assert not model.prompt.drop_and_replace and model.image_transform.resize_to == 256
    init = model.prompt.lane.init_prompt
    assert (init.lanes, init.selector_kind, init.kind) == (5, "zero", "uniform")
    assert model.prompt.lane.start_from == {
        "lane_tags_1": "lane_tags_1", "lane_tags_2": "lane_tags_1",
    }  # fmt: skip
    assert value("INITIAL_ARTIFACT").endswith("runs/multilane_1/artifact")
    assert gin.query_parameter("infer_eval/utils.DatasetConfig.split") is not None
    assert value("EVAL_SPLIT") == "seen_2"


def test_samplers_of_stages_and_of_joint_training():
    pair = (lane_jobs.TAGS, [f"{name}_lr0.1" for name in lane_jobs.TAGS])
    parse([STAGE], full(2, pair))
    assert value("SAMPLER") == LastOfEach(512, 42, sequences=2)
    assert value("MODEL").runs.groups == (0, 0, 1, 1)
    assert value("MODEL").runs.task_names == lane_jobs.TAGS[:2] * 2
    parse([STAGE, "gin/runs/joint_lanes.gin"], full(2, pair))
    assert value("SAMPLER") == EqualQuotas(512, 42)
    assert value("INITIAL_ARTIFACT") is None and value("STAGE") == "multilane_joint_2"


def test_plans_need_no_data():
    given = full(2, (("coop_eurosat", "coop_dtd"),), TASK_MODULES=["mpt_jax.tasks.image_sets.coop"])
    parse([STAGE], given)
    stand_ins.bind()
    model = value("MODEL")
    assert model.bank.count.tolist() == [10, 47] and model.prompt.num_classes == 47


@pytest.mark.parametrize("entry", ["eval", "infer"])
def test_evaluation_and_inference_read_the_method(entry):
    files = [f"gin/{entry}.gin", "gin/models/prompted_vit.gin", "gin/methods/multi_lane.gin"]
    given = [f"TASK_NAMES = {list(lane_jobs.TAGS)!r}", *full()]
    parse(files, [x for x in given if not x.startswith(("SEQUENCES", "STEP"))], entry)
    assert value("MODEL").runs.num_rows == 3

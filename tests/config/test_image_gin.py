"""Shipped gin files of image jobs parse, and build models of the published sizes."""

from __future__ import annotations

import itertools

import gin
import pytest

from mpt_jax.data.image_transforms import Augmentation, ImageTransform
from mpt_jax.training.schedules import EpochCosine
from tests.fixtures import clip_files, image_jobs
from tests.fixtures.gin_files import abstract_params, parse, trained, value

pytestmark = pytest.mark.usefixtures("own_trainer")

COOP, VPT = "gin/coop_target.gin", "gin/vpt_target.gin"
SOURCE, TARGET = "gin/mvlpt_source.gin", "gin/mvlpt_target.gin"
STAGES = [COOP, VPT]
PAIR = ("job_pets", "job_shapes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of the published size, 49,408 ids."""
    pairs = itertools.product(clip_files.bytes_in_order(), repeat=2)
    merges = list(itertools.islice(pairs, 49_408 - 514))
    return clip_files.write(tmp_path_factory.mktemp("tokenizer"), merges)


def full(tokenizer, tasks=("job_pets",), **macros):
    names = {"TARGET_TASKS": list(tasks), "TASK_MODULES": [image_jobs.__name__]}
    given = {"CLIP_TOKENIZER": str(tokenizer), "INITIAL_CHECKPOINT_PATH": "none", **names, **macros}
    return [f"{name} = {x if str(x).startswith('@') else repr(x)}" for name, x in given.items()]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [(COOP, 16 * 512), (VPT, 12 * 16 * 768)],
)
def test_stage_trains_the_published_number_of_parameters(name, numbers, tokenizer):
    parse([name], full(tokenizer))
    assert trained(value("MODEL")) == numbers
    parse([name], full(tokenizer, image_jobs.ARRAYS))  # independent runs
    assert value("MODEL").runs.num_groups == 3 and value("GLOBAL_BATCH_SIZE") == 3 * 32
    assert trained(value("MODEL")) == 3 * numbers


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ((), 566_400),
        pytest.param(("gin/methods/coop.gin",), 16 * 512, marks=pytest.mark.slow),
        (("gin/methods/vpt.gin",), 12 * 16 * 768),
        (("gin/methods/cocoop.gin",), 35_360),
    ],
)
def test_mvlpt_stages_train_a_prompt_for_each_draw(method, numbers, tokenizer):
    tasks = {"SOURCE_TASKS": list(PAIR), "TASK_MODULES": [image_jobs.__name__]}
    given = {"CLIP_TOKENIZER": str(tokenizer), "INITIAL_CHECKPOINT_PATH": "none", **tasks}
    words = ["init.Text.text = 'a'"] if "cocoop" in str(method) else []  # a token for each letter
    parse([SOURCE, *method], [*(f"{name} = {x!r}" for name, x in given.items()), *words])
    model = value("MODEL")
    names = [f"{task}_k20_per_class_s{seed}" for task in PAIR for seed in (1, 2, 3)]
    assert list(model.runs.run_names) == names and list(model.runs.task_names) == [
        task for task in PAIR for _ in range(3)
    ]
    assert list(model.runs.group_of_row) == [0, 1, 2] * 2
    assert value("GLOBAL_BATCH_SIZE") == 3 * 32
    assert trained(model) == 3 * numbers
    parse([TARGET, *method], [*full(tokenizer, PAIR), *words])
    model = value("MODEL")
    assert model.runs.num_groups == 2 and trained(model) == 2 * numbers
    assert model.image_transform == ImageTransform(224, "squash")
    assert value("INITIAL_ARTIFACT").endswith("mvlpt_source/artifact")


def test_mvlpt_source_stage_has_the_published_recipe(tokenizer):
    tasks = {"SOURCE_TASKS": list(PAIR), "TASK_MODULES": [image_jobs.__name__]}
    given = {"CLIP_TOKENIZER": str(tokenizer), "INITIAL_CHECKPOINT_PATH": "none", **tasks}
    parse([SOURCE], [f"{name} = {x!r}" for name, x in given.items()])
    model = value("MODEL")
    schedule = model.optimizer_def.learning_rates["shared"]
    assert schedule.total_steps == 200 * schedule.steps_per_epoch and schedule.peak == 0.002
    # 20 images of each of the 2,191 classes, 32 in a step.
    assert schedule.steps_per_epoch == 20 * 2191 // 32
    assert model.augmentation == Augmentation(224)
    assert model.image_transform == ImageTransform(224)


def test_names_of_models_change_the_size(tokenizer):
    parse([COOP], full(tokenizer, CLIP_NAME="clip_vit_l14"))
    assert trained(value("MODEL")) == 16 * 768
    parse([VPT], full(tokenizer, CLIP_NAME="clip_vit_l14", IMAGE_LAYERS=1))
    assert trained(value("MODEL")) == 16 * 1024


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_the_published_recipe(name, tokenizer):
    parse([name], full(tokenizer))
    optimizer = value("MODEL").optimizer_def
    for schedule in optimizer.learning_rates.values():
        assert isinstance(schedule, EpochCosine)
        assert (schedule.peak, schedule.warmup_rate) == (0.002, 1e-5)
        assert schedule.total_steps / schedule.steps_per_epoch == 200
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, None)
    assert value("BATCH_SIZE") == 32
    model = value("MODEL")
    assert model.image_transform == ImageTransform(224) and model.augmentation is None


def test_augmentation_and_image_mode_reach_the_converter(tokenizer):
    augmented = full(tokenizer, AUGMENTATION="@image_transforms.Augmentation()", RANDOM_SEED=5)
    parse([VPT], augmented)
    model = value("MODEL")
    assert model.augmentation == Augmentation(224)
    converter = model.FEATURE_CONVERTER_CLS(pack=False)
    assert converter.augmentation == Augmentation(224) and converter._seed == 5
    parse([VPT], full(tokenizer, IMAGE_MODE="squash"))
    assert value("MODEL").image_transform == ImageTransform(224, "squash")
    parse([VPT], [*full(tokenizer), "image_transforms.ImageTransform.resize_to = 256"])
    assert value("MODEL").image_transform == ImageTransform(224, resize_to=256)


@pytest.mark.parametrize("entry", ["eval", "infer"])
@pytest.mark.parametrize("method", ["coop", "vpt"])
def test_evaluation_and_inference_read_the_method(entry, method, tokenizer):
    files = [f"gin/{entry}.gin", "gin/models/prompted_clip.gin", f"gin/methods/{method}.gin"]
    parse(files, full(tokenizer), entry)
    model = value("MODEL")
    assert any(name.startswith("prompt/") for name in abstract_params(model))


def test_image_cache_gin_sets_the_cache(tokenizer):
    parse([COOP, "gin/runs/image_cache.gin"], full(tokenizer, IMAGE_CACHE_BYTES=3000))
    settings = gin.query_parameter("Trainer.image_cache").scoped_configurable_fn()
    assert settings.max_bytes == 3000


def test_fleet_gin_sets_the_rates_of_image_runs(tokenizer):
    fleet = {"LEARNING_RATES": [0.01, 0.1], "SEEDS": [0, 1], "SHOTS": [4]}
    fleet["TASK_STEPS"] = {"job_pets": 300}
    parse([COOP, "gin/runs/fleet.gin"], full(tokenizer, PAIR, **fleet))
    schedule = value("MODEL").optimizer_def.learning_rates["task"]
    assert schedule.peak == [0.01, 0.1] * 4
    assert schedule.total_steps == [300] * 4 + [1000] * 4

"""Shipped gin files of MPT on CLIP: sizes, rates, teachers, and a comparison with MVLPT's."""

from __future__ import annotations

import itertools

import gin
import pytest

from mpt_jax.models.class_distillation import ClassDistillation
from mpt_jax.models.class_losses import ClassObjective
from mpt_jax.prompts.mpt import MPT
from mpt_jax.training.schedules import EpochCosine
from tests.fixtures import clip_files, image_jobs
from tests.fixtures.gin_files import abstract_params, parse, trained, value

pytestmark = pytest.mark.usefixtures("own_trainer")

TEACHERS, SOURCE, TARGET = (
    f"gin/clip_{name}.gin" for name in ("pt_source", "mpt_source", "mpt_target")
)
TEXT, IMAGE = 16 * 512, 12 * 16 * 768


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of the published size, 49,408 ids."""
    pairs = itertools.product(clip_files.bytes_in_order(), repeat=2)
    merges = list(itertools.islice(pairs, 49_408 - 514))
    return clip_files.write(tmp_path_factory.mktemp("tokenizer"), merges)


def full(tokenizer, tasks=image_jobs.ARRAYS, name="SOURCE_TASKS", **macros):
    names = {name: list(tasks), "TASK_MODULES": [image_jobs.__name__], "ROOT": "ROOT"}
    given = {"CLIP_TOKENIZER": str(tokenizer), "INITIAL_CHECKPOINT_PATH": "none", **names, **macros}
    return [f"{name} = {x if str(x).startswith('@') else repr(x)}" for name, x in given.items()]


def targets(tokenizer, tasks=image_jobs.ARRAYS, **macros):
    return full(tokenizer, tasks, "TARGET_TASKS", **macros)


@pytest.mark.parametrize(
    ("macros", "shared", "task"),
    [
        ({}, TEXT + IMAGE, 528 + 960),
        ({"LAYER_FACTORS": "each"}, TEXT + IMAGE, 528 + 9_408),
        ({"LAYER_FACTORS": "tied"}, TEXT + IMAGE, 528 + 784),
        ({"RANK": 2}, TEXT + IMAGE, 2 * (528 + 960)),
        ({"IMAGE_PROMPT": None}, TEXT, 528),
        ({"TEXT_PROMPT": None, "CONTEXT_LENGTH": 0}, IMAGE, 960),
        ({"TRAINABLE": [("prompt/.*/task_left", "frozen")]}, TEXT + IMAGE, 512 + 768),
        ({"IMAGE_LAYERS": 1, "LAYER_FACTORS": "each"}, TEXT + 16 * 768, 528 + 784),
    ],
)
def test_source_stage_trains_the_specified_number_of_parameters(macros, shared, task, tokenizer):
    parse([SOURCE], full(tokenizer, **macros))
    model = value("MODEL")
    assert trained(model) == shared + 3 * task
    assert model.runs.num_groups == 1 and model.runs.num_rows == 3
    parse([SOURCE], full(tokenizer, SEEDS=[1, 2], **macros))
    model = value("MODEL")
    assert model.runs.num_groups == 2 and trained(model) == 2 * shared + 6 * task


def test_target_stage_has_independent_runs(tokenizer):
    parse([TARGET], targets(tokenizer))
    model = value("MODEL")
    assert trained(model) == 3 * (TEXT + IMAGE + 528 + 960)
    assert model.runs.num_groups == 3 and not model.has_teacher
    assert value("INITIAL_ARTIFACT") == "ROOT/clip_mpt_source/artifact"
    assert value("MODEL").prompt.start_from == dict.fromkeys(
        ("text_context", "image_tokens"), "average"
    )
    assert model.image_transform.mode == "squash"


@pytest.mark.parametrize(("name", "given"), [(SOURCE, full), (TARGET, targets)])
def test_factors_have_their_own_peak_of_the_same_schedule(name, given, tokenizer):
    parse([name], given(tokenizer, LEARNING_RATE=0.01, TASK_LEARNING_RATE=0.5))
    rates = value("MODEL").optimizer_def.learning_rates
    shared, task = rates["shared"], rates["task"]
    assert isinstance(task, EpochCosine) and (shared.peak, task.peak) == (0.01, 0.5)
    for setting in ("total_steps", "steps_per_epoch", "warmup_rate"):
        assert getattr(shared, setting) == getattr(task, setting)
    parse([name], given(tokenizer, LEARNING_RATE=0.01))
    assert value("MODEL").optimizer_def.learning_rates["task"].peak == 0.01


def test_fleet_of_targets_with_rates_of_factors(tokenizer):
    files = [TARGET, "gin/runs/fleet.gin", "gin/runs/fleet_task_rates.gin"]
    rates = {"TASK_LEARNING_RATES": [0.1, 0.2], "SHOTS": [4], "SEEDS": [1]}
    parse(files, targets(tokenizer, ("job_pets",), **rates))
    assert value("MODEL").optimizer_def.learning_rates["task"].peak == [0.1, 0.2]
    assert trained(value("MODEL")) == 2 * (TEXT + IMAGE + 528 + 960)


# --- Teachers ------------------------------------------------------------------------------------


def test_source_stage_distills_from_the_teacher_stage(tokenizer):
    parse([TEACHERS], full(tokenizer))
    teacher = value("MODEL")
    assert teacher.runs.num_groups == 3 and trained(teacher) == 3 * (TEXT + IMAGE)
    scale = teacher.prompt.image_tokens.init_prompt.scale
    assert teacher.prompt.text_context.init_prompt.standard_deviation == 0.02
    assert scale == pytest.approx(0.0625)
    parse([SOURCE], full(tokenizer))
    model = value("MODEL")
    assert model.runs.run_names == teacher.runs.run_names
    model.check_teacher(teacher.prompt)
    assert model.objective == ClassObjective("own", ClassDistillation())
    origins = gin.query_parameter("TrainStateInitializer.origins").scoped_configurable_fn()
    assert origins.teachers == ("ROOT/clip_pt_source/artifact",)
    assert origins.teachers_command.endswith("--gin_file=gin/clip_pt_source.gin")
    params = abstract_params(model)
    assert params["teacher/image_tokens"] == (3, 192, 768)
    assert params["teacher/class_features"] == (9, 512)


def test_distillation_from_zero_shot_clip_or_none(tokenizer):
    parse([SOURCE], full(tokenizer, DISTILL_FROM="zero_shot"))
    model = value("MODEL")
    assert model.has_teacher and not model.reads_teachers
    parse([SOURCE], full(tokenizer, DISTILLATION=None))
    assert value("MODEL").objective == ClassObjective()
    given = {"DISTILLATION": "@class_losses.ClassDistillation()", "DISTILL_FROM": "zero_shot"}
    parse(["gin/coop_target.gin"], targets(tokenizer, ("job_pets",), **given))
    model = value("MODEL")
    assert model.objective.distillation == ClassDistillation(teacher="zero_shot")
    given["class_losses.ClassDistillation.text_weight"] = 0.0
    files = ["gin/coop_target.gin", "gin/methods/cocoop.gin"]
    parse(files, targets(tokenizer, ("job_pets",), **given))
    assert list(value("MODEL").objective.coefficients()) == ["cross_entropy", "kl", "hidden_image"]


# --- The nested comparison -----------------------------------------------------------------------


def settings(model):
    """What a job has besides its method."""
    return {
        "runs": (model.runs.run_names, model.runs.task_names, model.runs.group_of_row),
        "transform": model.image_transform,
        "augmentation": model.augmentation,
        "softmax": model.objective.softmax,
        "clip": model.backbone_config,
        "decay": (model.optimizer_def.weight_decay, model.optimizer_def.absent_tasks),
        "schedule": model.optimizer_def.learning_rates["shared"],
        "steps": [value(x) for x in ("TRAIN_STEPS", "BATCH_SIZE", "EVAL_PERIOD", "SHOTS")],
    }


def test_source_stage_differs_from_mvlpt_in_factors_and_teachers(tokenizer):
    """With no teachers, the only other difference is the default number of draws."""
    parse(["gin/mvlpt_source.gin"], full(tokenizer, SEEDS=[1]))
    theirs = settings(value("MODEL"))
    parse([SOURCE], full(tokenizer))
    model = value("MODEL")
    assert settings(model) == theirs
    assert all(isinstance(part, MPT) for part in model.prompt.parts.values())


@pytest.mark.parametrize("entry", ["eval", "infer"])
def test_evaluation_and_inference_read_the_method(entry, tokenizer):
    files = [f"gin/{entry}.gin", "gin/models/prompted_clip.gin", "gin/methods/clip_mpt.gin"]
    parse(files, targets(tokenizer), entry)
    assert any(name.startswith("prompt/") for name in abstract_params(value("MODEL")))


@pytest.mark.parametrize("name", [TEACHERS, SOURCE, TARGET])
def test_stages_run_in_the_tiny_world(name):
    parse([name, "gin/tiny_vision.gin"])
    model = value("MODEL")
    assert model.prompt.prompt_length == 4 + 4 * model.prompt.image_layers

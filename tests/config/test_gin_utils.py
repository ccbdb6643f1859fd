"""Shipped gin files parse and build their models; errors name the mistake.

Full-size models are built as shapes only. No file is read except the toy vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, t5_config
from mpt_jax.config import gin_check, gin_utils, trainer_choice
from mpt_jax.core.tree import flatten
from mpt_jax.runtime import paths
from mpt_jax.training.trainer import Trainer
from tests.fixtures.gin_files import (
    JOINT,
    ROOT,
    SHALLOW,
    SOURCE,
    TARGET,
    VOCABULARY,
    abstract_params,
    parse,
    shapes_of,
    trained,
    value,
)
from tests.fixtures.processes import run_python, run_script

pytestmark = pytest.mark.usefixtures("own_trainer")

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gin").rglob("*.gin"))
# tests/config/test_image_gin.py.
OF_IMAGES = [f"gin/{name}.gin" for name in ("coop_target", "vpt_target", "tiny_vision")]
OF_IMAGES += [f"gin/{name}.gin" for name in ("mvlpt_source", "mvlpt_target")]
OF_IMAGES += [
    f"gin/methods/{name}.gin" for name in ("coop", "cocoop", "vpt", "upt", "sgd", "zero_shot")
]
OF_IMAGES += ["gin/runs/image_cache.gin"]
# tests/config/test_clip_mpt_gin.py.
OF_IMAGES += [f"gin/{x}.gin" for x in ("clip_mpt_source", "clip_mpt_target", "clip_pt_source")]
OF_IMAGES += ["gin/methods/clip_mpt.gin"]
# tests/config/test_lane_gin.py.
OF_IMAGES += [f"gin/{x}.gin" for x in ("multilane", "methods/multi_lane", "runs/joint_lanes")]
# tests/experiments/test_image_tables.py.
OF_IMAGES += ["gin/linear_probe.gin", "gin/runs/last_step.gin", "gin/runs/no_evaluation.gin"]
OF_IMAGES += ["gin/methods/coop_vpt.gin", "gin/methods/linear_probe.gin"]
STAGES = [
    name for name in FILES if "\nSTAGE = " in (ROOT / name).read_text() and name not in OF_IMAGES
]
TRAINING = [name for name in STAGES if name not in ("gin/eval.gin", "gin/infer.gin")]
# Files that change a toy run.
AFTER_TINY = ["gin/runs/demo.gin"]
PACKED, BY_LENGTH = "gin/runs/packed.gin", "gin/runs/by_length.gin"
TEACHER_CACHE = "gin/runs/teacher_cache.gin"
SCOPES = ("train", "train_eval", "infer_eval")
METHODS = [name for name in FILES if name.startswith("gin/methods/") and name not in OF_IMAGES]
BACKBONE_METHODS = [
    f"gin/methods/{name}.gin" for name in ("full_finetuning", "layer_norms", "bitfit")
]
ADAPTERS = [f"gin/methods/{name}.gin" for name in ("lora", "dora")]
ABLATIONS = [name for name in FILES if name.startswith("gin/ablations/")]
# Other source tasks; tests/tasks/test_mixtures.py.
SOURCES = ["gin/runs/source_tasks_12.gin"]
# tests/experiments/test_fleet_gin.py.
FLEETS = [name for name in FILES if name.startswith("gin/runs/fleet")]


def entry_of(name: str) -> str:
    return {"gin/eval.gin": "eval", "gin/infer.gin": "infer"}.get(name, "train")


def files_for(name: str) -> list[str]:
    """Evaluation and inference name their method on the command line."""
    return [name] if entry_of(name) == "train" else [name, "gin/methods/mpt.gin"]


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STAGES if name != "gin/pretrain_tiny.gin"])
def test_tiny_gin_any_stage_becomes_toy_run(name):
    parse([*files_for(name), "gin/tiny.gin"], (), entry_of(name))
    model = value("MODEL")
    size = sum(int(np.prod(shape)) for shape in abstract_params(model).values())
    assert size < 5e6
    assert all(task.startswith("toy_") for task in model.runs.task_names)
    assert Path(value("STAGE_DIR")).parent.name == "tiny"


def test_pretrain_tiny_gin_trains_all_parameters():
    parse(["gin/pretrain_tiny.gin"])
    model = value("MODEL")
    sizes = [int(np.prod(shape)) for shape in abstract_params(model).values()]
    assert trained(model) == sum(sizes) < 5e6
    assert model.FEATURE_CONVERTER_CLS(pack=False).prompt_length == 0


@pytest.mark.parametrize("name", METHODS)
def test_method_gin_replaces_method_of_stage(name):
    """On the toy suite, for speed; sizes are tested above."""
    prompts = name not in (*BACKBONE_METHODS, *ADAPTERS)
    stage = "gin/full_finetuning.gin" if name in BACKBONE_METHODS else "gin/pt_target.gin"
    parse([stage, name, "gin/tiny.gin"])
    model = value("MODEL")
    assert trained(model) > 0
    assert model.FEATURE_CONVERTER_CLS(pack=False).prompt_length == (20 if prompts else 0)
    # The optimizer has a learning rate for every trainable label.
    labels = set(flatten(model.label_tree(shapes_of(model))).values()) - {"frozen", "clock"}
    assert labels == set(model.optimizer_def.learning_rates)
    # A learning rate for prompts would be too high for weights.
    assert (value("LEARNING_RATE") > 0.01) == prompts


@pytest.mark.parametrize("name", AFTER_TINY)
def test_demo_gin_after_tiny_builds_model(name):
    parse(["gin/mpt_source.gin", "gin/tiny.gin", name])
    assert abstract_params(value("MODEL"))


ABLATED = [
    ("no_distillation", SOURCE, 82_008),
    ("no_decomposition", SOURCE, 76_800),
    ("no_decomposition", TARGET, 76_800),
    ("prompt_distance", SOURCE, 82_008),
    ("no_stochastic_sampling", SOURCE, 82_008),
    ("target_shared_only", TARGET, 76_800),
    ("target_vectors_only", TARGET, 868),
    ("joint_without_replacement", TARGET, 77_668),
    ("size_small", TARGET, 51_812),
    ("size_large", TARGET, 103_524),
    ("backbone_v1_1_lm100k", TARGET, 77_668),
    ("nearest_source", TARGET, 77_668),
    ("adafactor", "gin/pt_target.gin", 76_800),
    ("attempt_frozen_norm", "gin/attempt_target.gin", 230_400),
    ("attempt_fixed_attention", "gin/attempt_target.gin", 76_800),
    # Six sources, a private prompt with its MLP, a router and the counter of steps.
    (
        "crosspt_from_teachers",
        "gin/crosspt_target.gin",
        6 * 76_800 + 76_800 + 1_181_184 + 6 + 1,
    ),
]


@pytest.mark.parametrize(("name", "stage", "numbers"), ABLATED)
def test_ablation_gin_trains_expected_parameters(name, stage, numbers):
    parse([stage, f"gin/ablations/{name}.gin"], [VOCABULARY, *SHALLOW])
    model = value("MODEL")
    assert trained(model) == numbers
    labels = set(flatten(model.label_tree(shapes_of(model))).values())
    assert labels - {"frozen", "clock"} == set(model.optimizer_def.learning_rates)
    distillation = model.objective.distillation
    assert (distillation is None) == (stage != SOURCE or name == "no_distillation")
    if name == "prompt_distance":
        assert (distillation.logits, distillation.hidden) == (False, False)
        assert distillation.prompt_distance
    sampler = type(value("SAMPLER")).__name__
    default = "StochasticTasks" if stage == SOURCE else "EqualQuotas"
    assert sampler == ("PerExample" if name == "no_stochastic_sampling" else default)


def test_packed_gin_changes_rows_not_sampler():
    parse([SOURCE, "gin/tiny.gin", PACKED], ["PACK_WINDOW = 64"])
    packs = {scope: gin.query_parameter(f"{scope}/DatasetConfig.pack") for scope in SCOPES}
    assert packs == {"train": True, "train_eval": True, "infer_eval": False}
    assert (value("PACKED_ROWS"), value("SAMPLER").batch_size) == (16, 48)
    converter = value("MODEL").FEATURE_CONVERTER_CLS(pack=True)
    lengths = converter.get_model_feature_lengths({"inputs": 48, "targets": 12})
    assert lengths["encoder_segment_ids"] == 2 * (20 + 48)
    assert lengths["decoder_target_tokens"] == 24
    assert converter.pack_window == 64


def test_by_length_gin_sorts_and_trims_training_batches():
    parse([SOURCE, BY_LENGTH], [VOCABULARY])
    assert gin.query_parameter("train/DatasetConfig.by_length") is True
    settings = gin.query_parameter("train/DatasetConfig.length_buckets")
    assert settings.scoped_selector == "LENGTH_BUCKETS/gin.macro"
    limits = value("TASK_FEATURE_LENGTHS")
    assert all(max(found) < limits[name] for name, found in value("LENGTH_BUCKETS").items())


def test_teacher_cache_gin_sets_cache():
    parse([SOURCE, TEACHER_CACHE], [VOCABULARY, "TEACHER_CACHE_BYTES = 3000"])
    settings = gin.query_parameter("Trainer.teacher_cache").scoped_configurable_fn()
    assert (settings.max_bytes, settings.dtype) == (3000, "bfloat16")


def test_joint_gin_targets_share_prompt_and_sampler():
    parse([TARGET, JOINT], [VOCABULARY, *SHALLOW, "TARGET_TASKS = ['boolq', 'wic', 'cb']"])
    assert type(value("SAMPLER")).__name__ == "StochasticTasks"
    assert trained(value("MODEL")) == 76_800 + 3 * 868


@pytest.mark.parametrize("name", [SOURCE, TARGET, "gin/pt_target.gin", "gin/spot_target.gin"])
def test_dropout_is_that_of_the_released_codes_except_on_the_toy_suite(name):
    parse([name], [VOCABULARY, *SHALLOW])
    assert value("MODEL").module.config.dropout_rate == 0.1
    parse([name, "gin/tiny.gin"])
    assert value("MODEL").module.config.dropout_rate == 0.0


def test_ablation_gin_files_are_all_tested():
    assert {f"gin/ablations/{name}.gin" for name, *_ in ABLATED} == set(ABLATIONS)


def test_gin_files_are_all_tested():
    """Every file is tested directly, or included by a file that is."""
    included = {
        found
        for name in FILES
        for found in re.findall(r"^include '(gin/[^']+)'", (ROOT / name).read_text(), re.M)
    }
    tested = {
        *FLEETS,
        *OF_IMAGES,
        *STAGES,
        *METHODS,
        *AFTER_TINY,
        *ABLATIONS,
        *SOURCES,
        JOINT,
        PACKED,
        BY_LENGTH,
        TEACHER_CACHE,
        "gin/tiny.gin",
    }
    assert set(FILES) == tested | included


@pytest.mark.parametrize("name", FILES)
def test_gin_file_is_short_and_documented(name):
    text = (ROOT / name).read_text()
    assert "# Provides" in text.split("\n\n")[0] + text
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("gin/mpt_source.gin", 82_008),
        ("gin/mpt_target.gin", 77_668),
        ("gin/pt_target.gin", 76_800),
        ("gin/pt_source.gin", 6 * 76_800),
        ("gin/attempt_target.gin", 231_936),
        # Three sources, a private prompt, an MLP for each, a router and the counter of steps.
        ("gin/crosspt_target.gin", 4 * (76_800 + 1_181_184) + 3 + 1),
        ("gin/lora_target.gin", 884_736),
        ("gin/full_finetuning.gin", 222_903_552),
    ],
)
def test_stage_gin_full_scale_has_expected_trainable_counts(name, numbers):
    whole = name in ("gin/full_finetuning.gin", "gin/lora_target.gin")
    parse([name], [VOCABULARY, *([] if whole else SHALLOW)])
    assert trained(value("MODEL")) == numbers


def test_bitfit_trains_the_biases_of_the_released_code_at_its_rate():
    """36 modules with biases of 202,752 numbers, norms with 47,616, and a head with 32,128."""
    parse(["gin/full_finetuning.gin", "gin/methods/bitfit.gin"], [VOCABULARY])
    assert trained(value("MODEL")) == 202_752 + 47_616 + 32_128 == 282_496
    assert value("MODEL").optimizer_def.learning_rates["backbone"].peak == 3e-4


@pytest.mark.parametrize(
    ("name", "rates", "batch_size", "steps"),
    [
        # 5 epochs over 1,151,093 examples of the six sources, 32 (teachers: 6 x 32) in a batch;
        # 20 epochs over BoolQ's 9,427.
        ("gin/pt_source.gin", {"task": 0.3}, 192, 5 * 1_151_093 // 192),
        ("gin/mpt_source.gin", {"shared": 0.3, "task": 0.3}, 32, 5 * (1_151_093 // 32)),
        ("gin/mpt_target.gin", {"shared": 0.3, "task": 0.4}, 32, 20 * 9_427 // 32 + 1),
        ("gin/pt_target.gin", {"task": 0.3}, 32, 20 * 9_427 // 32 + 1),
        ("gin/attempt_target.gin", {"task": 0.3, "router": 0.1}, 32, 20 * 9_427 // 32 + 1),
        (
            "gin/crosspt_target.gin",
            {"source": 0.05, "private": 0.02, "router": 0.1},
            32,
            20 * 9_427 // 32 + 1,
        ),
    ],
)
def test_stage_gin_full_scale_has_expected_hyperparameters(name, rates, batch_size, steps):
    parse([name], [VOCABULARY])
    optimizer = value("MODEL").optimizer_def
    assert {label: rate.peak for label, rate in optimizer.learning_rates.items()} == rates
    assert (optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 1.0)
    assert {rate.decay for rate in optimizer.learning_rates.values()} == {"linear"}
    warmup = max(max(r.warmup_steps, r.warmup_fraction) for r in optimizer.learning_rates.values())
    warmups = {"gin/mpt_source.gin": 0.1, "gin/mpt_target.gin": 0.1, "gin/crosspt_target.gin": 0.2}
    assert warmup == warmups.get(name, 500)
    assert (value("BATCH_SIZE"), value("TRAIN_STEPS"), value("PROMPT_LENGTH")) == (
        batch_size,
        steps,
        100,
    )
    assert {rate.total_steps for rate in optimizer.learning_rates.values()} == {steps}


def test_t5_name_default_reads_config_of_hugging_face_folder(tmp_path):
    fields = {"model_type": "umt5", "vocab_size": 512, "d_model": 48, "num_heads": 3}
    fields |= {"num_layers": 2, "d_kv": 8, "d_ff": 40, "relative_attention_max_distance": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    backbone = f"INITIAL_CHECKPOINT_PATH = {str(tmp_path)!r}"
    parse([STAGE], [VOCABULARY, backbone, "config.t5_config.remat = 'full'"])
    assert value("T5_CONFIG") == T5Config(
        512, "bfloat16", 48, 3, 2, 2, 8, 40, ("gelu", "linear"), logits_via_embedding=True,
        relative_attention_max_distance=64, relative_bias_per_layer=True, remat="full",
        dropout_rate=0.1,
    )  # fmt: skip


def test_t5_name_default_without_folder_is_t5_base(tmp_path):
    parse([STAGE], [VOCABULARY, f"INITIAL_CHECKPOINT_PATH = {str(tmp_path / 'none')!r}"])
    assert value("T5_CONFIG") == t5_config("t5_1_0_base", dtype="bfloat16", dropout_rate=0.1)


def test_source_stage_distillation_matches_paper():
    parse(["gin/mpt_source.gin"], [VOCABULARY])
    model = value("MODEL")
    found = model.objective.distillation
    assert (found.weight, found.logits, found.hidden, found.temperature) == (0.9, True, True, 1.0)
    assert model.optimizer_def.absent_tasks == "dense"
    assert (model.runs.num_rows, model.runs.num_groups, model.prompt.rank) == (6, 1, 1)


def test_paths_gin_all_under_root(monkeypatch):
    monkeypatch.setenv(paths.ROOT_VARIABLE, "gs://bucket/project")
    parse(["gin/mpt_source.gin"])
    assert value("MODEL_DIR") == "gs://bucket/project/mpt_source"
    assert value("TEACHERS") == "gs://bucket/project/pt_source/artifact"
    for macro in ("INITIAL_CHECKPOINT_PATH", "VOCABULARY"):
        assert value(macro).startswith("gs://bucket/project/backbones/")


@pytest.mark.parametrize("entry", ["train", "eval", "infer"])
def test_missing_vocabulary_error_gives_download_command(entry, monkeypatch, tmp_path):
    monkeypatch.setenv(paths.ROOT_VARIABLE, str(tmp_path / "my root"))
    parse(files_for({"train": STAGE}.get(entry, f"gin/{entry}.gin")), (), entry)
    command = f"hf download google-t5/t5-base --local-dir '{tmp_path}/my root/backbones/t5-base'"
    assert value("BACKBONE_COMMAND") == command
    with pytest.raises(FileNotFoundError, match=f"To get one: {re.escape(command)}"):
        value("MODEL")
    monkeypatch.setenv(paths.ROOT_VARIABLE, "gs://bucket/x")
    assert "copy that folder to gs://bucket/x/backbones/t5-base" in value("BACKBONE_COMMAND")


@pytest.mark.parametrize("entry", ["eval", "infer"])
def test_eval_and_infer_gin_use_training_text_lengths(entry):
    parse([f"gin/{entry}.gin", "gin/methods/mpt.gin", "gin/tiny.gin"], (), entry)
    assert gin.query_parameter("DatasetConfig.task_feature_lengths").scoped_selector == (
        "TASK_FEATURE_LENGTHS/gin.macro"
    )
    assert value("TASK_FEATURE_LENGTHS") == {"inputs": 48, "targets": 12}


def test_paths_under_local_root_with_several_hosts_raises(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="4 hosts"):
        paths.under(base="runs", name="x")
    assert paths.under(base="gs://b", name="x") == "gs://b/x"
    assert paths.under(base="runs", name="x", shared_filesystem=True) == "runs/x"


@pytest.mark.parametrize("name", ["pretrain", "finetune", "eval", "infer"])
def test_t5x_run_files_without_t5x_parse(name):
    entry = {"pretrain": "train", "finetune": "train"}.get(name, name)
    model = f"@{entry}_script.{gin_utils.ENTRY_POINTS[entry]}"  # any reference
    bindings = {
        "MODEL": model, "MODEL_DIR": "'x'", "MIXTURE_OR_TASK_NAME": "'x'",
        "TASK_FEATURE_LENGTHS": "{}", "TRAIN_STEPS": "1", "INITIAL_CHECKPOINT_PATH": "'x'",
        "CHECKPOINT_PATH": "'x'", "EVAL_OUTPUT_DIR": "'x'", "INFER_OUTPUT_DIR": "'x'",
    }  # fmt: skip
    path = trainer_choice.FOLDER / "gin_data" / "t5x" / "configs" / "runs" / f"{name}.gin"
    used = [macro for macro in bindings if f"%{macro}\n" in path.read_text()]
    parse(
        [f"t5x/configs/runs/{name}.gin"],
        [f"{macro} = {bindings[macro]}" for macro in used],
        entry,
    )
    assert "MIXTURE_OR_TASK_NAME" in used and value("MIXTURE_OR_TASK_NAME") == "x"


# --- Mistakes ------------------------------------------------------------------------------------

STAGE = "gin/mpt_source.gin"


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("TRAIN_STEP = 3", "No gin file reads the macro TRAIN_STEP.*Did you mean TRAIN_STEPS"),
        ("train.total_step = 3", "no parameter 'total_step'.*Did you mean total_steps"),
        ("Distilation.weight = 1.0", "No gin file imports 'Distilation'.*Did you mean Distill"),
        ("losses.Distillation.wait = 1.0", "no parameter 'wait'"),
        ("NoSuchThing.seed = 1", "No gin file imports 'NoSuchThing'"),
        ("trian/DatasetConfig.batch_size = 3", "in the scope 'trian'.*Did you mean train"),
        ("t5_config.name = 't5_1_1_base", "Unable to parse value"),
        ("TRAIN_STEPS = %gin.REQUIRED", "need a value: TRAIN_STEPS"),
        ("TRAIN_STEPS = %STEPS_OF_TRAIN", "need a value: STEPS_OF_TRAIN"),
    ],
)
def test_parse_invalid_binding_error_names_it(binding, message):
    with pytest.raises(gin_utils.ConfigError, match=f"(?s){message}"):
        parse([STAGE], [binding])


def test_bound_argument_of_gin_partial_and_plain_class():
    parse([STAGE, "gin/tiny.gin"], ["PARTS = 3", "trainer.Trainer.num_microbatches = %PARTS"])
    argument = functools.partial(gin_check.bound_argument, parameter="num_microbatches")
    assert argument(gin.get_configurable(Trainer)) == 3
    assert argument(functools.partial(Trainer, num_microbatches=2)) == 2
    assert argument(functools.partial(Trainer, rows_by_run=True)) is None
    assert argument(Trainer) is None  # gin's values reach only what gin passes on


def test_parse_unused_binding_raises():
    with pytest.raises(gin_utils.ConfigError, match="would have no effect"):
        parse([STAGE, "gin/tiny.gin"], ["t5_config.name = 't5_1_1_base'"])


def test_parse_missing_file_suggests_closest():
    with pytest.raises(gin_utils.ConfigError, match="Did you mean gin/mpt_source.gin"):
        parse(["gin/mpt_sorce.gin"])


def test_parse_missing_include_names_it(tmp_path):
    (tmp_path / "x.gin").write_text("include 'gin/nothing.gin'\n")
    with pytest.raises(gin_utils.ConfigError, match="gin/nothing.gin"):
        parse([str(tmp_path / "x.gin")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("utils.DatasetConfg.seed = 1", "no 'DatasetConfg' .*line 3.*Did you mean DatasetConfig"),
        ("trainer.Trainer.num_microbatches = 2", "'trainer' was not provided"),
    ],
)
def test_parse_mistake_in_file_names_line(line, message, tmp_path):
    head = "from __gin__ import dynamic_registration\nfrom t5x import utils\n"
    (tmp_path / "x.gin").write_text(head + line + "\n")
    with pytest.raises(gin_utils.ConfigError, match=message) as caught:
        parse([str(tmp_path / "x.gin")])
    assert "line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "LERNING_RATE = 5.0",
            "reads the macro LERNING_RATE.*line 3.*Did you mean .*LEARNING_RATE",
        ),
        ("here/TRAIN_STEPS = 5", "reads the macro here/TRAIN_STEPS"),
    ],
)
def test_parse_unused_macro_in_user_file_raises(line, message, tmp_path):
    (tmp_path / "inner.gin").write_text(f"# A user's.\nTRAIN_STEPS = 7\n{line}\n")
    (tmp_path / "outer.gin").write_text(f"include '{tmp_path / 'inner.gin'}'\n")
    with pytest.raises(gin_utils.ConfigError, match=message) as caught:
        parse([STAGE, str(tmp_path / "outer.gin")])
    assert str(tmp_path / "inner.gin") in str(caught.value)


def test_parse_user_file_for_several_stages_works(tmp_path):
    """A file may set macros that another stage reads, or that the file itself reads."""
    (tmp_path / "suite.gin").write_text(
        "MINE = 7\nTRAIN_STEPS = %MINE\nTASK_LEARNING_RATE = 0.1\nTARGET_TASKS = ['toy_cb']\n"
    )
    parse(["gin/pt_source.gin", "gin/tiny.gin", str(tmp_path / "suite.gin")])
    assert value("TRAIN_STEPS") == 7


def test_start_from_without_initial_artifact_raises():
    start = "START_FROM = 'mnli'"
    with pytest.raises(gin_utils.ConfigError, match="Set INITIAL_ARTIFACT, or remove START_FROM"):
        parse(["gin/pt_target.gin"], [start])
    parse(["gin/pt_target.gin"], [start, "INITIAL_ARTIFACT = 'x'"])
    parse(["gin/mpt_target.gin"], [start])


def test_configured_files_of_other_entry_point_raise():
    parse([STAGE])
    with pytest.raises(gin_utils.ConfigError, match=r"configures evaluate\(\)"):
        gin_utils.configured(importlib.import_module("mpt_jax.eval").evaluate)


def test_rewrite_gin_args_matches_t5x():
    found = gin_utils.rewrite_gin_args(["x", "--gin.A=1=2", "--gin_file=f", "--gin.s/N.p='v'"])
    assert found == ["x", "--gin_bindings=A = 1=2", "--gin_file=f", "--gin_bindings=s/N.p = 'v'"]
    with pytest.raises(gin_utils.ConfigError, match="no value"):
        gin_utils.rewrite_gin_args(["--gin.A"])


def command(*arguments: str, entry: str = "train") -> str:
    """Runs a command line with a mistake of its author; returns the last line of its log."""
    child = run_python("-m", f"mpt_jax.{entry}", *arguments, check=False)
    assert child.returncode == 2, child.stderr[-3000:]
    assert "Traceback" not in child.stderr
    return child.stderr.splitlines()[-1]


@pytest.mark.slow  # the message is tested above; that it is one line, below
def test_command_flag_without_value_prints_one_line():
    assert command("--gin.TRAIN_STEPS").endswith(
        "--gin.TRAIN_STEPS has no value. Write --gin.TRAIN_STEPS=<value>."
    )


def test_command_flags_override_gin():
    files = [f"--gin_file=gin/{name}.gin" for name in ("infer", "methods/mpt", "tiny")]
    message = command(*files, "--gin.infer.shard_id=1", "--shard_id=5", entry="infer")
    assert "infer.shard_id must be in 0 .. 0, got 5" in message


# Runs in a separate process, because gin keeps what a configuration has registered.
REFERENCES = """
from mpt_jax.models import decoding
from mpt_jax.config import gin_utils
from mpt_jax.data import sampling
from mpt_jax.config import trainer_choice
from mpt_jax.prompts import init
trainer_choice.install_fallback()
import gin, mpt_jax.train as train
bindings = [
    "INIT_FACTORS = @init.signs",
    "SAMPLER = @sampling.PerExample()",
    "sampling.PerExample.batch_size = 4",
    "sampling.PerExample.seed = 5",
    "models.PromptedEncoderDecoder.decode_fn = @decoding.beam_search",
    "decoding.beam_search.num_decodes = 3",
    "train.total_steps = 9",
]
macro = lambda name: gin.get_configurable(name + "/gin.macro")()
with gin_utils.as_main(train):
    for again in (False, True):
        gin_utils.parse(["gin/mpt_source.gin", "gin/tiny.gin"] if not again else ["again.gin"],
                        () if again else bindings, (".", {folder!r}))
        model = macro("MODEL")
        assert model.prompt.init_factors.__wrapped__ is init.signs
        assert macro("SAMPLER") == sampling.PerExample(4, 5)
        assert model.decode_fn.__wrapped__ is decoding.beam_search
        assert gin.query_parameter("beam_search.num_decodes") == 3
        assert gin.query_parameter("train.total_steps") == 9
        open({folder!r} + "/again.gin", "w").write(gin_utils.config_str())
    try:
        gin_utils.parse(["gin/mpt_source.gin"], ["INIT_FACTORS = @init.sings"])
    except gin_utils.ConfigError as error:
        assert "has no 'sings'" in str(error) and "Did you mean signs" in str(error), error
"""


def test_parse_bindings_see_imports_of_files(tmp_path):
    script = REFERENCES.format(folder=str(tmp_path))
    run_script(script)


# --- config.gin ----------------------------------------------------------------------------------


def test_config_gin_parses_to_same_configuration(tmp_path):
    parse([STAGE, "gin/tiny.gin"], ["TRAIN_STEPS = 7"])
    gin_utils.summarize_gin_config(str(tmp_path / "run"), None, 0)
    written = (tmp_path / "run" / "config.gin").read_text()
    assert "TRAIN_STEPS = 7" in written and "import __main__ as train_script" in written
    parse([str(tmp_path / "run" / "config.gin")])
    assert gin.config_str() == written


def test_gin_helper_functions_return_expected_values():
    assert gin_utils.sum_fn(1, 2) == 3
    assert gin_utils.bool_fn(0) is False
    assert gin_utils.string_split_fn("a/b/c", "/") == ["a", "b", "c"]
    assert gin_utils.string_split_fn("a/b/c", "/", 1, -1) == "b/c"


def test_command_missing_data_prints_one_line(tmp_path):
    """The error is raised inside SeqIO, after the model is built."""
    bindings = ['--gin.TARGET_TASKS=["record"]', '--gin.TASK_MODULES=["mpt_jax.tasks.super_glue"]']
    files = [f"--gin_file=gin/{name}.gin" for name in ("mpt_target", "tiny")]
    folders = [f"--gin.ROOT='{tmp_path}'", f"--tfds_data_dir={tmp_path}"]
    message = command(*files, *bindings, *folders)
    assert "super_glue/record, version 1.0.2, is not in" in message and "tfds build" in message


def test_ctrl_c_before_training_ends_with_a_sentence():
    code = """
import signal
from mpt_jax.config import gin_utils
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
gin_utils.devices.check = lambda: signal.raise_signal(signal.SIGINT)
gin_utils.run_main(print)
"""
    ended = run_python("-c", code, check=False)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr
    sentence = "Stopped by Ctrl-C. The same command continues from the last save, if any."
    assert ended.stderr.splitlines()[-1].endswith(sentence)

"""Fleets from gin files on the toy suite: runs, batches, data and initial values."""

from __future__ import annotations

import gin
import jax
import numpy as np
import pytest
import seqio

from mpt_jax.data import datasets, sampling
from mpt_jax.training import optimizers
from tests.fixtures.gin_files import JOINT, TARGET, VOCABULARY, parse, value

pytestmark = pytest.mark.usefixtures("own_trainer")

FLEET, TASK_RATES, STARTS, INITS = (
    f"gin/runs/{name}.gin" for name in ("fleet", "fleet_task_rates", "fleet_starts", "fleet_inits")
)
SETTINGS = [
    "TARGET_TASKS = ['toy_rte', 'toy_cb']",
    "SHOTS = [4, 8]",
    "SEEDS = [0, 1]",
    "LEARNING_RATES = [0.1, 0.3]",
    "BATCH_SIZE = 4",
]


def train_config() -> datasets.DatasetConfig:
    return gin.get_configurable("train/utils.DatasetConfig")()


def test_fleet_gin_builds_all_runs():
    parse([TARGET, "gin/tiny.gin", FLEET], [*SETTINGS, "TASK_STEPS = {'toy_cb': 200}"])
    model = value("MODEL")
    assert model.runs.num_rows == model.runs.num_groups == 16
    assert model.runs.run_names[:2] == ("toy_rte_k4_s0_lr0.1", "toy_rte_k4_s0_lr0.3")
    schedule = model.optimizer_def.learning_rates["shared"]
    assert schedule.peak == [0.1, 0.3] * 8 and schedule.total_steps == [300] * 8 + [200] * 8
    assert model.optimizer_def.learning_rates["task"].peak == 0.4
    # Every run has as many examples as a single run.
    config = train_config()
    assert config.batch_size == value("SAMPLER").batch_size == 16 * 4
    assert sampling.has_equal_shares(config)


def test_fleet_gin_every_setting_multiplies_runs():
    rates = ["TASK_LEARNING_RATES = [0.2, 0.4]", "STARTS = ['average', 'toy_mnli']"]
    parse([TARGET, "gin/tiny.gin", FLEET, TASK_RATES, STARTS], [*SETTINGS, *rates])
    model = value("MODEL")
    assert model.runs.num_rows == 64
    last = "toy_cb_k8_s1_lr0.3_tlr0.4_from_toy_mnli"
    assert model.runs.run_names[-1] == last and model.prompt.start_from[last] == "toy_mnli"
    assert model.optimizer_def.learning_rates["task"].peak == [0.2, 0.2, 0.4, 0.4] * 16
    assert isinstance(model.optimizer_def, optimizers.PromptOptimizer)


@pytest.mark.parametrize("stage", ["gin/pt_target.gin", "gin/spot_target.gin"])
def test_fleet_gin_supports_prompt_tuning(stage):
    parse([stage, "gin/tiny.gin", FLEET], SETTINGS)
    model = value("MODEL")
    assert model.runs.num_groups == 16
    assert model.optimizer_def.learning_rates["task"].peak == [0.1, 0.3] * 8


def test_target_stage_several_tasks_are_independent_unless_joined():
    targets = [VOCABULARY, "TARGET_TASKS = ['boolq', 'wic', 'cb']"]
    parse([TARGET], targets)
    assert value("MODEL").runs.num_groups == 3 and value("GLOBAL_BATCH_SIZE") == 3 * 32
    parse([TARGET, JOINT], targets)
    assert value("MODEL").runs.num_groups == 1 and value("GLOBAL_BATCH_SIZE") == 32
    assert value("SAMPLER").batch_size == 32
    parse(["gin/full_finetuning.gin"], targets)  # one backbone, trained on all tasks jointly
    assert value("MODEL").runs.num_groups == 1 and value("GLOBAL_BATCH_SIZE") == 32


def test_fleet_runs_differing_in_settings_read_same_examples():
    parse([TARGET, "gin/tiny.gin", FLEET], SETTINGS)
    model = value("MODEL")
    batches = [next(datasets.train_iterator(train_config(), model.FEATURE_CONVERTER_CLS))]
    tokens = batches[0]["encoder_input_tokens"].reshape(16, 4, -1)
    rows = batches[0]["encoder_task_ids"].reshape(16, 4, -1)
    assert (rows[:, :, 0] == np.arange(16)[:, None]).all()
    for run in range(0, 16, 2):
        np.testing.assert_array_equal(tokens[run], tokens[run + 1])
    assert len({tokens[run].tobytes() for run in range(0, 16, 2)}) == 8, "draws and k differ"
    # Data depend only on the name, so a run has the same data in any fleet.
    alone = sampling.task_mixture(["toy_rte_k4_s1_lr0.7"], sampling.EqualQuotas(4, 42))
    other = sampling.task_mixture(["toy_rte_k4_s1"], sampling.EqualQuotas(4, 42))
    streams = [
        seqio.get_mixture_or_task(name).get_dataset({"inputs": 48, "targets": 12}, shuffle=True)
        for name in (alone, other)
    ]
    for first, second in zip(*(s.take(12).as_numpy_iterator() for s in streams), strict=True):
        np.testing.assert_array_equal(first["inputs"], second["inputs"])
        assert first["task_ids"] != second["task_ids"], "each run has a separate prompt"


def test_fleet_initial_values_depend_only_on_seed():
    parse(["gin/pt_target.gin", "gin/tiny.gin", FLEET], SETTINGS)
    embedding = jax.random.normal(jax.random.PRNGKey(1), (512, 8))
    table = np.asarray(value("MODEL").init_prompt(jax.random.PRNGKey(0), embedding)["table"])
    np.testing.assert_array_equal(table[0::2], table[1::2])
    assert len({prompt.tobytes() for prompt in table}) == 8


def test_fleet_runs_use_their_own_initializer():
    both = "INITS = {'vocabulary': @init.SampledVocabulary(), 'random': @init.Uniform()}"
    few = ["TARGET_TASKS = ['toy_rte']", "SEEDS = [0, 1]"]
    parse(["gin/pt_target.gin", "gin/tiny.gin", FLEET, INITS], [*few, both])
    model, embedding = value("MODEL"), jax.random.normal(jax.random.PRNGKey(1), (512, 8))
    assert model.runs.run_names == (
        "toy_rte_s0_init_vocabulary", "toy_rte_s0_init_random",
        "toy_rte_s1_init_vocabulary", "toy_rte_s1_init_random",
    )  # fmt: skip
    table = np.asarray(model.init_prompt(jax.random.PRNGKey(0), embedding)["table"])
    words = {row.tobytes() for row in np.asarray(embedding)}
    drawn = [all(row.tobytes() in words for row in prompt) for prompt in table]
    assert drawn == [True, False, True, False] and np.abs(table[1::2]).max() <= 0.5
    assert (table[0] != table[2]).any()


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        ("SEEDS = []", "SEEDS must be a non-empty list"),
        ("LEARNING_RATES = [0.1, 0.1]", "more than once"),
        ("TARGET_TASKS = ['toy_rt']", "Unknown task 'toy_rt_k4_s0_lr0.1'.*toy_rte"),
        ("TARGET_TASKS = ['toy_rte', 'toy_rte']", "more than once"),
    ],
)
def test_fleet_gin_invalid_binding_raises(binding, says):
    parse([TARGET, "gin/tiny.gin", FLEET], [*SETTINGS, binding])
    with pytest.raises(ValueError, match=says):
        train_config()

"""A step on only the bank rows of a batch, against a step on the whole bank."""

import functools

import jax
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training import sparse_step, train_step
from tests.fixtures import tiny

RUNS = Runs([f"task_{i}" for i in range(12)])
# Rows repeat, some return later, one batch has padding, and the last row is included.
BATCHES = [[3, 3, 7], [7, 1, 11], [3, None, 0], [1, 11, 11]]


def made(prompt, labels=(), **overrides):
    overrides = {"absent_tasks": "hold", "clip_norm": 0.5, **overrides}
    objective = Objective(distillation=Distillation())
    optimizer = tiny.optimizer(**overrides)
    return tiny.model(RUNS, prompt, objective=objective, optimizer_def=optimizer, labels=labels)


def steps(model, wrap, pack=None):
    """Returns the last state, and the metrics of each step over the batches."""
    step = lambda model, state, batch: train_step.train_step(model, 1, state, batch, KEY)  # noqa: E731
    compiled = jax.jit(functools.partial(wrap, step, model))
    state, found = tiny.state(model, tiny.params(model)), []
    for number, rows in enumerate(BATCHES):
        batch = tiny.batch(rows, seed=number)
        batch = tiny.pack(batch, pack) if pack else batch
        state, metrics = compiled(state, tiny.arrays(batch))
        found.append(metrics)
    return state, found


KEY = jax.random.PRNGKey(0)


def on_the_whole_bank(step, model, state, batch):
    return step(model, state, batch)


FROZEN_LEFT = (("prompt/task_left", "frozen"),)


@pytest.mark.parametrize(
    ("prompt", "pack", "labels"),
    [
        pytest.param(MPT(tiny.PROMPT, rank=2), None, FROZEN_LEFT, marks=pytest.mark.slow),
        (MPT(tiny.PROMPT), None, ()),
        pytest.param(PromptTuning(tiny.PROMPT), [[0, 2, 1]], (), marks=pytest.mark.slow),
    ],
)
def test_step_of_batch_matches_step_on_whole_bank(prompt, pack, labels):
    model = made(prompt, labels)
    whole, expected = steps(model, on_the_whole_bank, pack)
    small, found = steps(model, sparse_step.step_of_batch, pack)
    tiny.close(small.trainable, whole.trainable, 1e-6)
    tiny.close(small.opt_state, whole.opt_state, 1e-6)
    for one, other in zip(found, expected, strict=True):
        tiny.close(one, other, 1e-5)
    start = flatten(tiny.state(model, tiny.params(model)).trainable)
    absent = [row for row in range(12) if not any(row in batch for batch in BATCHES)]
    for name, leaf in flatten(small.trainable).items():
        if model.rows[name] == "tasks":
            np.testing.assert_array_equal(leaf[np.array(absent)], start[name][np.array(absent)])


def test_most_rows_none_when_whole_bank_is_needed():
    batch = tiny.arrays(tiny.batch([0, 1, 2]))
    assert sparse_step.most_rows(made(MPT(tiny.PROMPT)), batch) == 3
    assert sparse_step.most_rows(made(MPT(tiny.PROMPT), absent_tasks="dense"), batch) is None
    packed = tiny.pack(tiny.batch([0, 1, 2, 3]), [[0, 1], [2, 3]])
    positions = packed["encoder_input_tokens"].shape[1]  # prompts alone may fill a row
    assert sparse_step.most_rows(made(MPT(8)), tiny.arrays(packed)) == 2 * (positions // 8)
    many = tiny.arrays(tiny.batch([0] * 7))
    assert sparse_step.most_rows(made(MPT(tiny.PROMPT)), many) is None, "half of the bank"
    apart = Runs(RUNS.task_names, groups="independent")
    alone = tiny.model(apart, optimizer_def=tiny.optimizer(absent_tasks="hold"))
    assert sparse_step.most_rows(alone, batch) is None


@pytest.mark.slow
def test_step_of_batch_memory_independent_of_bank_size(optimized):
    """Apart from inputs and outputs, updated in place, a larger bank needs no more memory."""

    def temporaries(rows, wrap):
        runs = Runs([f"task_{i}" for i in range(rows)])
        optimizer = tiny.optimizer(absent_tasks="hold")
        model = tiny.model(runs, config=tiny.config(num_encoder_layers=1), optimizer_def=optimizer)
        step = lambda model, state, batch: train_step.train_step(model, 1, state, batch, KEY)  # noqa: E731
        state = tiny.state(model, tiny.params(model))
        compiled = jax.jit(functools.partial(wrap, step, model), donate_argnums=0)
        batch = tiny.arrays(tiny.batch([0, 1, 2]))
        return compiled.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    many = 512
    factors = 4 * many * (tiny.PROMPT + tiny.WIDTH)  # bytes
    dense = temporaries(many, on_the_whole_bank) - temporaries(64, on_the_whole_bank)
    small, large = (temporaries(n, sparse_step.step_of_batch) for n in (64, many))
    assert dense > factors / 2 and large - small < factors / 8, (dense, small, large)

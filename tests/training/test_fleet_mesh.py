"""Fleets: runs split over the devices of a mesh train as they do on one device."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner, to_host
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.state import create_train_state
from mpt_jax.training.trainer import Trainer
from tests.fixtures import tiny

RUNS = Runs([f"run_{i:02}" for i in range(16)], groups="independent")
ROWS = np.repeat(np.arange(16), 2).tolist()
CONFIG = tiny.config(num_heads=8, mlp_activations=("gelu", "linear"))


def make(method, **mesh) -> Trainer:
    # Two runs end early, and run 3's learning rate is too high.
    totals = [3] * 2 + [40] * 14
    schedule = Schedule([0.03] * 3 + [1e38] + [0.03] * 12, totals)
    labels = {label for _, label in method.labels} - {"frozen", "clock"}
    optimizer = PromptOptimizer(dict.fromkeys(labels, schedule))
    model = tiny.model(RUNS, method, CONFIG, optimizer_def=optimizer)
    partitioner = PjitPartitioner(**mesh)
    tree = jax.tree.map(jax.numpy.array, tiny.params(model))
    state = create_train_state(model, tree, partitioner, rows_by_run=True)
    return Trainer(model, state, partitioner, jax.random.PRNGKey(0), 2, rows_by_run=True)


def train(made: Trainer) -> dict[str, np.ndarray]:
    for seed in range(6):
        made.train(tiny.batch(ROWS, seed=seed))
        made.read_metrics()
        made.compact_batches()
    assert made.ended[:4].tolist() == [3, 3, -1, 1] and made.failed.sum() == 1
    return flatten(to_host(made.state.trainable))


# A low temperature: gradients near zero differ by rounding, and Adam divides by their size.
ATTEMPTED = ATTEMPT(tiny.PROMPT, tiny.SOURCES, width=4, temperature=4.0)
# Draws depend on run names, so not on the device of a run; the shortest run takes three steps.
CROSSED = CrossPT(tiny.PROMPT, tiny.SOURCES, share="learned", annealing=Annealing(steps=3))
MESHES = {"8 x 1": {}, "4 x 2": {"num_partitions": 2}}


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        pytest.param(MPT(tiny.PROMPT), "8 x 1", id="mpt, 8 x 1"),
        pytest.param(MPT(tiny.PROMPT), "4 x 2", id="mpt, 4 x 2", marks=pytest.mark.slow),
        pytest.param(PromptTuning(tiny.PROMPT), "8 x 1", id="pt, 8 x 1", marks=pytest.mark.slow),
        pytest.param(ATTEMPTED, "8 x 1", id="attempt, 8 x 1", marks=pytest.mark.slow),
        pytest.param(CROSSED, "8 x 1", id="crosspt, 8 x 1", marks=pytest.mark.slow),
    ],
)
def test_fleet_runs_split_over_devices_match_one_device(method, mesh):
    alone = train(make(method, devices=jax.devices()[:1]))
    made = make(method, **MESHES[mesh])
    shards = made.partitioner.mesh.shape["data"]
    batch = made.partitioner.shard_batch(tiny.batch(ROWS))
    text = made.lower(batch)["train"].compile().as_text()
    # Parameters, moments and so gradients are split by runs, and no device gathers a whole table.
    leaves = jax.tree.leaves((made.state.trainable, made.state.opt_state))
    tables = [leaf for leaf in leaves if leaf.ndim > 1]
    prompt = made.state.trainable["prompt"]
    assert len(tables) >= 3 * sum(leaf.ndim > 1 for leaf in prompt.values())
    for leaf in tables:
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 16 // shards
    smallest = tiny.PROMPT * 16  # elements of all runs in the smallest table
    assert sizes(text, "all-reduce"), "the search should find a collective"
    assert max([0, *sizes(text, "all-gather")]) < smallest
    assert max([0, *sizes(text, "all-to-all"), *sizes(text, "collective-permute")]) < smallest
    if mesh == "8 x 1":  # a model axis adds up activations too
        mixed = 16 * (len(method.candidates) + 2) if method.candidates else 0
        assert max(sizes(text, "all-reduce")) <= 2 * 16 + 8 + mixed, "losses and counts by run"
    found = train(made)
    for name, leaf in alone.items():
        np.testing.assert_allclose(found[name], leaf, 1e-5, 1e-5, name)
    assert made._train_step._cache_size() == 1


def sizes(text: str, kind: str) -> list[int]:
    """Returns the number of elements in each result of a collective."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) {kind}(-start)?\(", line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append(int(np.prod([int(n) for n in shape.split(",") if n] or [1])))
    return found


def test_create_train_state_one_device_does_not_split_runs():
    partitioner = PjitPartitioner()
    assert not partitioner.splits_runs(RUNS)  # one device
    state = create_train_state(
        model := tiny.model(RUNS, MPT(tiny.PROMPT)),
        jax.tree.map(jax.numpy.array, tiny.params(model)),
        partitioner,
        rows_by_run=True,
    )
    leaf = state.trainable["prompt"]["shared"]
    assert leaf.sharding.shard_shape(leaf.shape) == leaf.shape


@pytest.mark.devices(8)
def test_splits_runs_only_independent_divisible_runs():
    partitioner = PjitPartitioner()
    assert partitioner.splits_runs(RUNS)
    assert not partitioner.splits_runs(Runs(RUNS.task_names[:12], groups="independent"))
    assert not partitioner.splits_runs(Runs(RUNS.task_names))
    assert not partitioner.splits_runs(Runs(RUNS.task_names, groups=[1, 0, *range(2, 16)]))

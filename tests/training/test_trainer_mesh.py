"""The trainer on meshes of eight devices against the trainer on one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.training.partitioning import PjitPartitioner, standard_logical_axis_rules, to_host
from mpt_jax.training.state import create_train_state
from mpt_jax.training.trainer import Trainer
from tests.fixtures import tiny

STEPS, TOLERANCE = 5, 1e-5
TARGETS = 20  # more than one chunk of the losses over the vocabulary
MESHES = {
    "data 8": {"num_partitions": 1},
    "model 8": {"num_partitions": 8},
    "data 2, model 4": {"num_partitions": 4},
    "data 4, model 2, two dims": {
        "num_partitions": 2,
        "logical_axis_rules": standard_logical_axis_rules(2, 2),
    },
}


def train(partitioner: PjitPartitioner) -> tuple[list[dict[str, float]], dict, Trainer]:
    """Trains MPT with teachers; returns metrics of steps and an evaluation, parameters, trainer."""
    config = tiny.config(num_heads=8)  # eight divides the length of every axis that is split
    model = tiny.model(
        config=config,
        objective=Objective(distillation=Distillation()),
        optimizer_def=tiny.optimizer(0.03),
    )
    tree = jax.tree.map(jax.numpy.array, tiny.params(model))
    state = create_train_state(model, tree, partitioner)
    trainer = Trainer(model, state, partitioner, jax.random.PRNGKey(0))
    found = []
    for seed in range(STEPS):
        rows = np.random.default_rng(seed).integers(0, 3, 8).tolist()
        trainer.train(tiny.batch(rows, seed=seed, targets=TARGETS))
        found.append(trainer.read_metrics())
    assert trainer._train_step._cache_size() == 1, "a step was compiled again"
    last = tiny.batch([0, 1, 2, None, 2, 1, 0, 0], seed=99, targets=TARGETS)
    found.append(trainer.evaluate([last]))
    return found, to_host(trainer.state.trainable), trainer


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "names",
    [["data 2, model 4"], pytest.param(list(MESHES), marks=pytest.mark.slow)],
    ids=["two dims", "all"],
)
def test_trainer_meshes_match_losses_of_one_device(names):
    expected, learned, _ = train(PjitPartitioner(devices=jax.devices()[:1]))
    assert {"term/kl", "term/hidden_encoder", "term/hidden_decoder"} <= set(expected[0])
    for name in names:
        found, params, trainer = train(PjitPartitioner(**MESHES[name]))
        for step, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert one.keys() == other.keys()
            for metric, value in one.items():
                scale = max(1.0, abs(value))
                off = abs(other[metric] - value) / scale
                assert off <= TOLERANCE, f"{name}, step {step}, {metric}: {other[metric]} {value}"
        tiny.close(params, learned, TOLERANCE, f"{name}: ")
        if name != "data 8":
            weights = trainer.state.frozen["encoder"]["layers_0"]["mlp"]["wi"]["kernel"]
            assert weights.addressable_shards[0].data.size < weights.size, (
                "the model should be split"
            )

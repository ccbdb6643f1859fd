"""Meshes, logical axes, and steps that do not depend on the number of devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.training import train_step, trainer
from mpt_jax.training.partitioning import PjitPartitioner, put_like, standard_logical_axis_rules
from mpt_jax.training.state import create_train_state, param_shapes
from tests.fixtures import tiny

GROUPED = Runs(tiny.RUNS.task_names, groups=[1, 0, 1])


def specs_of(partitioner: PjitPartitioner) -> dict[str, tuple]:
    """Returns path name -> mesh axes of every parameter, without trailing Nones."""
    model = tiny.model(objective=Objective(distillation=Distillation()))
    params, axes = param_shapes(model)
    found = flatten(partitioner.shardings(params, axes), is_leaf=lambda x: hasattr(x, "spec"))
    assert set(found) == set(flatten(params)), "every parameter should have a sharding"
    return {name: tuple(sharding.spec) for name, sharding in found.items()}


def test_partitioner_splits_weights_and_replicates_prompts():
    specs = specs_of(PjitPartitioner())
    assert specs["encoder/layers_0/mlp/wi/kernel"] == (None, "model")
    assert specs["encoder/layers_0/mlp/wo/kernel"] == ("model", None)
    assert specs["decoder/layers_0/self_attention/query/kernel"] == (None, "model")
    assert specs["token_embedder/embedding"] == ("model", None)
    for name, spec in specs.items():
        if name.startswith(("prompt/", "teacher/")):
            assert set(spec) <= {None}, name


def test_standard_rules_two_parameter_dims_split_width():
    rules = standard_logical_axis_rules(parameter_partitioning_dims=2)
    specs = specs_of(PjitPartitioner(logical_axis_rules=rules))
    assert specs["encoder/layers_0/mlp/wi/kernel"] == ("data", "model")


def test_standard_rules_additional_rules_take_precedence():
    rules = standard_logical_axis_rules(additional_rules=(("mlp", None),))
    specs = specs_of(PjitPartitioner(logical_axis_rules=rules))
    assert set(specs["encoder/layers_0/mlp/wi/kernel"]) <= {None}


def test_partitioner_missing_rule_or_axes_error_names_parameter():
    model = tiny.model()
    params, axes = param_shapes(model)
    rules = [rule for rule in standard_logical_axis_rules() if rule[0] != "rank"]
    with pytest.raises(ValueError, match="axes rank of prompt/task_left"):
        PjitPartitioner(logical_axis_rules=rules).shardings(params, axes)
    with pytest.raises(ValueError, match="prompt/extra has no logical axes"):
        PjitPartitioner().shardings({"prompt": {"extra": np.ones(2)}}, axes)


@pytest.mark.parametrize(
    "dims", [{"activation_partitioning_dims": 3}, {"parameter_partitioning_dims": 0}]
)
def test_standard_rules_dims_out_of_range_error(dims):
    with pytest.raises(ValueError, match="1 or 2"):
        standard_logical_axis_rules(**dims)


@pytest.mark.parametrize("partitions", [0, 3])
def test_partitioner_indivisible_devices_error(partitions):
    with pytest.raises(ValueError, match=f"num_partitions={partitions} does not divide the 1 "):
        PjitPartitioner(partitions)


def test_put_like_moments_sharded_like_parameters():
    partitioner = PjitPartitioner()
    shardings = {"a": {"w": partitioner.batch_sharding}, "b": partitioner.replicated}
    state = {"mu": {"a": {"w": np.ones(2)}, "b": np.ones(2)}, "count": np.zeros(())}
    placed = flatten(put_like(state, shardings, partitioner.replicated))
    assert placed["mu/a/w"].sharding.spec == PartitionSpec("data")
    assert placed["mu/b"].sharding.spec == placed["count"].sharding.spec == PartitionSpec()


@pytest.mark.slow
@pytest.mark.devices(4)
def test_train_step_four_device_meshes_match_one_device():
    assert jax.device_count() == 4
    model = tiny.model(GROUPED, objective=Objective(distillation=Distillation()))
    params = tiny.params(model)
    batch = tiny.batch([0, 1, None, 2, 1, 0, 2, 0])
    state = tiny.state(model, params)
    alone = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), state)
    step = jax.jit(functools.partial(train_step.train_step, model, 1))
    expected, _ = step(alone, tiny.arrays(batch), jax.random.PRNGKey(0))
    for partitions in (1, 2):
        partitioner = PjitPartitioner(partitions)
        state = create_train_state(model, jax.tree.map(np.asarray, params), partitioner)
        made = trainer.Trainer(model, state, partitioner, jax.random.PRNGKey(0), 2)
        kernel = made.state.frozen["encoder"]["layers_0"]["mlp"]["wi"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (16, 24 // partitions)
        made.train(batch)
        assert np.isfinite(made.read_metrics()["loss"])
        tiny.close(made.state.trainable, expected.trainable, 1e-5, f"{partitions} partitions: ")

"""Meshes over several slices: order, errors, and training over two slices."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

from mpt_jax.artifacts import artifacts
from mpt_jax.config import gin_utils
from mpt_jax.core.tree import flatten
from mpt_jax.training.partitioning import PjitPartitioner, standard_logical_axis_rules
from tests.fixtures.processes import run_script

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh reads."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(slices: int, processes: int, each: int, **kind: str) -> list[Device]:
    """Returns devices of several slices and processes, numbered slice by slice."""
    every = range(slices * processes * each)
    return [Device(i, i // each, i // (each * processes), **kind) for i in every]


def ids(partitioner: PjitPartitioner) -> np.ndarray:
    return np.vectorize(lambda device: device.id)(partitioner.mesh.devices)


@pytest.mark.parametrize(
    "ici, dcn",
    [((1, 2, 2), (4, 1, 1)), ((1, 2, 2), (1, 4, 1)), ((1, 2, 2), (2, 2, 1)), ((2, 1, 2), (4, 1, 1)),
     ((2, 2, 1), (4, 1, 1)), ((1, 1, 4), (4, 1, 1)), ((1, 4, 1), (2, 2, 1))],
)  # fmt: skip
def test_partitioner_mesh_equals_t5x_hybrid_mesh(ici, dcn):
    found = list(reversed(devices(4, 1, 4)))  # except on TPUs, a process is a slice
    made = PjitPartitioner(ici_mesh_shape=ici, dcn_mesh_shape=dcn, devices=found)
    # T5X calls the same function, but by slice_index, which CPUs do not have.
    expected = mesh_utils.create_hybrid_device_mesh(
        ici, dcn, sorted(found, key=lambda device: device.id), process_is_granule=True
    )
    assert made.mesh.axis_names == ("replica", "data", "model")
    assert ids(made).tolist() == np.vectorize(lambda device: device.id)(expected).tolist()


def test_partitioner_batch_sharded_by_process_over_both_axes():
    made = PjitPartitioner(
        ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1), devices=devices(2, 1, 4)
    )
    assert ids(made).reshape(-1, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert made.batch_sharding.spec == PartitionSpec(("replica", "data"))
    rules = dict(reversed(made.logical_axis_rules))
    assert rules["batch"] == ("replica", "data") and rules["mlp"] == "model"


def test_partitioner_keeps_weights_sharded_over_data():
    rules = standard_logical_axis_rules(parameter_partitioning_dims=2)
    made = PjitPartitioner(
        logical_axis_rules=rules, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1),
        devices=devices(2, 1, 4),
    )  # fmt: skip
    assert ("embed", "data") in made.logical_axis_rules


def test_partitioner_without_shapes_uses_one_data_axis():
    made = PjitPartitioner(num_partitions=2, devices=devices(2, 2, 4))
    assert made.mesh.shape == {"data": 8, "model": 2}
    assert [{i // 4 for i in row} for row in ids(made).tolist()] == [
        {0}, {0}, {1}, {1}, {2}, {2}, {3}, {3},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ici, dcn, message",
    [
        ((1, 4, 1), None, "both must be given"),
        ((4, 1), (2, 1), "both must be given, as three sizes"),
        ((1, 4, 0), (2, 1, 1), "three sizes"),
        ((1, 2, 1), (2, 1, 1), "needs 2 slices of 2 devices, but this job has 2 slices of 4"),
        ((1, 4, 1), (4, 1, 1), "needs 4 slices of 4 devices, but this job has 2 slices of 4"),
        ((1, 2, 2), (1, 1, 2), "one model over 2 slices, and the network between them is slow"),
        ((2, 2, 1), (1, 2, 1), r"alternate the rows.*dcn_mesh_shape=\(2, 1, 1\)"),
    ],
)
def test_partitioner_mismatched_shapes_raise_with_numbers(ici, dcn, message):
    with pytest.raises(ValueError, match=message) as error:
        PjitPartitioner(ici_mesh_shape=ici, dcn_mesh_shape=dcn, devices=devices(2, 1, 4))
    assert f"ici_mesh_shape={ici} with dcn_mesh_shape={dcn}" in str(error.value)


def test_partitioner_invalid_model_axis_raises():
    shapes = {"ici_mesh_shape": (1, 1, 4), "dcn_mesh_shape": (2, 1, 1)}
    with pytest.raises(ValueError, match="give the model axis two sizes"):
        PjitPartitioner(2, **shapes, devices=devices(2, 1, 4))
    assert PjitPartitioner(4, **shapes, devices=devices(2, 1, 4)).mesh.shape["model"] == 4
    # T5X's megascale devices: two processes of two chips a slice.
    tpu = {"platform": "tpu", "device_kind": "fake"}
    with pytest.raises(ValueError, match="several processes of 2 devices each"):
        PjitPartitioner(4, devices=devices(2, 2, 2, **tpu))
    with pytest.raises(ValueError, match="of devices: 2 in process 0, 4 in process 1"):
        PjitPartitioner(2, devices=[*devices(1, 1, 2), *devices(1, 2, 4)[4:]])


# --- Two processes of two devices each, as two slices -------------------------------------------

STAGE = (
    "--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin", "--gin.TRAIN_STEPS=4",
    "--gin.EVAL_PERIOD=4", "--gin.EVAL_STEPS=1", "--gin.EVALUATOR_NUM_EXAMPLES=8",
    "--gin.LEARNING_RATE=0.01", "--gin.train.actions={}",
    "--gin.paths.under.shared_filesystem=True",
)  # fmt: skip
SLICES = (
    "--gin.partitioning.PjitPartitioner.ici_mesh_shape=(1, 1, 2)",
    "--gin.partitioning.PjitPartitioner.dcn_mesh_shape=(2, 1, 1)",
)


def start(root: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "MPT_JAX_ROOT": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "mpt_jax.train", *STAGE, *more],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def learned(root: Path) -> dict[str, np.ndarray]:
    params = artifacts.load_artifact(root / "tiny" / "mpt_source" / "artifact").params
    return {name: np.asarray(value) for name, value in flatten(params).items()}


@pytest.mark.slow
def test_training_two_slices_same_prompts_as_one_device(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    job = (*SLICES, f"--coordinator_address={address}", "--process_count=2")
    alone = [start(tmp_path / "one")]
    two = [start(tmp_path / "two", *job, f"--process_index={i}", devices=2) for i in range(2)]
    for child in alone + two:
        log = child.communicate(timeout=600)[1]
        assert child.returncode == 0, log[-4000:]
    one, both = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert sorted(one) == sorted(both)
    for name, value in one.items():
        # Sums over rows and over sharded weights have another order.
        np.testing.assert_allclose(both[name], value, atol=1e-5, rtol=0, err_msg=name)


# --- Two slices of TPUs, ahead of time -----------------------------------------------------------

COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from mpt_jax.training.partitioning import PjitPartitioner

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
made = PjitPartitioner(
    ici_mesh_shape=(1, 4, 4), dcn_mesh_shape=(2, 1, 1), devices=topology.devices
)
def shape(dims, *axes):
    sharding = NamedSharding(made.mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)
def loss(weights, x):
    return jnp.mean((jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)
weights = shape((256, 512), None, "model"), shape((512, 256), "model", None)
x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=made.batch_sharding)
print(jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text())
"""


MESHES = """
import math
from jax.experimental import topologies
from mpt_jax.training.partitioning import PjitPartitioner

for name in ("v5e:4x4", "v5p:2x2x2", "v6e:4x4"):
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    for size in (1, 2, 4):
        mesh = PjitPartitioner(size, devices=chips).mesh
        hosts = [{chip.process_index for chip in row} for row in mesh.devices]
        assert hosts == sorted(hosts, key=min) and all(len(each) == 1 for each in hosts), name
        for row in mesh.devices:
            sides = [max(at) - min(at) + 1 for at in zip(*(chip.coords for chip in row))]
            assert math.prod(sides) == size, (name, size, sides)
        print(name, dict(mesh.shape))
"""


def ahead_of_time(script: str) -> str:
    """Returns the output of a script that compiles for absent chips."""
    pytest.importorskip("libtpu", reason="pip install jax[tpu]: its compiler needs no chip")
    variables = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return run_script(script, timeout=300, JAX_PLATFORMS="cpu", **variables)


@pytest.mark.slow
def test_partitioner_two_tpu_slices_reduce_inside_send_across():
    """Chips are numbered 0 to 15 in each slice. The model's sums stay in rows of four of one host,
    and traffic between slices is sent, not reduced by all."""
    text = ahead_of_time(COMPILE)
    groups = set(re.findall(r"replica_groups=\{(\{.*?\})\}", text))
    assert "{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}" in groups
    assert all(int(chip) < 16 for group in groups for chip in re.findall(r"\d+", group))
    assert re.search(r"\bsend\(", text) and re.search(r"\brecv\(", text)


@pytest.mark.slow
def test_partitioner_model_axis_is_block_of_chips_of_one_host():
    assert len(ahead_of_time(MESHES).splitlines()) == 9


# --- Start of distributed processes --------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, flags, expected",
    [
        ({}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}, {}),
        ({"MPT_JAX_DISTRIBUTED": "1"}, {}, {}),
        ({"MPT_JAX_DISTRIBUTED": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, {}, None),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, {"coordinator_address": "h:1"}),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1"},
            {"coordinator_address": "h:2", "initialization_timeout": 9},
            {"coordinator_address": "h:2", "initialization_timeout": 9},
        ),
    ],
)
def test_start_processes_follows_environment_and_flags(monkeypatch, environment, flags, expected):
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "MPT_JAX_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    values = collections.defaultdict(lambda: None, heartbeat_timeout=100, **flags)
    monkeypatch.setattr(gin_utils.flags, "FLAGS", Values(values))
    gin_utils._start_processes()
    for given in joined:
        given.pop("heartbeat_timeout_seconds", None)
    assert joined == ([] if expected is None else [expected])


class Values:
    """Flags that are None unless set."""

    def __init__(self, given):
        self._given = given

    def __getattr__(self, name):
        return self._given[name]

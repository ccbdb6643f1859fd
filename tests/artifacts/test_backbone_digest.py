"""One backbone has one digest, whatever its file, precision or form; another has another."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.convert import load_backbone
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.runtime import paths
from tests.fixtures.hf_checkpoints import convert, hf_folder


@pytest.fixture(scope="module", params=["1_1", "umt5"])
def formats(request, tmp_path_factory):
    """One backbone in all formats; umT5 has a relative position table in every layer."""
    folder = tmp_path_factory.mktemp("formats")
    found = {"hf": hf_folder(folder / "hf", request.param)}
    for name, to, dtype in (
        ("t5x", "t5x", "float32"),
        ("orbax", "orbax", "float32"),
        ("hf_bfloat16", "hf", "bfloat16"),
        ("t5x_bfloat16", "t5x", "bfloat16"),
    ):
        target = folder / name / ("" if to == "hf" else "checkpoint_0")
        target.parent.mkdir(exist_ok=True)
        convert(found["hf"], target, "--to", to, "--dtype", dtype, "--no-logits")
        found[name] = target
    return {name: load_backbone(path) for name, path in found.items()}


def test_backbone_digest_same_in_every_format_and_precision(formats):
    assert len({backbone_digest(params) for params in formats.values()}) == 1


def test_backbone_digest_same_for_stacked_layers_any_order_and_device_arrays(formats):
    params = formats["hf"]
    expected = backbone_digest(params)
    assert backbone_digest(stack_layers(params)) == expected
    assert backbone_digest(unflatten(dict(reversed(flatten(params).items())))) == expected
    on_device = {name: jnp.asarray(leaf) for name, leaf in flatten(params).items()}
    assert backbone_digest(unflatten(on_device)) == expected


def test_backbone_digest_follows_its_definition(formats):
    """The oracle names every leaf; the tables of umT5's layers differ, so all of them count."""
    lines = []
    for name, leaf in sorted(flatten(formats["t5x"]).items()):
        rounded = np.ascontiguousarray(leaf).astype(ml_dtypes.bfloat16)
        digest = hashlib.sha256(f"{leaf.shape} ".encode() + rounded.tobytes()).hexdigest()
        lines.append(f"{name} {digest}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert backbone_digest(formats["hf"]) == expected


def test_backbone_digest_changes_with_any_leaf(formats):
    leaves = flatten(formats["t5x"])
    seen = {backbone_digest(unflatten(leaves))}
    for name, leaf in leaves.items():
        changed = np.array(leaf)
        changed.flat[-1] += 1
        seen.add(backbone_digest(unflatten({**leaves, name: changed})))
    assert len(seen) == len(leaves) + 1


def test_backbone_digest_zero_biases_do_not_count():
    params = {"encoder": {"layers_0": {"mlp": {"wo": {"kernel": np.ones((70, 3), np.float32)}}}}}
    with_bias = {"encoder/layers_0/mlp/wo/bias": np.zeros(3, np.float32)}
    expected = backbone_digest(params)
    assert backbone_digest(unflatten(flatten(params) | with_bias)) == expected
    with_bias["encoder/layers_0/mlp/wo/bias"][1] = 1
    assert backbone_digest(unflatten(flatten(params) | with_bias)) != expected


def test_backbone_digest_equal_tables_count_once_per_stack():
    table = np.ones((4, 32), np.float32)
    one = {"encoder/relpos_bias/rel_embedding": table}
    each = {f"encoder/layers_{i}/relpos_bias/rel_embedding": table for i in range(3)}
    assert backbone_digest(unflatten(each)) == backbone_digest(unflatten(one))
    each["encoder/layers_2/relpos_bias/rel_embedding"] = 2 * table
    assert backbone_digest(unflatten(each)) != backbone_digest(unflatten(one))


@pytest.mark.parametrize("artifact", ["mpt_source", "teachers"])
def test_shipped_artifacts_record_the_shipped_backbone(artifact):
    with open(paths.shipped(name=f"tiny_t5/{artifact}/config.json")) as file:
        recorded = json.load(file)["backbone_sha256"]
    shipped = load_backbone(paths.shipped(name="tiny_t5/checkpoint_10000"))
    assert recorded == backbone_digest(shipped)


def test_backbone_config_holds_what_weights_do_not_show():
    config = T5Config(32, mlp_activations=("silu", "linear"), relative_attention_max_distance=64)
    found = backbone_config(config)
    assert found["mlp_activations"] == ["silu", "linear"]
    assert found["relative_attention_max_distance"] == 64
    assert json.loads(json.dumps(found)) == found
    same = dataclasses.replace(config, dtype="bfloat16", scan_layers=True, dropout_rate=0.1)
    assert backbone_config(same) == found

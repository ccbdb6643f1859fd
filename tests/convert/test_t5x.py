"""T5X checkpoints: real files of T5X, our own, Orbax's, and damaged ones."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath

from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.convert import load_backbone, load_t5x, parity, save_t5x
from mpt_jax.convert.architecture import config_of_tree, with_tables
from mpt_jax.convert.backbones import read
from mpt_jax.convert.hf import config_to_hf
from mpt_jax.convert.t5x import write_orbax, write_t5x
from mpt_jax.core.tree import flatten, unflatten
from tests.fixtures.shared_data import shared

GATED = {"mlp_activations": ("gelu", "linear"), "num_encoder_layers": 2, "num_decoder_layers": 2}
CONFIG = T5Config(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=12, **GATED)


def some_params() -> dict:
    rng = np.random.default_rng(0)
    return unflatten(
        {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in parameter_shapes(CONFIG).items()
        }
    )


def assert_same(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        assert isinstance(found[name], np.ndarray) and found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_load_backbone_t5x_msgpack_matches_file():
    folder = shared("t5x_tiny_legacy/checkpoint_0")
    leaves = flatten(load_backbone(folder))
    config = T5Config(32128, emb_dim=8, num_heads=4, head_dim=3, mlp_dim=16, **GATED)
    assert {name: x.shape for name, x in leaves.items()} == parameter_shapes(config)
    assert len(leaves) == 52
    whole = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert_same(unflatten(leaves), whole["optimizer"]["target"])
    assert_same(load_t5x(folder / "checkpoint"), unflatten(leaves))


def test_load_backbone_t5x_zarr_matches_file():
    folder = shared("t5x_tiny_zarr/checkpoint_3")
    leaves = flatten(load_backbone(folder))
    config = T5Config(
        32128,
        emb_dim=4,
        num_heads=2,
        head_dim=2,
        mlp_dim=8,
        relative_attention_num_buckets=4,
        **GATED,
    )
    assert {name: x.shape for name, x in leaves.items()} == parameter_shapes(config)
    # One array assembled by hand from its gzipped chunks of 4096 columns.
    array = folder / "target.decoder.logits_dense.kernel"
    chunks = [
        np.frombuffer(gzip.decompress((array / f"0.{i}").read_bytes()), "<f4").reshape(4, 4096)
        for i in range(8)
    ]
    expected = np.concatenate(chunks, axis=1)[:, :32128]
    np.testing.assert_array_equal(leaves["decoder/logits_dense/kernel"], expected)


def test_load_t5x_incomplete_zarr_fails(tmp_path):
    folder = tmp_path / "checkpoint_3"
    shutil.copytree(shared("t5x_tiny_zarr/checkpoint_3"), folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    array = folder / "target.token_embedder.embedding"
    chunk = (array / "3.0").read_bytes()
    (array / "3.0").unlink()
    with pytest.raises(ValueError, match=r"token_embedder.*lacks the chunks 3\.0"):
        load_t5x(folder)
    (array / "3.0").write_bytes(chunk[: len(chunk) // 2])
    with pytest.raises(ValueError, match="token_embedder"):
        load_t5x(folder)
    shutil.rmtree(array)
    with pytest.raises(ValueError, match="token_embedder.* is missing"):
        load_t5x(folder)


def test_save_t5x_loads_bitwise_equal(tmp_path):
    params = some_params()
    params["decoder"]["logits_dense"]["kernel"] = jnp.asarray(
        params["decoder"]["logits_dense"]["kernel"], jnp.bfloat16
    )
    folder = save_t5x(tmp_path / "model", params, step=12)
    assert folder == tmp_path / "model" / "checkpoint_12"
    assert_same(load_backbone(folder), params)
    contents = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert contents["version"] == 3 and contents["optimizer"]["state"]["step"] == 12
    with pytest.raises(FileExistsError, match="checkpoint_12"):
        save_t5x(tmp_path / "model", params, step=12)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["checkpoint_12"]


def test_save_t5x_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        save_t5x(tmp_path, {"a": np.array([object()])}, step=1)
    assert list(tmp_path.iterdir()) == []


def save_orbax(folder: Path, params: dict) -> None:
    """Writes an Orbax checkpoint as T5X does: item `state` with target, step and moments."""
    state = {"target": params, "state": {"step": np.int32(7), "param_states": {"m": np.ones(3)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(state))


def test_load_backbone_orbax_returns_target(tmp_path):
    params, folder = some_params(), tmp_path / "checkpoint_7"
    save_orbax(folder, params)
    assert_same(load_backbone(folder), params)
    assert_same(load_backbone(folder / "state"), params)
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="truncated"):
        load_backbone(folder)


@pytest.mark.parametrize("form", ["t5x", "orbax"])
def test_load_backbone_t5x_weights_without_finite_floats_error_names_them(form, tmp_path):
    for step, (dtype, value) in enumerate(((np.int8, 1), (np.float32, np.nan))):
        params = some_params()
        scale = np.zeros(8, dtype)
        scale[3] = value
        params["encoder"]["encoder_norm"]["scale"] = scale
        folder = tmp_path / f"checkpoint_{step}"
        if form == "t5x":
            save_t5x(tmp_path, params, step=step)
        else:
            save_orbax(folder, params)
        reason = r"not supported: .*scale \(int8\)" if value == 1 else "NaN .*encoder_norm/scale"
        with pytest.raises(ValueError, match=f"{folder} has .*{reason}"):
            load_backbone(folder)


def test_load_t5x_scanned_checkpoint_returns_unscanned(tmp_path):
    params = some_params()
    assert_same(load_t5x(save_t5x(tmp_path, stack_layers(params), step=0)), params)
    # As T5X writes them: the relative position table repeated in every layer.
    scanned = flatten(stack_layers(params))
    for stack in ("encoder", "decoder"):
        table = scanned.pop(f"{stack}/relpos_bias/rel_embedding")
        scanned[f"{stack}/{stack}/relpos_bias/rel_embedding"] = np.stack([table, table], axis=1)
    assert_same(load_t5x(save_t5x(tmp_path, unflatten(scanned), step=1)), params)
    # If they differ, each layer has its own table, as in umT5.
    scanned["encoder/encoder/relpos_bias/rel_embedding"][0, 1] += 1
    found = flatten(load_t5x(save_t5x(tmp_path, unflatten(scanned), step=2)))
    table = flatten(params)["encoder/relpos_bias/rel_embedding"].copy()
    assert_same({"x": found["encoder/layers_0/relpos_bias/rel_embedding"]}, {"x": table})
    table[0] += 1
    assert_same({"x": found["encoder/layers_1/relpos_bias/rel_embedding"]}, {"x": table})
    assert "encoder/relpos_bias/rel_embedding" not in found


@pytest.mark.parametrize("layers", [(1, 1), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("scanned", [False, True])
def test_read_single_layer_tables_fit_stack_or_layers(layers, scanned, tmp_path):
    """umT5 with a stack of one layer: scanned, its axis of layers has size 1."""
    encoder, decoder = layers
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=encoder, num_decoder_layers=decoder, relative_bias_per_layer=True
    )
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    params = unflatten(leaves)
    tree = stack_layers(params) if scanned else params
    if scanned:
        table = flatten(tree)["encoder/encoder/relpos_bias/rel_embedding"]
        assert table.shape == (config.num_heads, encoder, 32)
    folder = save_t5x(tmp_path, tree, step=0)
    # With the model's configuration, the tree is the model's in every form.
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    chosen, found = read(epath.Path(folder), str(tmp_path / "config.json"), lambda line: None)
    assert chosen == config
    assert_same(found, params)
    # Without it, shapes decide: single tables in both stacks are read as T5, the same model.
    assumed, found = read(epath.Path(folder), None, lambda line: None)
    ambiguous = scanned and layers == (1, 1)
    assert assumed == dataclasses.replace(config, relative_bias_per_layer=not ambiguous)
    for name in ("encoder", "decoder"):
        own = "" if ambiguous else "layers_0/"
        np.testing.assert_array_equal(
            flatten(found)[f"{name}/{own}relpos_bias/rel_embedding"],
            leaves[f"{name}/layers_0/relpos_bias/rel_embedding"],
        )
    logits = [parity.forward(*each)["logits"] for each in ((config, params), (assumed, found))]
    np.testing.assert_array_equal(*logits)


def test_with_tables_different_tables_stay_per_layer():
    config = dataclasses.replace(CONFIG, relative_bias_per_layer=True)
    params = unflatten(
        {name: np.arange(np.prod(s)).reshape(s) for name, s in parameter_shapes(config).items()}
    )
    assert "encoder/relpos_bias/rel_embedding" in flatten(with_tables(params, False))
    params["decoder"]["layers_1"]["relpos_bias"]["rel_embedding"] += 1
    found = flatten(with_tables(params, in_every_layer=False))
    assert "encoder/relpos_bias/rel_embedding" in found
    assert "decoder/relpos_bias/rel_embedding" not in found
    back = with_tables(unflatten(found), in_every_layer=True)
    assert_same(back, params)


def write_zarr_folders(folder: Path, params: dict) -> None:
    """Writes a large checkpoint as T5X does: a zarr folder per leaf, listed in the msgpack file."""
    target = {}
    for name, leaf in flatten(params).items():
        where = f"target.{name.replace('/', '.')}"
        kvstore = {"driver": "file", "path": str(folder / where)}
        metadata = {"chunks": [max(1, n // 2) for n in leaf.shape], "dtype": "<f4"}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        ts.open(spec, create=True, shape=leaf.shape).result().write(leaf).result()
        target[name] = {"driver": "zarr", "kvstore": {"driver": "file", "path": where}}
    contents = {"version": 3, "optimizer": {"target": unflatten(target), "state": {}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("form", ["msgpack", "zarr", "orbax"])
def test_load_backbone_every_t5x_format_scanned_or_not(form, scanned, tmp_path):
    params, folder = some_params(), tmp_path / "checkpoint_4"
    written = stack_layers(params) if scanned else params
    folder.mkdir()
    if form == "zarr":
        write_zarr_folders(folder, written)
    else:
        {"msgpack": write_t5x, "orbax": write_orbax}[form](epath.Path(folder), written, 4)
    assert_same(load_backbone(folder), params)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"mlp_activations": ("relu",), "logits_via_embedding": True}, "T5 1.0"),
        ({"mlp_activations": ("gelu", "linear")}, "T5 1.1"),
        ({"mlp_activations": ("gelu", "linear"), "relative_bias_per_layer": True}, "umT5"),
    ],
)
def test_config_of_tree_infers_config_from_shapes(fields, name):
    config = T5Config(30, "float32", 10, 3, 2, 4, 5, 14, relative_attention_num_buckets=8, **fields)
    shapes = parameter_shapes(config)
    tree = {leaf: np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
    assert config_of_tree(unflatten(tree)) == config, name
    del tree["encoder/layers_1/pre_mlp_layer_norm/scale"]
    with pytest.raises(ValueError, match=r"missing: encoder/layers_1/pre_mlp_layer_norm/scale"):
        config_of_tree(unflatten(tree))
    with pytest.raises(
        ValueError, match="not have the parameters of a T5.*lacks token_embedder/embedding"
    ):
        config_of_tree({"bert": np.zeros(3)})


def test_load_backbone_invalid_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")
    save_t5x(tmp_path, some_params(), step=3)
    alone = load_backbone(tmp_path)  # a folder with one checkpoint, as training writes it
    for name, leaf in flatten(load_backbone(tmp_path / "checkpoint_3")).items():
        np.testing.assert_array_equal(flatten(alone)[name], leaf)
    save_t5x(tmp_path, some_params(), step=4)
    with pytest.raises(FileNotFoundError, match=r"checkpoints in it: checkpoint_3, checkpoint_4"):
        load_backbone(tmp_path)
    file = tmp_path / "checkpoint_3" / "checkpoint"
    whole = file.read_bytes()
    for size in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            load_backbone(tmp_path / "checkpoint_3")
    file.write_bytes(json.dumps({"optimizer": 1}).encode())
    with pytest.raises(ValueError, match="not a T5X checkpoint"):
        load_backbone(tmp_path / "checkpoint_3")

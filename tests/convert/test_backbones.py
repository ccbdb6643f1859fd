"""`mpt-jax convert` of backbones: every direction, messages, and no files left after errors."""

import gc
import json
import re
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mpt_jax.convert import backbones, load_backbone, load_hf, parity
from mpt_jax.core.tree import flatten, unflatten
from tests.fixtures import fake_gcs
from tests.fixtures.hf_checkpoints import convert, hf_folder, refused


def test_read_config_that_differs_from_the_folder_is_an_error(tmp_path):
    folder, other = epath.Path(hf_folder(tmp_path / "hf")), tmp_path / "other.json"
    fields = json.loads((folder / "config.json").read_text())
    other.write_text(json.dumps({**fields, "relative_attention_max_distance": 99}))
    assert backbones.read(folder, str(folder / "config.json"))[0] == load_hf(folder)[0]
    with pytest.raises(ValueError, match="max_distance is 99 in the model.*--config"):
        backbones.read(folder, str(other))


@pytest.mark.parametrize(
    ("middle", "version"),
    [
        pytest.param("t5x", "1_0", marks=pytest.mark.slow),
        ("orbax", "1_1"),
        ("t5x", "umt5"),
        pytest.param("orbax", "1_0", marks=pytest.mark.slow),
        pytest.param("t5x", "1_1", marks=pytest.mark.slow),
        pytest.param("orbax", "umt5", marks=pytest.mark.slow),
    ],
)
def test_convert_backbone_and_back_restores_weights(version, middle, tmp_path, capsys, monkeypatch):
    source = hf_folder(tmp_path / "hf", version)
    monkeypatch.chdir(tmp_path)  # Orbax itself takes no relative paths
    convert("hf", "t5x/checkpoint_7", "--to", middle)
    said = capsys.readouterr().out
    leaves = flatten(load_hf(source)[1])
    numbers = sum(x.size for x in leaves.values())
    assert f"{len(leaves)} leaves, {numbers:,} numbers: identical; logits of a fixed" in said
    assert "differ by at most 0\n" in said and f"hf -> {middle}: t5x/checkpoint_7" in said
    convert("t5x/checkpoint_7", "again")
    said = capsys.readouterr().out
    assert "inferred from the parameters' shapes, assuming mlp_activations=" in said
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    for name, weight in after.items():
        np.testing.assert_array_equal(weight, before[name], err_msg=name)
    assert load_hf(tmp_path / "again")[0] == load_hf(source)[0]


def test_convert_backbone_to_bfloat16_reports_logit_difference(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf")
    convert(source, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert ": identical after rounding to bfloat16; logits" in said
    found = re.search(r"differ by at most ([\d.e-]+)", said)
    assert found and 1e-4 < float(found[1]) < 10
    half, whole = flatten(load_hf(tmp_path / "half")[1]), flatten(load_hf(source)[1])
    for name, leaf in whole.items():
        np.testing.assert_array_equal(half[name], leaf.astype(jnp.bfloat16))
    fields = json.loads((tmp_path / "half" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"


def test_convert_backbone_to_bfloat16_frees_full_precision(tmp_path, monkeypatch):
    """A large model is held in half precision, twice, without the full-precision copy."""
    whole, held = [], []
    reading, writing = backbones.read, backbones.write_hf

    def read(*arguments):
        config, params = reading(*arguments)
        whole.extend(weakref.ref(leaf) for leaf in flatten(params).values())
        return config, params

    def write(*arguments):
        gc.collect()
        held.extend(ref() is not None for ref in whole)
        writing(*arguments)

    monkeypatch.setattr(backbones, "read", read)
    monkeypatch.setattr(backbones, "write_hf", write)
    source = hf_folder(tmp_path / "hf")
    convert(source, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16", "--no-logits")
    assert len(held) == 66 and not any(held)


def test_convert_backbone_given_config_is_checked(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf")
    convert(source, tmp_path / "t5x", "--no-logits")
    assert capsys.readouterr().out.splitlines()[0].endswith("numbers: identical")
    checkpoint = tmp_path / "t5x" / "checkpoint_0"
    convert(checkpoint, tmp_path / "again", "--config", source / "config.json", "--no-logits")
    assert load_hf(tmp_path / "again")[0] == load_hf(source)[0]
    said = refused(capsys, checkpoint, tmp_path / "other", "--config", "t5_1_1_base")
    assert "read as t5_1_1_base, does not match the model" in said
    assert "expected (768, 2048), found (16, 24); and 46 more" in said
    said = refused(capsys, checkpoint, tmp_path / "other", "--config", "t5_huge")
    assert "Unknown T5 configuration 't5_huge'" in said and "t5_1_1_base" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hf", "t5x"]


def test_convert_backbone_wrong_write_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = hf_folder(tmp_path / "hf")
    write = backbones.write_t5x

    def write_wrongly(folder, params, step):
        leaves = flatten(params)
        leaves["encoder/encoder_norm/scale"] = leaves["encoder/encoder_norm/scale"] + 1
        write(folder, unflatten(leaves), step)

    monkeypatch.setattr(backbones, "write_t5x", write_wrongly)
    assert "leaves differ" in refused(capsys, source, tmp_path / "t5x")
    said = refused(capsys, source, tmp_path / "checkpoint_0")
    assert "1 of 66 leaves differ: encoder/encoder_norm/scale" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_convert_backbone_invalid_arguments_exit_with_2(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf")
    target = tmp_path / "new"
    for to in ("hf", "t5x", "orbax"):
        assert "already exists" in refused(capsys, source, source, "--to", to)
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    assert "it holds no files" in refused(capsys, tmp_path / "empty", target)
    assert "cannot be converted to 'npy'" in refused(capsys, source, target, "--to", "npy")
    assert "Only conversions into an artifact use --runs" in refused(
        capsys, source, target, "--runs", "a"
    )
    (source / "model.safetensors").write_bytes(b"\0" * 20)
    assert "truncated or damaged" in refused(capsys, source, target)
    assert not target.exists()


def test_convert_backbone_in_storage_bucket(tmp_path, monkeypatch, capsys):
    hf_folder(tmp_path / "hf")
    name = fake_gcs.mount(tmp_path, monkeypatch)
    convert(f"{name}/hf", f"{name}/t5x/checkpoint_3", "--no-logits")
    convert(f"{name}/t5x/checkpoint_3", f"{name}/again", "--no-logits")
    assert "identical" in capsys.readouterr().out
    before, after = load_backbone(f"{name}/hf"), load_backbone(f"{name}/again")
    parity.identical(before, after, "the bucket's copy")


def test_identical_compares_every_bit():
    tree = {"a": {"x": np.asarray([0.0, np.nan], np.float32)}, "b": np.ones(3, np.float32)}
    assert parity.identical(tree, {**tree}, "it") == "2 leaves, 5 numbers"
    for other in (np.asarray([-0.0, np.nan], np.float32), np.asarray([0.0, np.nan])):
        with pytest.raises(ValueError, match="it does not .* 1 of 2 leaves differ: a/x"):
            parity.identical(tree, {**tree, "a": {"x": other}}, "it")
    with pytest.raises(ValueError, match=r"1 missing: b"):
        parity.identical(tree, {"a": tree["a"]}, "it")

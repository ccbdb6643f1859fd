"""Hugging Face folders: outputs equal to Hugging Face's T5 (1e-4), both directions, and errors.

Default tests read golden files from `tests/golden/make_t5_hf.py`; tests marked `parity` compare
with Hugging Face's own model.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.backbones.t5 import T5Config, Transformer, parameter_shapes, t5_config
from mpt_jax.backbones.t5.config import NAMES
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.convert import load_backbone, load_hf, save_hf
from mpt_jax.convert.hf import check_config, config_from_hf, config_to_hf
from mpt_jax.core.tree import flatten
from mpt_jax.models import decoding
from tests.fixtures import fake_gcs
from tests.fixtures.hf_checkpoints import GOLDEN, write_folder

VERSIONS = ("1_0", "1_1", "umt5")


@pytest.fixture(params=VERSIONS)
def golden(request) -> dict:
    return dict(np.load(GOLDEN / f"t5_hf_{request.param}.npz"))


def greedy(config: T5Config, params: dict, tokens, mask, steps: int) -> np.ndarray:
    """Cached greedy decoding `[B,L]`."""
    model = Transformer(config)

    def decode(tokens, mask):
        encoded = model.apply({"params": params}, tokens, mask, method="encode")

        def step(new, cache):
            logits, variables = model.apply(
                {"params": params, **cache},
                encoded,
                mask,
                new,
                decode=True,
                max_decode_length=steps,
                mutable=["cache"],
                method="decode",
            )
            return logits[:, -1], variables

        start = jnp.zeros((tokens.shape[0],), jnp.int32)
        _, cache = step(start[:, None], {})
        return decoding.greedy(step, cache, start, max_length=steps)[0][:, 0]

    return np.asarray(jax.jit(decode)(tokens, mask))


def outputs(config: T5Config, params: dict, tokens, mask, decoder_tokens) -> dict:
    model = Transformer(config)

    @jax.jit
    def run(tokens, mask, decoder_tokens):
        encoded, encoder_hidden = model.apply(
            {"params": params}, tokens, mask, return_hidden=True, method="encode"
        )
        logits, decoder_hidden = model.apply(
            {"params": params}, encoded, mask, decoder_tokens, return_hidden=True, method="decode"
        )
        return {
            "logits": logits,
            "encoder_hidden": jnp.stack(encoder_hidden),
            "decoder_hidden": jnp.stack(decoder_hidden),
        }

    return run(tokens, mask, decoder_tokens)


def arrays(golden: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        jnp.asarray(golden["tokens"], jnp.int32),
        jnp.asarray(golden["mask"]),
        jnp.asarray(golden["decoder_tokens"], jnp.int32),
    )


def test_load_hf_logits_and_hidden_states_match_hugging_face(golden, tmp_path):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    found = outputs(config, params, *arrays(golden))
    for name in ("logits", "encoder_hidden", "decoder_hidden"):
        np.testing.assert_allclose(found[name], golden[name], atol=1e-4, err_msg=name)


def test_load_hf_greedy_decoding_matches_hugging_face(golden, tmp_path):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    tokens, mask, _ = arrays(golden)
    found = greedy(config, params, tokens, mask, golden["greedy"].shape[1])
    np.testing.assert_array_equal(found, golden["greedy"])
    # Teacher forcing on this output selects the same tokens.
    forced = np.concatenate([np.zeros((3, 1), np.int32), found[:, :-1]], axis=1)
    best = np.argmax(outputs(config, params, tokens, mask, jnp.asarray(forced))["logits"], axis=-1)
    ended = np.cumsum(found == 1, axis=1) - (found == 1) > 0
    np.testing.assert_array_equal(np.where(ended, 0, best), found)


def test_load_hf_per_layer_tables_work_in_scan(tmp_path):
    golden = dict(np.load(GOLDEN / "t5_hf_umt5.npz"))
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    config, params = dataclasses.replace(config, scan_layers=True), stack_layers(params)
    shape = parameter_shapes(config)["encoder/encoder/relpos_bias/rel_embedding"]
    assert shape == (4, 2, 32)  # heads, layers, buckets: T5X's order
    found = outputs(config, params, *arrays(golden))
    for name in ("logits", "encoder_hidden", "decoder_hidden"):
        np.testing.assert_allclose(found[name], golden[name], atol=1e-4, err_msg=name)
    tokens, mask, _ = arrays(golden)
    tokens = greedy(config, params, tokens, mask, golden["greedy"].shape[1])
    np.testing.assert_array_equal(tokens, golden["greedy"])


def test_save_hf_restores_every_weight(golden, tmp_path):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    save_hf(tmp_path / "again", config, params)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    # Copies of the embedding are not written, since Hugging Face ties them.
    assert set(expected) - set(found) <= {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected[name])
    assert load_hf(tmp_path / "again")[0] == config
    with pytest.raises(FileExistsError, match="again"):
        save_hf(tmp_path / "again", config, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "hf"]  # no scratch left


def test_save_hf_to_storage_bucket_loads_equal(golden, tmp_path, monkeypatch):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    name = fake_gcs.mount(tmp_path, monkeypatch)
    save_hf(f"{name}/models/t5", config, half)
    with pytest.raises(FileExistsError, match="gs://bucket/models/t5"):
        save_hf(f"{name}/models/t5", config, half)
    with pytest.raises(ValueError, match="does not match"):
        save_hf(f"{name}/models/other", config, {})
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["t5"]
    found = flatten(load_backbone(f"{name}/models/t5"))
    for leaf, value in flatten(half).items():
        assert found[leaf].dtype == value.dtype
        np.testing.assert_array_equal(found[leaf], np.asarray(value), err_msg=leaf)


def test_load_backbone_float16_shards_become_float32(golden, tmp_path):
    folder = write_folder(tmp_path / "hf", golden)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for shard, part in enumerate((names[:9], names[9:])):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        index.update(dict.fromkeys(part, file))
        save_file({name: weights[name].astype(np.float16) for name in part}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    leaves = flatten(load_backbone(folder))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}
    half = weights["shared.weight"].astype(np.float16)
    np.testing.assert_array_equal(leaves["token_embedder/embedding"], half)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        load_hf(folder)


def test_save_hf_bfloat16_loads_equal(golden, tmp_path):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    halved = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    save_hf(tmp_path / "half", config, halved)
    found = flatten(load_hf(tmp_path / "half")[1])
    for name, leaf in flatten(halved).items():
        assert found[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[name], leaf)


def test_load_hf_invalid_folder_fails_with_reason(tmp_path, monkeypatch):
    golden = dict(np.load(GOLDEN / "t5_hf_1_1.npz"))
    folder = write_folder(tmp_path / "hf", golden)
    weights, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_hf(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_hf(folder)
    norm = "decoder.final_layer_norm.weight"
    save_file({k: v for k, v in weights.items() if k != norm}, file)
    with pytest.raises(ValueError, match=r"1 missing: decoder\.final_layer_norm\.weight"):
        load_hf(folder)
    save_file({**weights, norm: np.ones(15, np.float32)}, file)
    with pytest.raises(
        ValueError, match=r"final_layer_norm.weight: expected \(16,\), found \(15,\)"
    ):
        load_hf(folder)
    save_file({**weights, "adapter.weight": np.ones(1, np.float32)}, file)
    with pytest.raises(ValueError, match="not expected: adapter.weight"):
        load_hf(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pickled.*Install torch, or .* safe_serialization=True"):
        load_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_hf(folder)


def test_save_hf_large_model_writes_shards(golden, tmp_path):
    config, params = load_hf(write_folder(tmp_path / "hf", golden))
    save_hf(tmp_path / "one", config, params)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    limit = sum(x.nbytes for x in whole.values()) // 3
    save_hf(tmp_path / "many", config, params, max_shard_bytes=limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and all(f"-of-{len(files):05}" in file.name for file in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for file in files:
        shard = load_file(file)
        assert sum(x.nbytes for x in shard.values()) <= limit
        assert set(shard) == {k for k, v in index["weight_map"].items() if v == file.name}
        for name in shard:
            np.testing.assert_array_equal(shard[name], whole.pop(name))
    assert not whole
    back = flatten(load_hf(tmp_path / "many")[1])
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(back[name], leaf)
    files[0].unlink()
    with pytest.raises(ValueError, match=rf"incomplete: .* do not exist: {files[0].name}\."):
        load_hf(tmp_path / "many")


def test_config_from_hf_fills_defaults_of_model_type():
    """transformers omits fields that have their class's default."""
    sizes = config_to_hf(t5_config("mt5_small"))
    assert (sizes["model_type"], sizes["architectures"]) == ("mt5", ["MT5ForConditionalGeneration"])
    assert config_to_hf(t5_config("byt5_small"))["model_type"] == "t5"
    umt5 = t5_config("mt5_small", relative_bias_per_layer=True)
    assert config_to_hf(umt5)["model_type"] == "umt5"
    assert config_from_hf(config_to_hf(umt5)) == umt5
    for name in ("tie_word_embeddings", "feed_forward_proj"):
        del sizes[name]
    gated = ("gelu", "linear")
    for model_type, expected in (
        ("t5", (("relu",), True)),
        ("mt5", (gated, False)),
        ("umt5", (gated, True)),
    ):
        found = config_from_hf({**sizes, "model_type": model_type})
        assert (found.mlp_activations, found.logits_via_embedding) == expected
    # Since version 5, every model is tied, and another field records whether it really is.
    newer = {**sizes, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not config_from_hf(newer).logits_via_embedding
    del newer["d_ff"]
    with pytest.raises(ValueError, match="lacks d_ff,"):
        config_from_hf(newer)


def test_load_hf_embedding_copy_must_equal_embedding(tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_0.npz")))
    file = folder / "model.safetensors"
    weights = load_file(file)
    table = weights["shared.weight"]
    save_file({**weights, "lm_head.weight": table, "decoder.embed_tokens.weight": table}, file)
    expected = flatten(load_hf(folder)[1])
    save_file({**weights, "lm_head.weight": table + 1}, file)
    with pytest.raises(ValueError, match="lm_head.weight differs from shared.weight"):
        load_hf(folder)
    # Some checkpoints hold only a copy of the embedding.
    del weights["shared.weight"], weights["encoder.embed_tokens.weight"]
    save_file({**weights, "decoder.embed_tokens.weight": table}, file)
    for name, leaf in flatten(load_hf(folder)[1]).items():
        np.testing.assert_array_equal(leaf, expected[name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "longt5"}, "longt5"),
        ({"feed_forward_proj": "gelu"}, "gelu"),
        ({"layer_norm_epsilon": 1e-5}, "1e-05"),
    ],
)
def test_config_from_hf_other_architecture_fails(change, reason):
    fields = config_to_hf(t5_config("t5_1_1_small"))
    with pytest.raises(ValueError, match=reason):
        config_from_hf({**fields, **change})


def test_check_config_differing_field_error_has_both_values(tmp_path):
    folder = write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "t5_hf_1_1.npz")))
    config = load_hf(folder)[0]
    check_config(folder, dataclasses.replace(config, dtype="bfloat16", remat="full", biases=True))
    other = dataclasses.replace(config, relative_attention_max_distance=99, mlp_dim=3)
    with pytest.raises(ValueError) as error:
        check_config(folder, other)
    message = str(error.value)
    distance = config.relative_attention_max_distance
    assert f"relative_attention_max_distance is 99 in the model and {distance} in" in message
    assert f"mlp_dim is 3 in the model and {config.mlp_dim} in the file (d_ff)" in message
    assert "config.json" in message and "T5_NAME" in message and "emb_dim" not in message


@pytest.mark.parametrize("name", NAMES)
def test_config_to_hf_published_t5_restores_config(name):
    config = t5_config(name)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_save_hf_with_biases_fails(tmp_path):
    with pytest.raises(ValueError, match="biases"):
        save_hf(tmp_path / "out", T5Config(vocab_size=8, biases=True), {})


# Comparison with Hugging Face's own model, saved and loaded by its own code.


@pytest.mark.parity
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_model_both_directions_match_outputs(version, padded, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make = _golden_script()
    theirs = make.random_model(version, seed=7)
    inputs = make.padded_inputs(seed=7)
    if not padded:
        inputs["mask"] = torch.ones_like(inputs["mask"])
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    expected = {name: x.numpy() for name, x in make.outputs(theirs, inputs).items()}
    ours = arrays({name: x.numpy() for name, x in inputs.items()})
    found = outputs(config, params, *ours)
    for name in ("logits", "encoder_hidden", "decoder_hidden"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    steps = expected["greedy"].shape[1]
    np.testing.assert_array_equal(greedy(config, params, *ours[:2], steps), expected["greedy"])

    save_hf(tmp_path / "ours", config, params)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back) is type(theirs)
    for name, x in make.outputs(back, inputs).items():
        np.testing.assert_array_equal(x.numpy(), expected[name], err_msg=name)


class _Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parity
def test_load_hf_pickled_weights_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    golden = dict(np.load(GOLDEN / "t5_hf_1_1.npz"))
    folder = write_folder(tmp_path / "hf", golden)
    expected = flatten(load_hf(folder)[1])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.tensor(x) for name, x in weights.items()}
    file = folder / "pytorch_model.bin"
    for zipped in (True, False):  # torch's two formats
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        for name, leaf in flatten(load_hf(folder)[1]).items():
            np.testing.assert_array_equal(leaf, expected[name])
    torch.save({name: x.bfloat16() for name, x in tensors.items()}, file)
    for name, leaf in flatten(load_hf(folder)[1]).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, expected[name].astype(jnp.bfloat16))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        load_hf(folder)
    payload = tmp_path / "payload_ran"
    torch.save({**tensors, "more": _Touch(payload)}, file)
    with pytest.raises(ValueError, match="holds more than tensors. No code from it was run"):
        load_hf(folder)
    assert not payload.exists()
    file.unlink()
    names = sorted(tensors)
    shards = {"a.bin": names[:7], "b.bin": names[7:]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / shard)
    where = {name: shard for shard, part in shards.items() for name in part}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for name, leaf in flatten(load_hf(folder)[1]).items():
        np.testing.assert_array_equal(leaf, expected[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_config_to_hf_published_t5_matches_parameter_count(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = t5_config(name)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**config_to_hf(config))
        )
    ours = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    assert ours == sum(x.numel() for x in model.parameters())


def _golden_script():
    """The script that made the goldens, as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_t5_hf", GOLDEN / "make_t5_hf.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

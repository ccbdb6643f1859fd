"""`mpt-jax convert` of prompts: PEFT, NumPy, T5X and safetensors, to and from artifacts.

Tests marked `parity` compare with PEFT's own model.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.t5 import Transformer
from mpt_jax.convert import load_backbone, load_hf, save_t5x
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.prompts import get_method
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.base import PromptMethod
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.mpt import MPT
from tests.fixtures.hf_checkpoints import convert, hf_folder, refused
from tests.fixtures.saved_artifacts import save
from tests.fixtures.shared_data import shared

P, H, R = 3, 16, 2  # H is the golden backbone's
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture
def backbone(tmp_path) -> Path:
    return hf_folder(tmp_path / "backbone")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(path: Path, backbone: Path, method="mpt", groups="joint", **overrides) -> Path:
    """Writes an artifact of three runs for the backbone."""
    runs = Runs(["one", "two", "two"], NAMES, groups)
    made = MPT(P, rank=R) if method == "mpt" else get_method(method)(prompt_length=P)
    params = {
        "mpt": {
            "shared": random(runs.num_groups, P, H, seed=1),
            "task_left": random(3, P, R, seed=2),
            "task_right": random(3, R, H, seed=3),
        },
        "prompt_tuning": {"table": random(3, P, H, seed=4)},
        "shared_prompt": {"shared": random(runs.num_groups, P, H, seed=5)},
    }[method]
    weights = load_backbone(backbone)
    fields = {
        "embedding_sha256": artifacts.embedding_digest(weights["token_embedder"]["embedding"]),
        "backbone_sha256": backbone_digest(weights),
        "backbone": "owner/tiny",
        "step": 120,
    }
    return save(path, made, params, runs, **{**fields, **overrides})


def same_prompts(found: Path, expected: Path) -> None:
    """Both artifacts hold the same parameters for the same runs of the same backbone."""
    first, second = artifacts.load_artifact(found), artifacts.load_artifact(expected)
    assert (first.method, first.runs) == (second.method, second.runs)
    for name, value in second.params.items():
        np.testing.assert_array_equal(first.params[name], value)
    for field in (
        "embedding_sha256",
        "backbone_sha256",
        "vocabulary_sha256",
        "backbone",
        "step",
    ):
        assert first.config[field] == second.config[field], field


@pytest.mark.parametrize("method", ["mpt", "prompt_tuning"])
def test_convert_to_peft_and_back_restores_artifact(method, backbone, tmp_path, capsys):
    source = write(tmp_path / "artifact", backbone, method, groups="joint")
    convert(source, tmp_path / "peft")
    assert ": identical\nartifact -> peft" in capsys.readouterr().out
    convert(tmp_path / "peft", tmp_path / "again", "--backbone", backbone, "--runs", *NAMES)
    found = artifacts.load_artifact(tmp_path / "again")
    for name, value in artifacts.load_artifact(source).params.items():
        np.testing.assert_array_equal(found.params[name], value)
    if method == "mpt":  # names come from the file beside the adapter
        convert(tmp_path / "peft", tmp_path / "named", "--backbone", backbone)
        same_prompts(tmp_path / "named", source)


def test_convert_to_peft_writes_peft_layout(backbone, tmp_path):
    source = write(tmp_path / "artifact", backbone)
    params = artifacts.load_artifact(source).params
    convert(source, tmp_path / "factors", "--to", "peft")
    config = json.loads((tmp_path / "factors" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MULTITASK_PROMPT_TUNING"
    assert config["num_transformer_submodules"] == 1  # PEFT's default is two
    assert [config[f"num_{x}"] for x in ("virtual_tokens", "tasks", "ranks")] == [P, 3, R]
    tensors = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    assert set(tensors) == {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
    np.testing.assert_array_equal(tensors["prompt_embeddings"], params["shared"][0])
    np.testing.assert_array_equal(tensors["prefix_task_cols"], params["task_left"])
    convert(source, tmp_path / "folded", "--to", "peft-folded")
    for row, name in enumerate(NAMES):
        config = json.loads((tmp_path / "folded" / name / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == (
            "PROMPT_TUNING",
            "owner/tiny",
        )
        tensors = load_file(tmp_path / "folded" / name / "adapter_model.safetensors")
        left, right = np.asarray(params["task_left"][row]), np.asarray(params["task_right"][row])
        expected = np.asarray(params["shared"][0]) * (left @ right)
        np.testing.assert_allclose(tensors.pop("prompt_embeddings"), expected, rtol=1e-5)
        assert not tensors


def test_convert_to_peft_several_groups_write_one_adapter_each(backbone, tmp_path):
    source = write(tmp_path / "artifact", backbone, groups=[0, 1, 0])
    params = artifacts.load_artifact(source).params
    convert(source, tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["alpha+gamma", "beta"]
    convert(tmp_path / "peft" / "alpha+gamma", tmp_path / "back", "--backbone", backbone)
    back = artifacts.load_artifact(tmp_path / "back")
    assert back.runs == Runs(["one", "two"], ["alpha", "gamma"])
    np.testing.assert_array_equal(back.params["shared"], params["shared"][:1])
    np.testing.assert_array_equal(back.params["task_left"], params["task_left"][jnp.array([0, 2])])


@pytest.mark.parametrize("method", ["mpt", "prompt_tuning", "shared_prompt"])
def test_convert_plain_prompts_and_back_restores_prompts(method, backbone, tmp_path, capsys):
    source = write(tmp_path / "artifact", backbone, method)
    folded = artifacts.load_artifact(source).folded()
    convert(source, tmp_path / "npy", "--to", "npy")
    convert(source, tmp_path / "st", "--to", "safetensors")
    convert(source, tmp_path / "peft", "--to", "peft-folded")
    file = tmp_path / "st" / "folded.safetensors"
    convert(file, tmp_path / "from_st", "--backbone", backbone, "--runs", *sorted(NAMES))
    convert(tmp_path / "peft", tmp_path / "from_peft", "--backbone", backbone)
    for row, name in enumerate(NAMES):
        array = np.load(tmp_path / "npy" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(array, folded[row])
        made = tmp_path / f"from_{name}"
        convert(tmp_path / "npy" / f"{name}.npy", made, "--backbone", backbone, "--runs", name)
        found = artifacts.load_artifact(made)
        assert (found.method.name, found.runs.run_names) == ("prompt_tuning", (name,))
        np.testing.assert_array_equal(found.params["table"][0], folded[row])
    for made in ("from_st", "from_peft"):
        found = artifacts.load_artifact(tmp_path / made)
        assert found.runs.run_names == NAMES
        np.testing.assert_array_equal(found.params["table"], folded)
    assert found.runs.task_names == ("one", "two", "two"), "noted beside the adapters"
    if method == "shared_prompt":
        assert "--to peft-folded" in refused(capsys, source, tmp_path / "x", "--to", "peft")


def write_mixed(path: Path, method: PromptMethod, **shapes: tuple[int, ...]) -> Path:
    """Writes an artifact of a method that mixes prompts, with three runs in one group."""
    params = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return save(path, method, params, Runs(NAMES), vocabulary_sha256=None)


@pytest.mark.parametrize("to", ["peft", "peft-folded", "npy", "safetensors"])
def test_convert_text_dependent_prompts_fail(to, tmp_path, capsys):
    source = write_mixed(
        tmp_path / "artifact", ATTEMPT(P, ["s", "t"], width=2), sources=(2, P, H), target=(3, P, H),
        down=(1, H, 2), up=(1, 2, H), norm_scale=(1, H), norm_bias=(1, H),
    )  # fmt: skip
    said = refused(capsys, source, tmp_path / "x", "--to", to)
    assert f"{source} has the method 'attempt', whose prompts depend on the text" in said
    assert "`mpt-jax predict`" in said and "peft-folded" not in said
    assert not (tmp_path / "x").exists()


def test_convert_prompts_of_several_lengths_write_one_file_each(tmp_path, capsys):
    lengths = {"alpha": 1, "beta": 2, "gamma": 4}
    method = CrossPT(P, ["s", "t"], compose_by="private_cat", private_length=lengths)
    source = write_mixed(
        tmp_path / "artifact", method, sources=(1, 2, P, H), private=(3, 4, H), router=(3, 2)
    )
    convert(source, tmp_path / "npy", "--to", "npy")
    convert(source, tmp_path / "st", "--to", "safetensors")
    written = load_file(tmp_path / "st" / "folded.safetensors")
    private = artifacts.load_artifact(source).params["private"]
    for row, (name, length) in enumerate(lengths.items()):
        array = np.load(tmp_path / "npy" / f"{name}.npy", allow_pickle=False)
        assert array.shape == (P + length, H)
        np.testing.assert_array_equal(array[P:], private[row, :length])
        np.testing.assert_array_equal(array, written[name])
    assert "--to peft-folded" in refused(capsys, source, tmp_path / "x", "--to", "peft")


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte"])
def test_convert_released_npy_prompts_to_artifact(name, tmp_path):
    """Prompts for T5 1.1 base, published by google-research/prompt-tuning."""
    file = shared(f"released_prompts/{name}.npy")
    embedding = {"token_embedder": {"embedding": random(50, 768)}}
    checkpoint = save_t5x(tmp_path, embedding)
    convert(file, tmp_path / "made", "--backbone", checkpoint, "--runs", name)
    found = artifacts.load_artifact(tmp_path / "made")
    np.testing.assert_array_equal(found.folded(), np.load(file)[None])
    assert found.config["embedding_sha256"] == artifacts.embedding_digest(
        embedding["token_embedder"]["embedding"]
    )


def test_convert_prompt_of_other_width_fails(backbone, tmp_path, capsys):
    np.save(tmp_path / "a.npy", random(5, 256))
    options = ("--backbone", backbone, "--runs", "a")
    said = refused(capsys, tmp_path / "a.npy", tmp_path / "x", *options)
    assert "width 256" in said and "has width 16" in said
    published = shared("prompt_tuning_test/prompt_5x256.npy")
    assert "width 256" in refused(capsys, published, tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_convert_prompts_not_finite_fail(backbone, tmp_path, capsys, value):
    prompt = random(P, H)
    prompt[1, 2] = value
    np.save(tmp_path / "a.npy", prompt)
    options = ("--backbone", backbone, "--runs", "a")
    said = refused(capsys, tmp_path / "a.npy", tmp_path / "x", *options)
    assert f"{tmp_path / 'a.npy'} has parameters with NaN or infinite values: table" in said
    assert not (tmp_path / "x").exists()


def test_convert_prompt_in_t5x_checkpoint_to_artifact(backbone, tmp_path, capsys):
    prompt = random(P, H)
    tree = {"encoder": {"prompt": {"prompt": {"prompt": prompt}}}, "decoder": {"x": random(2)}}
    source = save_t5x(tmp_path, tree)
    options = ("--to", "artifact", "--backbone", backbone, "--runs", "a")
    convert(source, tmp_path / "made", *options)
    np.testing.assert_array_equal(artifacts.load_artifact(tmp_path / "made").folded(), prompt[None])
    without = save_t5x(tmp_path, {"decoder": {"x": random(2)}}, step=1)
    assert "holds 0 prompts" in refused(capsys, without, tmp_path / "x", *options)


def test_convert_invalid_peft_adapter_fails(backbone, tmp_path, capsys):
    source = write(tmp_path / "artifact", backbone)
    convert(source, tmp_path / "peft")
    folder, options = tmp_path / "peft", ("--backbone", backbone)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole, fields = load_file(tensors), json.loads(config.read_text())
    capsys.readouterr()

    def after(change: dict, state: dict | None = None) -> str:
        config.write_text(json.dumps({**fields, **change}))
        save_file(whole if state is None else state, tensors)
        return refused(capsys, folder, tmp_path / "x", *options)

    assert "has peft_type 'LORA'" in after({"peft_type": "LORA"})
    assert "task_type 'CAUSAL_LM'" in after({"task_type": "CAUSAL_LM"})
    assert "a second prompt before the decoder's input" in after(
        {"num_transformer_submodules": None}
    )
    assert "has no value for num_virtual_tokens" in after({"num_virtual_tokens": None})
    without = {k: v for k, v in whole.items() if k != "prefix_task_cols"}
    assert "1 missing: prefix_task_cols" in after({}, without)
    assert "not expected: lora_A" in after({}, {**whole, "lora_A": random(2)})
    assert "expected (3, 3, 4), found (3, 3, 2)" in after({"num_ranks": 4})
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert "truncated or damaged" in refused(capsys, folder, tmp_path / "x", *options)
    config.write_text("[]")
    assert "is not a JSON object" in refused(capsys, folder, tmp_path / "x", *options)
    config.write_text("{")
    assert "is not JSON" in refused(capsys, folder, tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


def test_convert_pickled_prompts_are_not_unpickled(backbone, tmp_path, capsys, monkeypatch):
    options = ("--backbone", backbone, "--runs", "a")
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert "not a plain array" in refused(capsys, tmp_path / "a.npy", tmp_path / "x", *options)
    np.save(tmp_path / "b.npy", random(2, P, H))
    said = refused(capsys, tmp_path / "b.npy", tmp_path / "x", *options)
    assert "got float32 of shape (2, 3, 16)" in said
    source = write(tmp_path / "artifact", backbone)
    convert(source, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refused(capsys, tmp_path / "peft", tmp_path / "x", *options[:2])
    assert "Install torch" in said


def test_convert_other_weights_same_embedding_fail(backbone, tmp_path, capsys):
    source = write(tmp_path / "artifact", backbone)
    convert(source, tmp_path / "peft")
    leaves = flatten(load_backbone(backbone))
    name = "encoder/layers_0/attention/query/kernel"
    other = save_t5x(tmp_path, unflatten({**leaves, name: leaves[name] * 1.1}), 0)
    said = refused(capsys, tmp_path / "peft", tmp_path / "new", "--backbone", other)
    digests = backbone_digest(load_backbone(backbone)), backbone_digest(load_backbone(other))
    assert f"weights is {digests[0]}" in said and digests[1] in said
    convert(source, tmp_path / "folded", "--to", "peft-folded")
    notes = tmp_path / "folded" / "beta" / "mpt_jax.json"
    fields = json.loads(notes.read_text())
    notes.write_text(json.dumps(fields | {"backbone_sha256": "0" * 64}))
    said = refused(capsys, tmp_path / "folded", tmp_path / "new", "--backbone", backbone)
    assert "adapters of several backbones" in said and "backbone_sha256 in" in said


def test_convert_other_configuration_of_backbone_fails(backbone, tmp_path, capsys):
    recorded = backbone_config(load_hf(backbone)[0])
    convert(write(tmp_path / "a", backbone, backbone_config=recorded), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "back", "--backbone", backbone)
    assert artifacts.load_artifact(tmp_path / "back").config["backbone_config"] == recorded
    notes = tmp_path / "peft" / "mpt_jax.json"
    fields = json.loads(notes.read_text())
    distance = fields["backbone_config"].pop("relative_attention_max_distance")
    fields["backbone_config"]["relative_attention_max_distance"] = distance + 1
    notes.write_text(json.dumps(fields))
    said = refused(capsys, tmp_path / "peft", tmp_path / "new", "--backbone", backbone)
    assert f"(relative_attention_max_distance: saved {distance + 1}, current {distance})" in said
    del fields["backbone_config"]  # of an earlier version
    notes.write_text(json.dumps(fields))
    convert(tmp_path / "peft", tmp_path / "new", "--backbone", backbone)
    assert f"{tmp_path}/peft records no backbone_config" in capsys.readouterr().out
    assert artifacts.load_artifact(tmp_path / "new").config["backbone_config"] == recorded


def test_convert_adapter_of_earlier_version_warns(backbone, tmp_path, capsys):
    convert(write(tmp_path / "artifact", backbone), tmp_path / "peft")
    notes = tmp_path / "peft" / "mpt_jax.json"
    fields = json.loads(notes.read_text())
    del fields["backbone_sha256"]
    notes.write_text(json.dumps(fields))
    capsys.readouterr()
    convert(tmp_path / "peft", tmp_path / "new", "--backbone", backbone)
    assert f"{tmp_path}/peft records no backbone_sha256" in capsys.readouterr().out
    found = artifacts.load_artifact(tmp_path / "new").config
    assert found["backbone_sha256"] == backbone_digest(load_backbone(backbone))


def test_convert_wrong_names_or_backbone_fail(backbone, tmp_path, capsys):
    source = write(tmp_path / "artifact", backbone)
    convert(source, tmp_path / "peft")
    folder, new = tmp_path / "peft", tmp_path / "x"
    assert "--backbone is missing" in refused(capsys, folder, new)
    said = refused(capsys, folder, new, "--backbone", backbone, "--runs", "a")
    assert "is 3, but the number of run names is 1" in said
    file = tmp_path / "a.npy"
    np.save(file, random(P, H))
    assert "one name per prompt" in refused(capsys, file, new, "--backbone", backbone)
    said = refused(capsys, folder, source, "--backbone", backbone)
    assert "already exists" in said
    said = refused(capsys, source, folder)
    assert "already exists" in said
    other = hf_folder(tmp_path / "other", "umt5")
    said = refused(capsys, folder, new, "--backbone", other)
    assert said.count("the sha256") == 1 and "were trained with another backbone" in said
    convert(source, tmp_path / "folded", "--to", "peft-folded")
    notes = tmp_path / "folded" / "beta" / "mpt_jax.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"embedding_sha256": "0" * 64}))
    said = refused(capsys, tmp_path / "folded", new, "--backbone", backbone)
    assert "adapters of several backbones" in said
    assert "Only conversions of backbones use --dtype" in refused(
        capsys, folder, new, "--backbone", backbone, "--dtype", "float32"
    )
    assert not new.exists()


# Comparison with PEFT's own model.


def ours(backbone: Path, artifact: Path, rows: list[int], texts: dict) -> tuple:
    """Our logits [B,L,V] and greedy tokens [B,L] of texts, each with the prompt of a row."""
    config, params = load_hf(backbone)
    read = artifacts.load_artifact(artifact)
    model = PromptedEncoderDecoder(Transformer(config), read.method, read.runs)
    size, length = texts["tokens"].shape
    slots = np.tile(np.arange(1, P + 1 + length), (size, 1))
    slots[:, P:] = 0
    tokens = np.pad(texts["tokens"], ((0, 0), (P, 0)))
    batch = {
        "encoder_input_tokens": jnp.asarray(tokens, jnp.int32),
        "encoder_prompt_slots": jnp.asarray(slots, jnp.int32),
        "encoder_task_ids": jnp.tile(jnp.asarray(rows, jnp.int32)[:, None], (1, P + length)),
        "decoder_input_tokens": jnp.asarray(texts["decoder_tokens"], jnp.int32),
    }
    tree = {**params, "prompt": read.params}
    return model.logits(tree, batch), model.predict_batch(tree, batch)


def texts() -> dict[str, np.ndarray]:
    """Three padded texts without the golden's end-of-sequence id, and targets shifted right."""
    rng = np.random.default_rng(5)
    mask = np.arange(9)[None] < np.asarray([9, 6, 2])[:, None]
    labels = rng.integers(2, 32, (3, 6))
    shifted = np.concatenate([np.zeros((3, 1), int), labels[:, :-1]], axis=1)
    tokens = rng.integers(2, 32, mask.shape) * mask
    return {"tokens": tokens, "mask": mask, "labels": labels, "decoder_tokens": shifted}


def theirs(backbone: Path, adapter: Path, batch: dict, task_ids: list[int] | None) -> tuple:
    """PEFT's logits and greedy tokens, by forward() and by generate()."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(backbone)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    tensors = {name: torch.tensor(x).long() for name, x in batch.items()}
    ids = {} if task_ids is None else {"task_ids": torch.tensor(task_ids)}
    inputs = {"input_ids": tensors["tokens"], "attention_mask": tensors["mask"], **ids}
    with torch.no_grad():
        # Labels and not decoder_input_ids, which its multitask forward() does not pass on.
        logits = model(**inputs, labels=tensors["labels"]).logits
        # Its cache counts the encoder's layers, of which this backbone has fewer.
        tokens = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=1, use_cache=False
        )
    return logits.numpy(), np.pad(tokens[:, 1:].numpy(), ((0, 0), (0, 7 - tokens.shape[1])))


@pytest.mark.parity
def test_peft_multitask_adapter_matches_our_logits_and_tokens(backbone, tmp_path):
    artifact = write(tmp_path / "artifact", backbone)
    convert(artifact, tmp_path / "peft")
    rows, batch = [2, 0, 1], texts()
    logits, tokens = theirs(backbone, tmp_path / "peft", batch, rows)
    expected, greedy = ours(backbone, artifact, rows, batch)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(tokens, greedy)
    other, _ = ours(backbone, artifact, [0, 0, 0], batch)
    assert np.abs(other - expected).max() > 0.1  # and the task matters


@pytest.mark.parity
@pytest.mark.parametrize("method", ["mpt", "prompt_tuning"])
def test_peft_folded_adapters_match_our_logits_and_tokens(method, backbone, tmp_path):
    artifact = write(tmp_path / "artifact", backbone, method)
    convert(artifact, tmp_path / "peft", "--to", "peft-folded")
    batch = texts()
    for row, name in enumerate(NAMES[:2]):
        logits, tokens = theirs(backbone, tmp_path / "peft" / name, batch, None)
        expected, greedy = ours(backbone, artifact, [row] * 3, batch)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parity
@pytest.mark.parametrize("copies", [1, None])  # None: PEFT's default, two for an encoder-decoder
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "MultitaskPromptTuningConfig"])
def test_convert_adapter_saved_by_peft_matches_its_outputs(
    kind, copies, backbone, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    multitask = kind.startswith("Multitask")
    more = {"num_tasks": 3, "num_ranks": R} if multitask else {}
    config = getattr(peft, kind)(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=P,
        num_transformer_submodules=copies,
        prompt_tuning_init="RANDOM",
        **more,
    )
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(backbone)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for number, x in enumerate(model.prompt_encoder.parameters()):
            x.copy_(torch.tensor(random(*x.shape, seed=number)))
    model.save_pretrained(tmp_path / "peft")
    names = NAMES if multitask else NAMES[:1]
    options = ("--backbone", backbone, "--runs", *names)
    if multitask and copies is None:
        assert "decoder's input" in refused(capsys, tmp_path / "peft", tmp_path / "a", *options)
        return
    convert(tmp_path / "peft", tmp_path / "a", *options)
    rows, batch = ([2, 0, 1] if multitask else [0, 0, 0]), texts()
    logits, tokens = theirs(backbone, tmp_path / "peft", batch, rows if multitask else None)
    expected, greedy = ours(backbone, tmp_path / "a", rows, batch)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(tokens, greedy)

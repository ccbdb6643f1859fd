"""Prompt artifacts: round trips, digests, and errors for damaged or incompatible ones."""

import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.artifacts import CONFIG, TENSORS
from mpt_jax.artifacts.model_card import NAME
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from tests.fixtures.saved_artifacts import DIGEST, EMBEDDING, PARAMS, RUNS, H, P, save_example

FILES = (CONFIG, TENSORS, NAME)
RNG = np.random.default_rng(1)
CHANGED = {**PARAMS, "shared": PARAMS["shared"] + 1e-3}


def test_save_artifact_misspelled_field_fails(tmp_path):
    with pytest.raises(TypeError, match="include_foldd"):
        save_example(tmp_path / "a", include_foldd=True)
    assert not (tmp_path / "a").exists()


def test_save_artifact_loads_equal(tmp_path):
    assert save_example(tmp_path / "a") == tmp_path / "a"
    read = artifacts.load_artifact(tmp_path / "a")
    assert read.method == MPT(P, rank=2)
    assert read.runs == RUNS
    assert sorted(read.params) == sorted(PARAMS)
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(read.params[name], value)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert read.config == config
    assert config["task_names"] == ["rte", "rte", "cb"]
    assert config["run_names"] == ["rte_s1", "rte_s2", "cb_s1"]
    assert config["groups"] == [0, 1, 0]
    assert (config["step"], config["backbone"]) == (120, "tiny")
    assert config["metrics"] == {"rte_s1": {"accuracy": 61.5}}
    assert config["embedding_sha256"] == DIGEST
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)


def test_save_artifact_include_folded_writes_plain_prompts(tmp_path):
    expected = PARAMS["shared"][[0, 1, 0]] * (PARAMS["task_left"] @ PARAMS["task_right"])
    save_example(tmp_path / "plain")
    save_example(tmp_path / "both", include_folded=True)
    np.testing.assert_allclose(
        artifacts.load_artifact(tmp_path / "plain").folded(), expected, atol=1e-6, rtol=1e-6
    )
    tensors = load((tmp_path / "both" / TENSORS).read_bytes())
    folded = {name for name in tensors if name.startswith("folded/")}
    assert folded == {"folded/rte_s1", "folded/rte_s2", "folded/cb_s1"}
    np.testing.assert_allclose(tensors["folded/cb_s1"], expected[2], atol=1e-6, rtol=1e-6)
    assert not any("folded" in name for name in load((tmp_path / "plain" / TENSORS).read_bytes()))


def crosspt(**settings):
    """CrossPT with two sources, and its parameters, with the step counter as in training."""
    method = CrossPT(P, ["mnli", "qqp"], **settings)
    shapes = {"sources": (2, 2, P, H), "private": (3, P, H), "router": (3, 2), "clock": (2,)}
    return method, {name: RNG.normal(size=shape) for name, shape in shapes.items()}


def test_save_artifact_mixing_method_records_weights(tmp_path):
    method, params = crosspt()
    save_example(tmp_path / "a", method, params)
    read = artifacts.load_artifact(tmp_path / "a")
    # Relaxed Bernoulli without draws, as in the released code: the softmax of the logits.
    scores = np.exp(params["router"])
    expected = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(read.weights(), expected, atol=1e-6)
    recorded = read.config["mixture"]
    assert list(recorded) == list(RUNS.run_names)
    for run, row in zip(recorded, expected, strict=True):
        assert recorded[run] == pytest.approx({"mnli": row[0], "qqp": row[1]}, abs=1e-6)
    card = (tmp_path / "a" / NAME).read_text()
    assert f"| `cb_s1` | {expected[2, 0]:.3f} | {expected[2, 1]:.3f} |" in card


def test_save_artifact_no_fixed_mixture_records_none(tmp_path):
    shapes = {"sources": (2, P, H), "target": (3, P, H), "down": (2, H, 2), "up": (2, 2, H)}
    shapes |= {"norm_scale": (2, H), "norm_bias": (2, H)}
    params = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    save_example(tmp_path / "text", ATTEMPT(P, ["mnli", "qqp"], width=2), params)
    save_example(tmp_path / "none")
    for name, error, words in (
        ("text", ValueError, "depend on the text"),
        ("none", NotImplementedError, "does not mix prompts"),
    ):
        read = artifacts.load_artifact(tmp_path / name)
        assert read.config["mixture"] is None
        with pytest.raises(error, match=words):
            read.weights()


def test_save_artifact_prompt_tuning_loads_equal(tmp_path):
    table = {"table": jnp.asarray(RNG.normal(size=(3, P, H)), jnp.float32)}
    save_example(tmp_path / "a", PromptTuning(P), table)
    read = artifacts.load_artifact(tmp_path / "a")
    assert read.method == PromptTuning(P)
    np.testing.assert_array_equal(read.folded(), table["table"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_artifact_prompts_not_finite_error_names_parameter(value, tmp_path):
    table = np.zeros((3, P, H), np.float32)
    table[1, 2, 3] = value
    save_example(tmp_path / "a", PromptTuning(P), {"table": table})
    with pytest.raises(ValueError, match="prompts.safetensors has .* NaN or infinite .*: table"):
        artifacts.load_artifact(tmp_path / "a")


def test_save_artifact_existing_folder_is_replaced(tmp_path):
    save_example(tmp_path / "a")
    (tmp_path / "a" / "stray").write_text("")
    save_example(tmp_path / "a", step=240)
    assert artifacts.load_artifact(tmp_path / "a").config["step"] == 240
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "no scratch folder remains"


def test_save_artifact_failed_write_keeps_old_artifact(tmp_path):
    save_example(tmp_path / "a")
    with pytest.raises(TypeError, match="JSON"):
        save_example(tmp_path / "a", metrics={"rte": object()})
    assert artifacts.load_artifact(tmp_path / "a").config["step"] == 120
    save_example(tmp_path / "a", step=240)
    assert [path.name for path in tmp_path.iterdir()] == ["a"], (
        "the failed write's scratch folder is removed"
    )


# --- Digests -------------------------------------------------------------------------------------


def test_embedding_digest_bfloat16_and_float32_are_equal():
    rounded = jnp.asarray(EMBEDDING, jnp.bfloat16)
    assert artifacts.embedding_digest(rounded) == DIGEST
    assert artifacts.embedding_digest(rounded.astype(jnp.float32)) == DIGEST
    assert artifacts.embedding_digest(jax.device_put(EMBEDDING)) == DIGEST
    other = EMBEDDING.copy()
    other[7, 2] += 0.1
    assert artifacts.embedding_digest(other) != DIGEST
    assert len(DIGEST) == 64


def test_vocabulary_digest_differs_by_vocabulary():
    class SentencePiece:
        vocab_size = 30

        def __init__(self, model: bytes):
            self.sp_model = model

    class Bytes:
        vocab_size = 259

    digest = artifacts.vocabulary_digest
    assert digest(None) is None
    assert digest(SentencePiece(b"a")) == digest(SentencePiece(b"a"))
    assert digest(SentencePiece(b"a")) != digest(SentencePiece(b"b"))
    assert digest(Bytes()) not in (None, digest(SentencePiece(b"a")))


def test_check_compatible_other_backbone_shows_both_digests(tmp_path):
    read = artifacts.load_artifact(save_example(tmp_path / "a"))
    compatibility.check_compatible(read, DIGEST, None, {}, "v" * 64, P)
    with pytest.raises(ValueError) as error:
        compatibility.check_compatible(read, "0" * 64, None, {}, "v" * 64, P)
    assert DIGEST in str(error.value) and "0" * 64 in str(error.value)
    assert str(tmp_path / "a") in str(error.value)


CONFIG_OF_T5 = {"mlp_activations": ["relu"], "relative_attention_max_distance": 128}


def test_check_compatible_other_configuration_of_backbone_shows_both_values(tmp_path, caplog):
    saved = save_example(tmp_path / "a", backbone_sha256="b" * 64, backbone_config=CONFIG_OF_T5)
    read = artifacts.load_artifact(saved)
    arguments = read, DIGEST, "b" * 64
    with caplog.at_level("WARNING", logger="absl"):
        compatibility.check_compatible(*arguments, CONFIG_OF_T5, "v" * 64, P)
    assert not caplog.messages
    other = {**CONFIG_OF_T5, "relative_attention_max_distance": 16}
    with pytest.raises(ValueError) as error:
        compatibility.check_compatible(*arguments, other, "v" * 64, P)
    said = str(error.value)
    assert "(relative_attention_max_distance: saved 128, current 16)" in said
    assert str(tmp_path / "a") in said and "--config" in said
    later = {**CONFIG_OF_T5, "of_a_later_version": 1}
    compatibility.check_compatible(*arguments, later, "v" * 64, P)


def test_check_compatible_without_configuration_of_backbone_warns(tmp_path, caplog):
    read = artifacts.load_artifact(save_example(tmp_path / "a", backbone_sha256="b" * 64))
    with caplog.at_level("WARNING", logger="absl"):
        compatibility.check_compatible(read, DIGEST, "b" * 64, CONFIG_OF_T5, "v" * 64, P)
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}/a records no backbone_config")


def test_check_compatible_other_vocabulary_fails_unknown_passes(tmp_path):
    read = artifacts.load_artifact(save_example(tmp_path / "a"))
    with pytest.raises(ValueError, match=f"{'v' * 64}.*{'w' * 64}"):
        compatibility.check_compatible(read, DIGEST, None, {}, "w" * 64, P)
    compatibility.check_compatible(read, DIGEST, None, {}, None, P)
    unknown = artifacts.load_artifact(save_example(tmp_path / "b", vocabulary_sha256=None))
    compatibility.check_compatible(unknown, DIGEST, None, {}, "w" * 64, P)


def test_check_compatible_other_prompt_length_fails(tmp_path):
    read = artifacts.load_artifact(save_example(tmp_path / "a"))
    with pytest.raises(ValueError, match="prompts of 4 positions, but this job needs 5"):
        compatibility.check_compatible(read, DIGEST, None, {}, "v" * 64, P + 1)


# --- Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [TENSORS, CONFIG, None])
def test_load_artifact_missing_file_names_folder(tmp_path, gone):
    path = tmp_path / "a"
    if gone:
        save_example(path)
        (path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"No prompt artifact at {path}.*{TENSORS}"):
        artifacts.load_artifact(path)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_load_artifact_truncated_file_fails(tmp_path, name, keep):
    path = save_example(tmp_path / "a")
    content = (path / name).read_bytes()
    kept = int(len(content) * keep) if isinstance(keep, float) else keep
    (path / name).write_bytes(content[:kept].rstrip(b"}\n") if name == CONFIG else content[:kept])
    with pytest.raises(ValueError, match=f"{path / name}.*Copy the artifact again"):
        artifacts.load_artifact(path)


def edit(path, change) -> None:
    config = json.loads((path / CONFIG).read_text())
    change(config)
    (path / CONFIG).write_text(json.dumps(config))


def test_load_artifact_other_format_shows_both_formats(tmp_path):
    path = save_example(tmp_path / "a")
    edit(path, lambda config: config.update(format=2))
    with pytest.raises(ValueError, match="format 2, but this version of MPT-JAX reads format 1"):
        artifacts.load_artifact(path)


def test_load_artifact_changed_prompts_fail(tmp_path):
    """Names and shapes are right, but one bit is flipped or the values are another run's."""
    path, other = save_example(tmp_path / "a"), save_example(tmp_path / "b", params=CHANGED)
    whole = (path / TENSORS).read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content in (bytes(flipped), (other / TENSORS).read_bytes()):
        (path / TENSORS).write_bytes(content)
        with pytest.raises(ValueError, match=f"{path / TENSORS} was changed .*sha256"):
            artifacts.load_artifact(path)
    (path / TENSORS).write_bytes(whole)
    config = artifacts.load_artifact(path).config
    assert config["prompts_sha256"] == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"run_names": ["rte_s2", "rte_s1", "cb_s1"]},
        {"step": 121},
        {"metrics": {"rte_s1": {"accuracy": 99.0}}},
        {"embedding_sha256": "0" * 64},
        {"prompts_sha256": None},
        {"mixture": {}},
    ],
)
def test_load_artifact_with_changed_config_error_shows_both_digests(tmp_path, change):
    path = save_example(tmp_path / "a")
    recorded = json.loads((path / CONFIG).read_text())["config_sha256"]
    edit(path, lambda config: config.update(change))
    with pytest.raises(ValueError) as error:
        artifacts.load_artifact(path)
    said = str(error.value)
    assert f"{path / CONFIG} was changed after it was written" in said and recorded in said
    assert re.search(r"is [0-9a-f]{64}, but its config_sha256 is", said) and "Undo" in said
    edit(path, lambda config: config.pop("config_sha256"))  # as in an earlier version
    artifacts.load_artifact(path)


def test_load_artifact_with_another_router_setting_error(tmp_path):
    """The arrays fit both settings, which give other prompts."""
    method = CrossPT(P, ("a", "b"), normalize="sum", private_length=2, compose_by="private_cat")
    shapes = {"sources": (2, 2, P, H), "private": (3, 2, H), "router": (3, 2), "clock": (2,)}
    params = {name: RNG.uniform(1, 2, shape).astype("f") for name, shape in shapes.items()}
    path = save_example(tmp_path / "a", method, params)
    before = artifacts.load_artifact(path).folded()
    edit(path, lambda config: config["method_config"].update(normalize="softmax"))
    with pytest.raises(ValueError, match="config.json was changed after it was written"):
        artifacts.load_artifact(path)
    edit(path, lambda config: config.pop("config_sha256"))
    assert np.abs(artifacts.load_artifact(path).folded() - before).max() > 0.01


def test_load_artifact_with_config_of_another_layout_is_read(tmp_path):
    path = save_example(tmp_path / "a")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config, separators=(",", ":")))
    assert artifacts.load_artifact(path).config == config


def test_load_artifact_without_digest_warns(tmp_path, caplog):
    path = save_example(tmp_path / "a")
    edit(path, lambda config: (config.pop("prompts_sha256"), config.pop("config_sha256")))
    with caplog.at_level("WARNING", logger="absl"):
        np.testing.assert_array_equal(
            artifacts.load_artifact(path).params["shared"], PARAMS["shared"]
        )
    assert f"{path / CONFIG} has no prompts_sha256" in caplog.text


def test_save_artifact_after_killed_write_removes_scratch_folders(tmp_path):
    (tmp_path / ".a.new").mkdir()
    (tmp_path / ".a.new" / TENSORS).write_text("half")
    save_example(tmp_path / "a")
    (tmp_path / ".a.old").mkdir()
    save_example(tmp_path / "a", step=7)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert artifacts.load_artifact(tmp_path / "a").config["step"] == 7


def test_load_artifact_unknown_method_lists_known_methods(tmp_path):
    path = save_example(tmp_path / "a")
    edit(path, lambda config: config.update(method="mptt"))
    with pytest.raises(ValueError, match="'mptt'.*'mpt'.*prompt_tuning"):
        artifacts.load_artifact(path)


@pytest.mark.parametrize("key", ["run_names", "shapes", "method_config", "embedding_sha256"])
def test_load_artifact_incomplete_config_names_missing_field(tmp_path, key):
    path = save_example(tmp_path / "a")
    edit(path, lambda config: config.pop(key))
    with pytest.raises(ValueError, match=f"{path}.*{key}"):
        artifacts.load_artifact(path)


def test_load_artifact_wrong_tensors_are_named(tmp_path):
    path = save_example(tmp_path / "a")
    tensors = load((path / TENSORS).read_bytes())
    del tensors["factors/shared"]
    tensors["factors/router"] = np.zeros(3, np.float32)
    tensors["factors/task_left"] = tensors["factors/task_left"][:2]
    (path / TENSORS).write_bytes(save(tensors))
    with pytest.raises(ValueError) as error:
        artifacts.load_artifact(path)
    message = str(error.value)
    assert "missing: shared" in message and "not expected: router" in message
    assert "task_left: expected (3, 4, 2), found (2, 4, 2)" in message
    assert str(path) in message

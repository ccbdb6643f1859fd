"""Artifacts of a dual encoder's prompts: round trips, and errors for other inputs or backbones."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.artifacts import CONFIG, SEAL, TENSORS
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.artifacts.model_card import NAME
from mpt_jax.core import schema
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from tests.fixtures import clip_models, saved_artifacts, tiny_clip

RUNS = Runs(["pets", "shapes", "pets"], ["pets_s1", "shapes", "pets_s2"], groups=[0, 0, 1])
PROMPT = SitePrompts(MPT(3, 2, Uniform()), MPT(6, 1, Uniform()), image_layers=3)
MODEL = tiny_clip.model(PROMPT, RUNS)
BACKBONE = clip_models.random_params(MODEL.module.config)
PARAMS = jax.tree.map(np.asarray, tiny_clip.params(MODEL)["prompt"])
DIGEST = artifacts.embedding_digest(MODEL.embedding(BACKBONE))
CONFIGURATION = backbone_config(MODEL.backbone_config)
LENGTH = 3 + 6


def saved(path, method=PROMPT, params=PARAMS, runs=RUNS, **overrides):
    fields = {
        "embedding_sha256": DIGEST,
        "backbone_sha256": "b" * 64,
        "backbone_config": CONFIGURATION,
        **MODEL.input_digests,
    }
    return saved_artifacts.save(path, method, params, runs, **{**fields, **overrides})


def check(read, **overrides):
    """Checks an artifact against the model, with some facts replaced."""
    facts = {
        "embedding_sha256": DIGEST,
        "backbone_sha256": "b" * 64,
        "backbone_config": CONFIGURATION,
        "vocabulary_sha256": "v" * 64,
        "prompt_length": LENGTH,
        "input_digests": MODEL.input_digests,
    }
    compatibility.check_compatible(read, **{**facts, **overrides})


def test_save_artifact_loads_equal(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        read = artifacts.load_artifact(saved(tmp_path / "a"))
        check(read)
    assert not caplog.messages
    assert read.method.config() == PROMPT.config() and read.runs == RUNS
    assert sorted(flatten(read.params)) == sorted(flatten(PARAMS))
    for name, value in flatten(PARAMS).items():
        np.testing.assert_array_equal(flatten(read.params)[name], value, name)
    assert read.prompt_length == LENGTH
    assert read.config["method"] == "site_prompts"
    assert read.config["image_transform_sha256"] == MODEL.input_digests["image_transform_sha256"]
    assert "site_prompts" in (tmp_path / "a" / NAME).read_text()


def test_save_artifact_include_folded_writes_plain_prompts_of_sites(tmp_path):
    path = saved(tmp_path / "a", include_folded=True)
    tensors = load((path / TENSORS).read_bytes())
    folded = {name for name in tensors if name.startswith("folded/")}
    assert folded == {f"folded/{run}/{site}" for run in RUNS.run_names for site in (TEXT, IMAGE)}
    for row, run in enumerate(RUNS.run_names):
        for site in (TEXT, IMAGE):
            own = PARAMS[site]
            shared = own["shared"][RUNS.group_of_row[row]]
            expected = shared * (own["task_left"][row] @ own["task_right"][row])
            np.testing.assert_allclose(tensors[f"folded/{run}/{site}"], expected, atol=1e-6)
    artifacts.load_artifact(path)


@pytest.mark.parametrize("site", [TEXT, IMAGE])
def test_save_artifact_of_one_site(tmp_path, site):
    method = SitePrompts(**{site: PromptTuning(4)})
    width = {TEXT: 16, IMAGE: 24}[site]
    table = np.random.default_rng(0).normal(size=(3, 4, width)).astype(np.float32)
    read = artifacts.load_artifact(saved(tmp_path / "a", method, {site: {"table": table}}))
    assert list(read.method.parts) == [site] and read.prompt_length == 4
    np.testing.assert_array_equal(read.params[site]["table"], table)


def test_check_compatible_other_image_transform_shows_both_digests(tmp_path):
    class Squash(tiny_clip.Transform):
        def config(self):
            return {**super().config(), "mode": "squash"}

    read = artifacts.load_artifact(saved(tmp_path / "a"))
    other = tiny_clip.model(PROMPT, RUNS, image_transform=Squash()).input_digests
    with pytest.raises(ValueError, match="trained with other inputs") as error:
        check(read, input_digests=other)
    for digests in (other, MODEL.input_digests):
        assert digests["image_transform_sha256"] in str(error.value)
    text = artifacts.load_artifact(saved_artifacts.save_example(tmp_path / "text"))
    with pytest.raises(ValueError, match="image_transform_sha256 is None"):
        compatibility.check_compatible(
            text, saved_artifacts.DIGEST, None, {}, "v" * 64, 4, MODEL.input_digests
        )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"embedding_sha256": "0" * 64}, "another backbone.*of its embedding"),
        ({"backbone_sha256": "0" * 64}, "another backbone.*of its weights"),
        (
            {"backbone_config": {**CONFIGURATION, "activation": "gelu"}},
            "activation: saved .quick_gelu",
        ),
        ({"vocabulary_sha256": "0" * 64}, "another vocabulary"),
        ({"prompt_length": 3}, "prompts of 9 positions, but this job needs 3"),
    ],
)
def test_check_compatible_other_backbone_fails(tmp_path, changed, words):
    read = artifacts.load_artifact(saved(tmp_path / "a"))
    with pytest.raises(ValueError, match=words):
        check(read, **changed)


def test_merge_of_site_artifacts_fails(tmp_path):
    first = artifacts.load_artifact(saved(tmp_path / "a"))
    runs = Runs(["x", "y", "z"], groups=[0, 0, 1])
    second = artifacts.load_artifact(saved(tmp_path / "b", runs=runs))
    assert compatibility.merge([first]) is first
    with pytest.raises(ValueError, match="no single plain prompt"):
        compatibility.merge([first, second])


def changed(path, change, **tensors):
    """Writes other settings of the method, and other arrays, with correct digests."""
    config = json.loads((path / CONFIG).read_text())
    arrays = {**load((path / TENSORS).read_bytes()), **tensors}
    (path / TENSORS).write_bytes(save(arrays))
    config["prompts_sha256"] = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    factors = {k.removeprefix("factors/"): list(v.shape) for k, v in arrays.items()}
    config = {**config, "shapes": factors}
    config["method_config"] = {**config["method_config"], **change}
    (path / CONFIG).write_text(json.dumps(schema.sealed(config, SEAL)))
    return path


NESTED = {"method": "site_prompts", "config": PROMPT.config()}
LONGER = {"method": "mpt", "config": {"prompt_length": 12, "rank": 1}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({TEXT: None}, "no such parameter"),
        ({IMAGE: NESTED}, "another SitePrompts"),
        ({IMAGE: LONGER}, "arrays give prompts of shape"),
        ({"image_layers": 4}, "do not divide"),
        ({"image_layers": 10**12}, "2147483647"),
        ({"text_classes": -3}, ">= 0"),
        ({TEXT: {"method": "mpt", "config": []}}, "object"),
        ({TEXT: {"method": "prompt_tuning", "config": {"prompt_length": 3}}}, "no such parameter"),
    ],
)
def test_load_artifact_of_wrong_settings_fails(tmp_path, change, words):
    path = changed(saved(tmp_path / "a"), change)
    with pytest.raises(ValueError, match=words):
        artifacts.load_artifact(path)


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [("shared", (3, 6, 24)), ("task_left", (2, 6, 1)), ("task_right", (3, 1, 25)), ("other", (3,))],
)
def test_load_artifact_of_wrong_arrays_fails(tmp_path, leaf, shape):
    arrays = {f"factors/{IMAGE}/{leaf}": np.ones(shape, np.float32)}
    path = changed(saved(tmp_path / "a"), {}, **arrays)
    with pytest.raises(ValueError, match=TENSORS):
        artifacts.load_artifact(path)


def test_load_artifact_not_finite_names_parameter(tmp_path):
    bad = jax.tree.map(np.copy, PARAMS)
    bad[IMAGE]["shared"][1, 2, 3] = np.nan
    path = saved(tmp_path / "a", params=bad)
    with pytest.raises(ValueError, match="NaN or infinite .*: image_tokens/shared"):
        artifacts.load_artifact(path)

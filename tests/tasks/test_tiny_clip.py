"""The tiny CLIP: its pretraining, and the folder that is shipped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.clip import parameter_shapes
from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.convert.clip import load_clip, read_clip_config
from mpt_jax.core.tree import flatten
from mpt_jax.runtime import paths
from mpt_jax.tasks import toy_captions, toy_clip_pretrain, toy_image_tasks
from mpt_jax.tasks import toy_images as world
from tests.fixtures import clip_models

MEGABYTE = 2**20
NAMES = ("images", "tokens", "ends")


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(paths.shipped(name="tiny_clip"))


@pytest.fixture(scope="module")
def params(folder):
    return load_clip(folder, toy_clip_pretrain.config())


# --- pretraining -----------------------------------------------------------------------------


def test_configuration_is_size_a():
    config = toy_clip_pretrain.config()
    image, text = config.image, config.text
    assert text is not None
    assert (image.image_size, image.patch_size, image.num_tokens) == (32, 8, 17)
    assert (image.num_layers, text.num_layers) == (4, 3)
    for tower in (image, text):
        assert (tower.emb_dim, tower.num_heads, tower.mlp_dim) == (128, 4, 512)
    assert text.context_length == 16 and config.joint_dim == 64
    assert 1.5e6 < sum(map(math.prod, parameter_shapes(config).values())) < 1.6e6


def test_batches_depend_on_seed_and_step_only_and_have_no_held_out_pairs(monkeypatch):
    monkeypatch.setattr(toy_clip_pretrain, "BATCH", 40)
    ahead = list(toy_clip_pretrain.batches(0, 6, ahead=2))
    assert len(ahead) == 6
    for step, batch in enumerate(ahead):
        jax.tree.map(np.testing.assert_array_equal, batch, toy_clip_pretrain.batch(0, step))
        assert batch["images"].shape == (40, 32, 32, 3) and batch["tokens"].shape == (40, 16)
    assert not np.array_equal(ahead[0]["images"], ahead[1]["images"])
    assert not np.array_equal(ahead[0]["images"], toy_clip_pretrain.batch(1, 0)["images"])
    monkeypatch.undo()
    for step in range(20):
        equal, different = toy_clip_pretrain.scenes_of_step(0, step)
        assert (len(equal), len(different)) == (218, 38)
        for scenes in (equal, different):
            assert not world.HELD_OUT[scenes.shapes, scenes.colors].any()


@pytest.mark.slow
def test_loss_against_numpy():
    params = clip_models.random_params(toy_clip_pretrain.config())
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    tokens, ends = toy_captions.tokens([f"a {x}." for x in "abcdef"])
    batch = {name: jnp.asarray(x) for name, x in zip(NAMES, (pixels, tokens, ends), strict=True)}
    params["logit_scale"] = np.float32(1.5)
    loss, accuracy = toy_clip_pretrain.contrastive_loss(params, batch)
    features = clip_models.features(
        toy_clip_pretrain.config(), params, batch["images"], batch["tokens"], batch["ends"]
    )
    image, text = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (features[f"{kind}_features"].astype(np.float64) for kind in ("image", "text"))
    )
    logits = math.exp(1.5) * image @ text.T
    right = np.diag(logits)
    rows, columns = (np.log(np.exp(logits).sum(axis)) - right for axis in (1, 0))
    assert float(loss) == pytest.approx((rows.mean() + columns.mean()) / 2, abs=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(1) == np.arange(6)))


def test_optimizer_decays_matrices_only_and_follows_its_schedule():
    optimizer = toy_clip_pretrain.optimizer(2000)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "logit_scale": jnp.ones(())}
    state, still = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    decays = []
    for _ in range(2000):
        updates, state = jax.jit(optimizer.update)(still, state, params)
        decays.append(float(updates["kernel"][0, 0]))
        assert not updates["bias"].any() and not updates["logit_scale"].any()
        if len(decays) > 210:
            break
    rates = np.array(decays) / -0.1
    np.testing.assert_allclose(rates[:201], 1e-3 * np.arange(201) / 200, rtol=1e-4)
    cosine = 0.5e-3 * (1 + np.cos(np.pi * np.arange(1, 11) / 1800))
    np.testing.assert_allclose(rates[201:211], cosine, rtol=1e-4)


@pytest.mark.slow
def test_command_writes_a_folder_that_loads_and_clamps_the_logit_scale(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(toy_clip_pretrain, "BATCH", 16)
    monkeypatch.setattr(toy_clip_pretrain, "MOST_LOGIT_SCALE", 2.0)
    two = {name: toy_image_tasks.TASKS[name] for name in ("toy_size", "toy_many")}
    monkeypatch.setattr(toy_image_tasks, "TASKS", two)
    out = tmp_path / "clip"
    toy_clip_pretrain.main(["--out", str(out), "--steps", "3", "--seed", "4"])
    assert "Wrote" in capsys.readouterr().out
    assert read_clip_config(out) == toy_clip_pretrain.config()
    assert float(load_clip(out)["logit_scale"]) == 2.0
    assert {path.name for path in out.iterdir()} == FILES
    (line,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert line["step"] == 3 and 2 < line["loss"] < 4
    assert "--steps 3 --seed 4" in (out / "log.md").read_text()
    assert set(logged(out)) == {"toy_size", "toy_many", "mean"}
    with pytest.raises(SystemExit):
        toy_clip_pretrain.main(["--out", str(out)])
    assert "already exists" in capsys.readouterr().err


# --- the shipped folder ----------------------------------------------------------------------

FILES = {
    "config.json",
    "log.jsonl",
    "log.md",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "vocab.json",
}


def test_shipped_folder_has_the_files_of_the_command_and_a_size_below_six_megabytes(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * MEGABYTE


def test_shipped_folder_has_the_configuration_and_tokenizer_of_the_suite(folder, params):
    assert read_clip_config(folder) == toy_clip_pretrain.config()
    assert ClipTokenizer.from_folder(folder).identity == toy_captions.tokenizer().identity
    assert {x.dtype.name for x in flatten(params).values()} == {"bfloat16"}
    assert 10 < math.exp(float(params["logit_scale"])) < 100.5


def logged(folder: Path) -> dict[str, float]:
    text = (folder / "log.md").read_text()
    rows = re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| ([\d.]+) \|$", text, re.MULTILINE)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize("name", ["toy_shape", "toy_many"])
def test_shipped_zero_shot_is_that_of_the_log(folder, params, name):
    measured = toy_clip_pretrain.zero_shot(params, toy_image_tasks.TASKS[name])
    # One image of 500 is 0.2; ties of rounding may be resolved differently elsewhere.
    assert measured == pytest.approx(logged(folder)[name], abs=0.5)


def test_logged_zero_shot_is_useful_and_leaves_room_for_prompts(folder):
    results = logged(folder)
    mean = results.pop("mean")
    assert set(results) == set(toy_image_tasks.TASKS)
    assert mean == pytest.approx(np.mean(list(results.values())), abs=0.1)
    assert 45 < mean < 75


@pytest.mark.parity
def test_transformers_gives_the_same_features(folder, params):
    import torch
    import transformers

    theirs = transformers.CLIPModel.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    images, _ = toy_image_tasks.TASKS["toy_many"].arrays("validation")
    texts = ["a photo of a red circle.", "two striped things", "a moon at the top left."]
    tokens, ends = toy_captions.tokens(texts)
    config = toy_clip_pretrain.config()
    ours = clip_models.features(config, params, images[:8], tokens, ends)
    inputs = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(list(images[:8]), return_tensors="pt")["pixel_values"]
        image = theirs.get_image_features(pixel_values=pixels)
        text = theirs.get_text_features(**inputs)
    np.testing.assert_allclose(ours["image_features"], image.numpy(), atol=2e-5)
    np.testing.assert_allclose(ours["text_features"], text.numpy(), atol=2e-5)

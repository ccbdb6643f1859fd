"""`load_backbone` and `save_backbone` of a T5 and of a CLIP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mpt_jax.convert import load_backbone, load_hf, save_backbone
from mpt_jax.convert.clip import load_clip, read_clip_config
from mpt_jax.core.tree import flatten
from tests.fixtures import clip_models
from tests.fixtures.hf_checkpoints import hf_folder

CLIP = clip_models.shallow()


def same(found, expected) -> None:
    assert flatten(found).keys() == flatten(expected).keys()
    for name, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(found)[name], leaf, err_msg=name)


def test_clip_is_saved_as_a_hugging_face_folder_and_read_again(tmp_path):
    params = clip_models.random_params(CLIP)
    path = save_backbone(tmp_path / "clip", params, CLIP, 7)
    assert path == str(tmp_path / "clip") and (Path(path) / "model.safetensors").exists()
    assert read_clip_config(path) == CLIP
    same(load_backbone(path, CLIP), params)
    same(load_clip(path), params)
    with pytest.raises(FileExistsError):
        save_backbone(path, params, CLIP, 8)


def test_t5_is_saved_as_a_t5x_checkpoint_and_read_again(tmp_path):
    config, params = load_hf(hf_folder(tmp_path / "hf"))
    path = save_backbone(tmp_path / "t5", params, config, 7)
    assert path == str(tmp_path / "t5" / "checkpoint_7")
    same(load_backbone(path), params)
    same(load_backbone(path, config), params)
    same(load_backbone(tmp_path / "hf", config), params)


def test_backbone_of_the_other_kind_or_architecture_fails(tmp_path):
    clip = save_backbone(tmp_path / "clip", clip_models.random_params(CLIP), CLIP, 0)
    t5 = hf_folder(tmp_path / "t5")
    for path, config, message in (
        (clip, dataclasses.replace(CLIP, activation="gelu"), "activation is 'gelu' in the model"),
        (clip, clip_models.tiny(), "in the model and .* in the folder"),
        (clip, None, "model_type 'clip', which is not supported. Use a model of type t5"),
        (clip, load_hf(t5)[0], "model_type 'clip', which is not supported"),
        (t5, CLIP, "model_type t5, which is not supported. Use a model of type clip or vit"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_backbone(path, config)
        assert str(raised.value).endswith("."), raised.value
    with pytest.raises(FileNotFoundError, match="has no config.json and no open_clip_config.json"):
        load_backbone(tmp_path, CLIP)

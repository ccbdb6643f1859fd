"""Resizing of images that a CLIP's folder describes: read, written, and warned of."""

import json
import re
from pathlib import Path

import pytest

from mpt_jax.backbones.clip import clip_config, hf_config, open_clip_config
from mpt_jax.backbones.clip.config import Resizing, architecture
from mpt_jax.backbones.clip.published import read_config
from tests.fixtures.clip_models import tiny

EDGE, SQUARE, LARGE = (
    {"shortest_edge": 16},
    {"height": 16, "width": 16},
    {"height": 20, "width": 20},
)
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 4}


def hf_folder(folder: Path, preprocessor: object, config: object = None) -> Path:
    fields = config or hf_config.fields_of(tiny())
    (folder / hf_config.CONFIG).write_text(json.dumps(fields))
    (folder / hf_config.PREPROCESSOR).write_text(json.dumps(preprocessor))
    return folder


def open_clip_folder(folder: Path, preprocess: object) -> Path:
    fields = {**open_clip_config.fields_of(tiny()), "preprocess_cfg": preprocess}
    (folder / open_clip_config.CONFIG).write_text(json.dumps(fields))
    return folder


def check(folder: Path, expected: Resizing | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_config(folder)
    else:
        config = read_config(folder)
        assert config is not None and config.resizing == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": 16, "crop_size": 16, "resample": 3}, Resizing()),
        ({"size": EDGE, "crop_size": SQUARE}, Resizing()),
        ({"size": 20, "crop_size": 16}, Resizing("crop", 20)),
        ({"size": {"shortest_edge": 20}, "crop_size": SQUARE}, Resizing("crop", 20)),
        ({"size": SQUARE, "crop_size": SQUARE, "do_center_crop": True}, Resizing("squash")),
        ({"size": SQUARE, "do_center_crop": False}, Resizing("squash")),
        ({}, Resizing()),
        ({"resample": 2}, "resample = 2, which is invalid"),
        ({"resample": 0}, "resample = 0, which is invalid"),
        ({"do_resize": False}, "do_resize = false, which is invalid"),
        ({"size": {"longest_edge": 16}}, "longest_edge"),
        ({"size": LARGE, "crop_size": SQUARE}, "to 20 x 20 pixels before the crop of 16 x 16"),
        ({"size": 12, "crop_size": 16}, "a shorter edge of 12 pixels before the crop of 16 x 16"),
        ({"size": LARGE, "do_center_crop": False}, "makes images of 20 x 20 pixels, but"),
    ],
    ids=str,
)
def test_hugging_face_clip_resizing_is_read(fields, expected, tmp_path):
    check(hf_folder(tmp_path, fields), expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": 16, "resample": 2}, Resizing("squash", None, "bilinear")),
        ({"size": SQUARE, "resample": 3}, Resizing("squash")),
        ({}, Resizing("squash", None, "bilinear")),
        ({"size": 20, "resample": 2}, "makes images of 20 x 20 pixels, but"),
        ({"resample": 1}, "resample = 1, which is invalid"),
    ],
    ids=str,
)
def test_hugging_face_vit_resizing_is_read_with_its_defaults(fields, expected, tmp_path):
    check(hf_folder(tmp_path, fields, VIT), expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}, Resizing()),
        ({"size": 16, "mode": "RGB", "resize_mode": "squash"}, Resizing("squash")),
        ({"size": [16, 16]}, Resizing()),
        ({"size": [16, 20]}, r"size \[16, 20\], but the model has positions for 16 x 16. Use the"),
        ({"interpolation": "bilinear"}, 'preprocess_cfg.interpolation = "bilinear", which is inv'),
        ({"resize_mode": "longest"}, 'preprocess_cfg.resize_mode = "longest", which is invalid'),
        ({"mode": "L"}, 'preprocess_cfg.mode = "L", which is invalid'),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
    ids=str,
)
def test_open_clip_resizing_is_read(fields, expected, tmp_path):
    check(open_clip_folder(tmp_path, fields), expected)


@pytest.mark.parametrize("resizing", [Resizing(), Resizing("squash"), Resizing("crop", 20)])
def test_resizing_is_written_but_not_compared(resizing, tmp_path):
    config = tiny(resizing=resizing)
    assert config == tiny() and architecture(config) == architecture(tiny())
    check(hf_folder(tmp_path, hf_config.preprocessor_fields_of(config)), resizing)
    (tmp_path / hf_config.CONFIG).unlink()
    if resizing.resize_to is None:
        fields = open_clip_config.fields_of(config)["preprocess_cfg"]
        check(open_clip_folder(tmp_path, fields), resizing)
    else:
        with pytest.raises(ValueError, match="shorter edge of 20 pixels .*Keep the model in Hug"):
            open_clip_config.fields_of(config)


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        (None, {"size": 16, "crop_size": 16}, []),
        (None, {"size": SQUARE}, ["both edges to 16 pixels, but .* Set IMAGE_MODE = 'squash', if"]),
        (
            None,
            {"size": 20, "crop_size": 16},
            ["shorter edge to 20 pixels, but .*Set image_transforms.ImageTransform.resize_to ="],
        ),
        (VIT, {}, ["Set IMAGE_MODE = 'squash'", "with a bilinear filter, but jobs use a bicubic"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [None, "clip_vit_b16"])
def test_other_transform_is_warned_of_once(name, config, fields, expected, tmp_path, caplog):
    folder = hf_folder(tmp_path, fields, config)
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(2):
            config = clip_config(name, folder)
    assert config.resizing == getattr(read_config(folder), "resizing", None)
    found = [x.getMessage() for x in caplog.records if x.name == "absl"]
    assert len(found) == len(expected), found
    for message, pattern in zip(found, expected, strict=True):
        assert str(folder) in message and re.search(pattern, message)

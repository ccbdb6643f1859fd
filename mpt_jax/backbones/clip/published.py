"""Configurations of the published CLIP models, and of the models in folders."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from absl import logging
from etils import epath

from mpt_jax.backbones.clip import hf_config, open_clip_config
from mpt_jax.backbones.clip.config import (
    CLIPConfig,
    ImageTowerConfig,
    Resizing,
    TextTowerConfig,
)

_BASE = {"num_layers": 12, "emb_dim": 768, "num_heads": 12, "mlp_dim": 3072}
_LARGE = {"num_layers": 24, "emb_dim": 1024, "num_heads": 16, "mlp_dim": 4096}
_TEXT = {"num_layers": 12, "vocab_size": 49408, "context_length": 77}
_BASE_TEXT = {**_TEXT, "emb_dim": 512, "num_heads": 8, "mlp_dim": 2048}
_LARGE_TEXT = {**_TEXT, "emb_dim": 768, "num_heads": 12, "mlp_dim": 3072}
# Name -> (sizes of the image tower, patch size, image size, sizes of the text tower).
_CLIP = {
    "clip_vit_b32": (_BASE, 32, 224, _BASE_TEXT),
    "clip_vit_b16": (_BASE, 16, 224, _BASE_TEXT),
    "clip_vit_l14": (_LARGE, 14, 224, _LARGE_TEXT),
    "clip_vit_l14_336": (_LARGE, 14, 336, _LARGE_TEXT),
}
# timm's vit_base_patch16_224, without its head.
_VIT: dict[str, Any] = {
    "image": ImageTowerConfig(**_BASE, patch_size=16, image_size=224),
    "text": None,
    "joint_dim": None,
    "activation": "gelu",
    "layer_norm_epsilon": 1e-6,
    "patch_bias": True,
    "input_norm": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
NAMES = (*_CLIP, "vit_b16")
# The model if neither a name nor a folder says which.
DEFAULT = "clip_vit_b16"


def read_config(folder: str | os.PathLike[str]) -> CLIPConfig | None:
    """Reads the configuration of a Hugging Face or open_clip folder; None if it has none.

    Raises:
        ValueError: the file does not describe a supported model.
    """
    path = epath.Path(folder)
    for module in (hf_config, open_clip_config):
        if (path / module.CONFIG).exists():
            return CLIPConfig(**module.read_architecture(path))
    return None


@functools.cache  # one warning, although a job reads the configuration several times
def _warn_of_resizing(folder: str, resizing: Resizing, size: int) -> None:
    """Logs a warning if the images of a folder's model are not resized as in jobs."""
    how = binding = ""
    if resizing.mode == "squash":
        how, binding = f"both edges to {size}", "IMAGE_MODE = 'squash'"
    elif resizing.resize_to is not None:
        how = f"the shorter edge to {resizing.resize_to}"
        binding = f"image_transforms.ImageTransform.resize_to = {resizing.resize_to}"
    if binding:
        logging.warning(
            "The configuration in %s resizes %s pixels, but jobs resize the shorter edge to %d by "
            "default. Set %s, if it is not set already.",
            *(folder, how, size, binding),
        )
    if resizing.filter != "bicubic":
        logging.warning(
            "The configuration in %s resizes images with a %s filter, but jobs use a bicubic one. "
            "Features differ slightly from those of transformers.",
            *(folder, resizing.filter),
        )


def clip_config(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> CLIPConfig:
    """Returns the configuration of a published model, or of a Hugging Face or open_clip folder.

    A warning is logged if the folder's images are resized in another way than jobs do by default.

    Args:
        name: a published model such as `'clip_vit_b16'`. None reads the `config.json` or
            `open_clip_config.json` of `checkpoint`; if there is none, the model is `clip_vit_b16`.
        checkpoint: the path of the backbone; it need not exist.
        **overrides: fields of `CLIPConfig` to replace, such as `dtype='bfloat16'`. A field of the
            architecture that differs from the folder's is an error when the weights are loaded.

    Raises:
        ValueError: the name is unknown, and the message lists the known names; or the folder does
            not describe a supported model.
    """
    found = read_config(checkpoint) if checkpoint else None
    if found is not None:
        _warn_of_resizing(str(checkpoint), found.resizing, found.image.image_size)
        if name is None:
            return dataclasses.replace(found, **overrides)
        overrides = {"eos_id": found.eos_id, "resizing": found.resizing, **overrides}
    name = (DEFAULT if name is None else name).lower()
    if name not in NAMES:
        raise ValueError(f"Unknown CLIP model {name!r}. Use one of {', '.join(NAMES)}.")
    if name not in _CLIP:
        return CLIPConfig(**{**_VIT, **overrides})
    tower, patch_size, image_size, text = _CLIP[name]
    fields = {
        "image": ImageTowerConfig(**tower, patch_size=patch_size, image_size=image_size),
        "text": TextTowerConfig(**text),
        "joint_dim": text["emb_dim"],  # the same number in every published model
    }
    return CLIPConfig(**{**fields, **overrides})

"""Configurations of the published CLIP models, and of the models in folders."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from mpt_jax.backbones.clip import hf_config, open_clip_config
from mpt_jax.backbones.clip.config import CLIPConfig, ImageTowerConfig, TextTowerConfig

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


def clip_config(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> CLIPConfig:
    """Returns the configuration of a published model, or of a Hugging Face or open_clip folder.

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
    if name is None and checkpoint:
        folder = epath.Path(checkpoint)
        for module in (hf_config, open_clip_config):
            if (folder / module.CONFIG).exists():
                return CLIPConfig(**{**module.read_architecture(folder), **overrides})
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

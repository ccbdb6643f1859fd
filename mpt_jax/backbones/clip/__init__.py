"""CLIP and plain vision transformers."""

from mpt_jax.backbones.clip.config import CLIPConfig, ImageTowerConfig, TextTowerConfig
from mpt_jax.backbones.clip.network import CLIP, parameter_shapes
from mpt_jax.backbones.clip.published import clip_config

__all__ = [
    "CLIP",
    "CLIPConfig",
    "ImageTowerConfig",
    "TextTowerConfig",
    "clip_config",
    "parameter_shapes",
]

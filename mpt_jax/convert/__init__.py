"""Readers and writers of other programs' checkpoints. Reading never runs code from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from mpt_jax.backbones.clip import CLIPConfig
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.backbones.t5.hf_config import CONFIG
from mpt_jax.convert.clip import load_clip, save_clip
from mpt_jax.convert.hf import check_config, load_hf, save_hf
from mpt_jax.convert.t5x import load_t5x, save_t5x

__all__ = ["load_backbone", "load_hf", "load_t5x", "save_backbone", "save_hf", "save_t5x"]


def load_backbone(
    path: str | os.PathLike[str], config: T5Config | CLIPConfig | None = None
) -> dict[str, Any]:
    """Reads the parameters of a T5, as T5X's unscanned tree of NumPy arrays, or of a CLIP, as the
    unscanned tree of `backbones/clip`.

    The arrays have the dtype of the file, except that float16 weights in a Hugging Face folder are
    converted to float32.

    Args:
        path: for a CLIP, a Hugging Face or open_clip folder (see `convert.clip`). For a T5, a
            Hugging Face folder (`config.json` and weights), or a T5X checkpoint
            (`checkpoint_<step>` as a folder in either of T5X's formats, its msgpack file, or a
            folder that holds only one checkpoint, such as MODEL_DIR/backbone).
        config: the configuration of the model that will use the parameters; a T5's if None. If
            given, a Hugging Face folder must describe the same architecture. T5X checkpoints do
            not record an architecture, so theirs is not compared.

    Raises:
        FileNotFoundError: `path` does not exist, is in none of these formats, or has no weights.
        ValueError: as in `load_hf` or `load_t5x`: the checkpoint is truncated, incomplete or not a
            supported T5, or its weights are pickled and cannot be read safely; or its `config.json`
            differs from `config`.
    """
    if isinstance(config, CLIPConfig):
        return load_clip(path, config)
    folder = epath.Path(path)
    if (folder / CONFIG).exists():
        if config is not None:
            check_config(folder, config)
        return load_hf(folder)[1]
    return load_t5x(folder)


def save_backbone(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: T5Config | CLIPConfig,
    step: int,
) -> str:
    """Writes a trained backbone in a format that `load_backbone` reads: a T5 as a T5X checkpoint, a
    CLIP as a Hugging Face folder.

    Args:
        path: the folder to write to, which must not hold a checkpoint of the step.
        params: the backbone's parameters.
        config: its configuration.
        step: the training step of the parameters.

    Returns:
        The path of the checkpoint.
    """
    if isinstance(config, CLIPConfig):
        save_clip(path, params, config)
        return str(path)
    return str(save_t5x(path, params, step))

"""Checkpoints of other programs, read and written; nothing that could run code is ever read."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from mpt_jax.convert.hf import load_hf, save_hf
from mpt_jax.convert.t5x import load_t5x, save_t5x

__all__ = ["load_backbone", "load_hf", "load_t5x", "save_hf", "save_t5x"]


def load_backbone(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters of a T5 in T5X's unscanned tree, as NumPy arrays in the dtype of the file.

    Args:
        path: a Hugging Face folder (`config.json` and weights), or a T5X checkpoint
            (`checkpoint_<step>` as a folder in either of T5X's formats, or its msgpack file).

    Raises:
        FileNotFoundError: nothing there, or nothing of these formats.
        ValueError: truncated, incomplete, or in a format that could run code when read.
    """
    folder = epath.Path(path)
    if (folder / "config.json").exists():
        return load_hf(folder)[1]
    return load_t5x(folder)

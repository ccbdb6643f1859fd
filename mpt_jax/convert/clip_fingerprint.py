"""Fingerprint of a CLIP's features, stored beside converted weights. Unlike the weights, it shows
whether the activation or the normalization of images was changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from etils import epath

from mpt_jax.backbones.clip import CLIPConfig
from mpt_jax.convert import clip_parity
from mpt_jax.core import schema

FILE = "forward_fingerprint.json"
TOLERANCE = 1e-4


class _Stored(msgspec.Struct):
    numbers: Annotated[list[float], msgspec.Meta(max_length=8)]


def fingerprint(config: CLIPConfig, params: Mapping[str, Any]) -> np.ndarray:
    """Returns the cosines [2, 2] of the features of two fixed images and two fixed texts, then the
    norms [2] of the images' and [2] of the texts', float32 [8]. For a ViT [6]: the cosines [2, 2]
    of the images with each other, and their norms."""
    side, text = config.image.image_size, config.text
    # Bytes, so that the network normalizes them. A random generator may change with NumPy.
    images = (np.arange(2 * side * side * 3) * 7919 % 251).astype(np.uint8)
    batch: dict[str, np.ndarray] = {"images": images.reshape(2, side, side, 3)}
    if text is not None:
        tokens = (np.arange(2 * text.context_length) * 7919 % text.vocab_size).astype(np.int32)
        batch["tokens"] = tokens.reshape(2, -1)
        batch["eot"] = np.asarray([text.context_length // 2, text.context_length - 1], np.int32)
    features = [*clip_parity.forward(config, params, batch).values()]
    norms = [np.linalg.norm(x, axis=-1) for x in features]
    units = [x / norm[:, None] for x, norm in zip(features, norms, strict=True)]
    return np.concatenate([(units[0] @ units[-1].T).ravel(), *norms])


def write(folder: epath.Path, config: CLIPConfig, params: Mapping[str, Any]) -> None:
    """Writes the fingerprint of the model in a folder."""
    (folder / FILE).write_text(json.dumps({"numbers": fingerprint(config, params).tolist()}))


def difference(folder: epath.Path, config: CLIPConfig, params: Mapping[str, Any]) -> float:
    """Returns how far a model is from the fingerprint in its folder: the largest difference,
    absolute for cosines and relative for norms.

    Raises:
        ValueError: the file is not a fingerprint of such a model.
    """
    path, advice = folder / FILE, "Convert the model again, or remove the file."
    if (size := path.stat().length) > 2**12:
        raise ValueError(f"{path} has {size:,} bytes, and the limit is {2**12:,}. {advice}")
    stored = schema.load(path.read_bytes(), _Stored, str(path), advice).numbers
    if len(stored) != len(found := fingerprint(config, params)):
        raise ValueError(f"{path} has {len(stored)} numbers, not {len(found)}. {advice}")
    scale = np.where(np.arange(len(found)) < 4, 1.0, found)  # the norms follow four cosines
    return float(np.max(np.abs(stored - found) / scale))

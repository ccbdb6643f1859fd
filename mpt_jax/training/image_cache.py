"""Host-memory cache of image features, reused when an image is seen again.

Without a prompt in the image encoder, and without augmentation, the feature of an image never
changes. A cached feature takes 2 KB (at a joint width of 512) instead of a forward pass of the
image encoder, so text prompts (CoOp) train in minutes on a CPU.

Features are computed in chunks of a fixed number of images, so they do not depend on the batch that
an image was first seen in, and a job that resumes with an empty cache gets bit-identical results.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mpt_jax.batching.collate import Batch
from mpt_jax.core.batch import FILE_NAMES, FILES, num_rows
from mpt_jax.core.shapes import Array, Params
from mpt_jax.core.tree import flatten
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.models.model import Model
from mpt_jax.prompts.sites import TEXT
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState

IMAGES = ("image", FILES, FILE_NAMES)
_REMOVE = "drop --gin_file=gin/runs/image_cache.gin, or set trainer.Trainer.image_cache to None"


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Settings of the image cache.

    Attributes:
        max_bytes: the host memory that features may take, in bytes. Once a feature does not fit, no
            more are added.
        chunk: the number of images that are encoded at a time.

    Raises:
        ValueError: a value is not positive.
    """

    max_bytes: int
    chunk: int = 64

    def __post_init__(self):
        if min(self.max_bytes, self.chunk) <= 0:
            raise ValueError(
                f"ImageCache.max_bytes and chunk must be positive, got {self.max_bytes} and "
                f"{self.chunk}. Set IMAGE_CACHE_BYTES to the bytes of host memory that features "
                f"may take, or remove the cache ({_REMOVE})."
            )

    def open(self, model: Model, state: TrainState, partitioner: PjitPartitioner) -> OpenImageCache:
        """Returns an empty cache for one trainer.

        Raises:
            ValueError: the features of images change during training, or this kind of job is not
                supported.
        """
        if reason := _unsupported(model, state):
            raise ValueError(
                f"This job cannot use an image cache: {reason} To train without one, {_REMOVE}."
            )
        assert isinstance(model, PromptedDualEncoder)
        return OpenImageCache(self, model, partitioner)


def without_files(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns a batch; raises ValueError if it has encoded files in place of images."""
    if FILES in batch:
        raise ValueError(
            "Batches have encoded images, which only the image cache of a training job decodes. In "
            "training, add --gin_file=gin/runs/image_cache.gin; in evaluation and inference, omit "
            "it, or set PromptImageConverter.decode to True."
        )
    return batch


def _unsupported(model: Model, state: TrainState) -> str | None:
    """Returns why a job cannot use a cache; None if it can."""
    if not isinstance(model, PromptedDualEncoder):
        return "it holds features of images, and the examples are texts."
    if set(model.prompt.parts) - {TEXT}:
        return (
            "its prompts are inputs of the image encoder, so the features of an image change with "
            "every step."
        )
    if model.augmentation is not None:
        return (
            "its images are augmented (AUGMENTATION), so an image has other features in every "
            "epoch."
        )
    others = [name for name in flatten(state.trainable) if name.startswith("image_encoder/")]
    if others:
        return f"{others[0]} is trainable, so the features of an image change with every step."
    if jax.process_count() > 1:
        return (
            f"this job has {jax.process_count()} processes, but the cache supports only one. Run "
            "the job in one process to use a cache."
        )
    return None


class OpenImageCache:
    """The cache of one trainer.

    Args:
        settings: the memory limit and the chunk.
        model: the model that encodes images.
        partitioner: the mesh on which images are encoded.

    Attributes:
        held_bytes: the size of the stored features in bytes.
    """

    def __init__(
        self, settings: ImageCache, model: PromptedDualEncoder, partitioner: PjitPartitioner
    ):
        self.held_bytes = 0
        self._settings, self._partitioner = settings, partitioner
        self._model = model
        self._encode = jax.jit(functools.partial(_encode, model))
        self._held: dict[bytes, np.ndarray] = {}
        self._full = False

    def __len__(self) -> int:
        """Returns the number of stored features."""
        return len(self._held)

    def add(self, frozen: Params, batch: Mapping[str, np.ndarray]) -> Batch:
        """Returns a batch with `image_features` [B,U] in place of `image`, or of `image_files` and
        `image_names`. Call it inside `partitioner.activate()`. Waits for the devices if an image is
        not stored yet.

        Args:
            frozen: the frozen parameters, with the image encoder.
            batch: a batch of images or of encoded files (`data.image_converter`).

        Raises:
            ValueError: a file cannot be decoded.
        """
        files = batch.get(FILES)
        digests = [_digest(x) for x in (batch["image"] if files is None else files)]
        missing = {key: row for row, key in enumerate(digests) if key not in self._held}
        rows = [*missing.values()]
        images = batch["image"][rows] if files is None else self._decoded(batch, rows)
        computed = dict(zip(missing, self._compute(frozen, images), strict=True))
        for key, feature in computed.items():
            self._hold(key, feature)
        found = [computed[key] if key in computed else self._held[key] for key in digests]
        rest = {name: value for name, value in batch.items() if name not in IMAGES}
        return {**rest, "image_features": np.stack(found)}

    def shapes(self, frozen: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Like `add`, but with `ShapeDtypeStruct`s."""
        size = self._model.module.config.image.image_size
        images = jax.ShapeDtypeStruct((num_rows(batch), size, size, 3), np.uint8)
        found = jax.eval_shape(self._encode, frozen, images)
        shape = jax.ShapeDtypeStruct(
            found.shape, found.dtype, sharding=self._partitioner.batch_sharding
        )
        rest = {name: value for name, value in batch.items() if name not in IMAGES}
        return {**rest, "image_features": shape}

    def _decoded(self, batch: Mapping[str, np.ndarray], rows: Sequence[int]) -> np.ndarray:
        """Returns the pixels [n,S,S,3] of some files of a batch; rows without a file are black."""
        size = self._model.module.config.image.image_size
        pixels = np.zeros((len(rows), size, size, 3), np.uint8)
        for place, row in enumerate(rows):
            if file := batch[FILES][row]:
                name = batch[FILE_NAMES][row].decode()
                pixels[place] = self._model.image_transform.of_file(file, name)
        return pixels

    def metrics(self) -> dict[str, float]:
        """Returns the size of the cache."""
        return {
            "image_cache/images": float(len(self)),
            "image_cache/gigabytes": self.held_bytes / 1e9,
        }

    def _compute(self, frozen: Params, images: np.ndarray) -> Sequence[np.ndarray]:
        """Returns the features of images, each copied."""
        shards = math.prod(self._partitioner.mesh.devices.shape[:-1])
        chunk = -(-self._settings.chunk // shards) * shards
        features: list[np.ndarray] = []
        for first in range(0, len(images), chunk):
            part = images[first : first + chunk]
            padded = part[np.resize(np.arange(len(part)), chunk)]  # repeats images as padding
            sharded = self._partitioner.shard_batch({"image": padded})["image"]
            found = jax.device_get(self._encode(frozen, sharded))
            features += [row.copy() for row in found[: len(part)]]
        return features

    def _hold(self, key: bytes, feature: np.ndarray) -> None:
        """Stores a feature if there is room."""
        if self._full:
            return
        if self.held_bytes + feature.nbytes <= self._settings.max_bytes:
            self._held[key] = feature
            self.held_bytes += feature.nbytes
            return
        self._full = True
        logging.warning(
            "The image cache is full: it holds the features of %d images in %.3g GB. Other images "
            "are encoded in every epoch. Raise ImageCache.max_bytes (IMAGE_CACHE_BYTES).",
            len(self),
            self.held_bytes / 1e9,
        )


def _digest(content: Any) -> bytes:
    """Returns a digest of pixels or of a file; the rows that fill a batch have no file."""
    data = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content or b""
    return hashlib.blake2b(data, digest_size=16).digest()


def _encode(model: PromptedDualEncoder, frozen: Params, images: Array) -> Array:
    return model.image_features(frozen, {"image": images})

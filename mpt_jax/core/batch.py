"""Batch contract: task ids, masks over encoder positions, and teacher features.

A text batch has a task id at every position, because packed rows hold several examples; an image
batch has one per row. The functions below read and write task ids of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Batch, Bool, Int

# Features that hold task ids, [B, T] and [B, L] of texts, [B] of images.
TASK_IDS = ("encoder_task_ids", "decoder_task_ids", "task_ids")
# Features in place of `image`, for an image cache: encoded images, and the examples for errors.
FILES, FILE_NAMES = "image_files", "image_names"
# Batch features that replace the teachers' forward pass -> the side whose positions axis 1 indexes.
TEACHER_FEATURES = {
    "teacher_logits": "decoder",
    "teacher_encoded": "encoder",
    "teacher_decoded": "decoder",
}


def encoder_mask(batch: Batch, include_prompt: bool = True) -> Bool[Array, "B T"]:
    """Whether each position is text or, if `include_prompt`, a prompt slot."""
    text = batch["encoder_input_tokens"] > 0
    return text | (batch["encoder_prompt_slots"] > 0) if include_prompt else text


def is_packed(batch: Batch) -> bool:
    """Whether rows hold several examples."""
    return "encoder_segment_ids" in batch


def num_rows(batch: Mapping[str, Any]) -> Any:
    """Returns B, given a batch of arrays or of their shapes: an int, or the symbolic dimension of a
    program that is exported for any B."""
    return next(iter(batch.values())).shape[0]


def row_task_ids(batch: Mapping[str, Any]) -> Any:
    """Returns the bank row of each row of an unpacked batch, [B]."""
    return batch["task_ids"] if "task_ids" in batch else batch["encoder_task_ids"][:, 0]


def used_task_ids(batch: Batch, otherwise: int) -> Int[Array, "..."]:
    """Returns the bank row at every position that is not padding, and `otherwise` at padding."""
    if "task_ids" in batch:
        return jnp.where(batch["loss_weights"] > 0, batch["task_ids"], otherwise)
    return jnp.where(encoder_mask(batch), batch["encoder_task_ids"], otherwise)


def map_task_ids(batch: Batch, fn: Callable[[Array], Array]) -> Batch:
    """Returns a batch with `fn` applied to every feature that holds task ids."""
    return {**batch, **{name: fn(batch[name]) for name in TASK_IDS if name in batch}}

"""Batch contract: teacher features and masks over encoder positions."""

from __future__ import annotations

import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Batch, Bool, Float

# Batch features that replace the teachers' forward pass -> the side whose positions axis 1 indexes.
TEACHER_FEATURES = {
    "teacher_logits": "decoder",
    "teacher_encoded": "encoder",
    "teacher_decoded": "decoder",
}


def encoder_positions(batch: Batch, include_prompt: bool) -> Float[Array, "B T"]:
    """Returns 1 at text positions and, if `include_prompt`, at prompt slots; 0 elsewhere."""
    return encoder_mask(batch, include_prompt).astype(jnp.float32)


def encoder_mask(batch: Batch, include_prompt: bool = True) -> Bool[Array, "B T"]:
    """Whether each position is text or, if `include_prompt`, a prompt slot."""
    text = batch["encoder_input_tokens"] > 0
    return text | (batch["encoder_prompt_slots"] > 0) if include_prompt else text

"""The batch contract."""

from __future__ import annotations

import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Batch, Bool, Float

# Features of a batch that stand in for the teachers' forward pass, with the side whose positions
# are their axis 1.
TEACHER_FEATURES = {
    "teacher_logits": "decoder",
    "teacher_encoded": "encoder",
    "teacher_decoded": "decoder",
}


def encoder_positions(batch: Batch, include_prompt: bool) -> Float[Array, "B T"]:
    """1 at real encoder positions (text, and prompt slots if asked), else 0."""
    return encoder_mask(batch, include_prompt).astype(jnp.float32)


def encoder_mask(batch: Batch, include_prompt: bool = True) -> Bool[Array, "B T"]:
    """Whether a position is text, or a prompt slot: what may be attended to."""
    text = batch["encoder_input_tokens"] > 0
    return text | (batch["encoder_prompt_slots"] > 0) if include_prompt else text

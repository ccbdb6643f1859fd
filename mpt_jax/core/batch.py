"""Batch contract: teacher features and masks over encoder positions."""

from __future__ import annotations

from mpt_jax.core.shapes import Array, Batch, Bool

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

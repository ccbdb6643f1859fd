"""Attention weights of a classifier's lanes over the patches of images, for the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpt_jax.backbones.clip import lanes as lane_pass
from mpt_jax.core.shapes import Array, Batch, Float, Params
from mpt_jax.models.classifier import PromptedClassifier


def check_has_selectors(selectors: int) -> None:
    """Raises ValueError if lanes have no selectors, given their number."""
    if not selectors:
        raise ValueError(
            "The lanes have no selectors, so they have no attention over patches. Train lanes "
            "with SELECTORS of at least 1."
        )


def lane_attention(
    model: PromptedClassifier, params: Params, batch: Batch
) -> Float[Array, "B K layers I"]:
    """Returns how far each lane attends to each token of each image in each layer, float32; see
    `backbones.clip.lanes.lane_attention`. Token 0 is the class token of the image, the others are
    its patches in the order of their rows.

    Raises:
        ValueError: the lanes have no selectors.
    """
    check_has_selectors(model.prompt.selectors)
    config, tower = model.module.config, params["image_encoder"]
    lanes = model.lanes_of_layers(params, None)

    def of_image(hidden: tuple[Array, ...]) -> Array:
        kept = model.prompt.drop_and_replace
        return lane_pass.lane_attention(tower, config, hidden, lanes, kept)

    return jax.vmap(of_image)(model.layer_inputs(params, batch)).astype(jnp.float32)

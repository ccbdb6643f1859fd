"""Prompts trained through an MLP: `relu(E W_in + b_in) W_out + b_out`.

The MLP is used only in training: an artifact stores the MLP's output instead of E. The MLP adds
2 (H H + H) parameters per prompt, 1,181,184 at H = 768.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Key, Params
from mpt_jax.prompts.base import FLOAT32

PARTS = ("kernel_in", "bias_in", "kernel_out", "bias_out")
PATTERN = "|".join(f"_{part}" for part in PARTS)


def axes(name: str, of_prompt: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Returns the logical axes of the MLP parameters for the prompts `name`.

    `of_prompt` holds the axes of the prompts, except the last two (length and width).
    """
    kernel, bias = (*of_prompt, "embed", "rank"), (*of_prompt, "embed")
    return {f"{name}_{part}": kernel if part.startswith("kernel") else bias for part in PARTS}


def init(key: Key, name: str, prompts: Array) -> dict[str, Array]:
    """Returns initial MLP parameters for the prompts `name` [..., l, H].

    They are uniform in ±1/sqrt(H), as in torch's linear layers, and equal for all prompts.
    """
    width, leading = prompts.shape[-1], prompts.shape[:-2]
    params = {}
    for number, part in enumerate(PARTS):
        shape = (width, width) if part.startswith("kernel") else (width,)
        part_key = jax.random.fold_in(key, number)
        values = jax.random.uniform(part_key, shape, minval=-(width**-0.5), maxval=width**-0.5)
        params[f"{name}_{part}"] = jnp.broadcast_to(values, (*leading, *shape))
    return params


def apply(params: Params, name: str) -> Array:
    """Returns the prompts `name` [..., l, H], passed through their MLPs if they have any."""
    prompts = params[name]
    if f"{name}_{PARTS[0]}" not in params:
        return prompts
    kernel_in, bias_in, kernel_out, bias_out = (params[f"{name}_{part}"] for part in PARTS)
    hidden = jnp.matmul(prompts, kernel_in, precision=FLOAT32) + bias_in[..., None, :]
    out = jnp.matmul(jax.nn.relu(hidden), kernel_out, precision=FLOAT32)
    return out + bias_out[..., None, :]


def without_mlp(params: Params, name: str) -> dict[str, Array]:
    """Returns the parameters with the prompts `name` replaced by the output of their MLPs."""
    kept = {key: params[key] for key in params if key not in axes(name, ())}
    return {**kept, name: apply(jax.tree.map(jnp.asarray, dict(params)), name)}

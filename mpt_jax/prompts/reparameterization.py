"""Prompts that learn through an MLP of their own: `relu(E W_in + b_in) W_out + b_out`.

The MLP is there for training alone: what it makes of the embedded prompt E takes E's place in an
artifact. It adds 2 (H H + H) numbers to each prompt, 1,181,184 at H = 768.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Key, Params
from mpt_jax.prompts.base import FLOAT32

PARTS = ("kernel_in", "bias_in", "kernel_out", "bias_out")
PATTERN = "|".join(f"_{part}" for part in PARTS)


def axes(name: str, of_prompt: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Logical axes of the MLPs of the prompts `name`, which have the axes `of_prompt` before those
    of length and width."""
    kernel, bias = (*of_prompt, "embed", "rank"), (*of_prompt, "embed")
    return {f"{name}_{part}": kernel if part.startswith("kernel") else bias for part in PARTS}


def init(key: Key, name: str, prompts: Array) -> dict[str, Array]:
    """First values of the MLPs of prompts [..., l, H]: uniform in +-1/sqrt(H), as torch's linear
    layers have them, alike for all prompts."""
    width, many = prompts.shape[-1], prompts.shape[:-2]
    made = {}
    for number, part in enumerate(PARTS):
        shape = (width, width) if part.startswith("kernel") else (width,)
        draw = jax.random.fold_in(key, number)
        one = jax.random.uniform(draw, shape, minval=-(width**-0.5), maxval=width**-0.5)
        made[f"{name}_{part}"] = jnp.broadcast_to(one, (*many, *shape))
    return made


def apply(params: Params, name: str) -> Array:
    """The prompts `name` [..., l, H]: as they are, or through their MLPs where they have any."""
    prompts = params[name]
    if f"{name}_{PARTS[0]}" not in params:
        return prompts
    kernel_in, bias_in, kernel_out, bias_out = (params[f"{name}_{part}"] for part in PARTS)
    hidden = jnp.matmul(prompts, kernel_in, precision=FLOAT32) + bias_in[..., None, :]
    out = jnp.matmul(jax.nn.relu(hidden), kernel_out, precision=FLOAT32)
    return out + bias_out[..., None, :]


def without_mlp(params: Params, name: str) -> dict[str, Array]:
    """The parameters without the MLPs of `name`, whose prompts are what those made of them."""
    kept = {key: params[key] for key in params if key not in axes(name, ())}
    return {**kept, name: apply(jax.tree.map(jnp.asarray, dict(params)), name)}

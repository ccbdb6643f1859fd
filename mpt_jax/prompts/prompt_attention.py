"""Attention of a text over prompts, as ATTEMPT has it (Asai et al. 2022, arXiv 2205.11961).

The text is one vector x, the largest value of each feature over its tokens' embeddings; a prompt
P_j is one vector p_j, the largest value of each feature over its rows. A score of prompt j is

    dot         p_j . x
    linear      p_j . LN(x W) / T
    sub         p_j . LN(silu(x W_down) W_up) / T
    token       P_j[i] . LN(silu(x W_down) W_up) / T      for every row i of the prompt
    constant    0

and weights are the softmax of the scores over j. The linear maps have no biases, LayerNorm has
scale and bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Float, Int, Key, Params
from mpt_jax.prompts.base import FLOAT32
from mpt_jax.prompts.row_ops import Grouped, expand_leading_dims, gather_group_params

EPSILON = 1e-5  # torch's, with which the released code normalizes


class _Kind(NamedTuple):
    """What a kind of attention has: the shape of each linear map, from the widths (H, width); and
    how it reads the text, if it does."""

    maps: dict[str, Callable[[int, int], tuple[int, int]]]
    query: Callable[[Params, Array], Array] | None = None
    by_row: bool = False


def _linear(params: Params, x: Array) -> Array:
    return _normalized(params, _product(x, params["linear"]))


def _through_few(params: Params, x: Array) -> Array:
    hidden = jax.nn.silu(_product(x, params["down"]))
    return _normalized(params, _product(hidden, params["up"]))


_BOTTLENECK = {
    "down": lambda width, inner: (width, inner),
    "up": lambda width, inner: (inner, width),
}
KINDS = {
    "constant": _Kind({}),
    "dot": _Kind({}, lambda params, x: x),
    "linear": _Kind({"linear": lambda width, inner: (width, width)}, _linear),
    "sub": _Kind(_BOTTLENECK, _through_few),
    "token": _Kind(_BOTTLENECK, _through_few, by_row=True),
}
# Every parameter's label; rows count groups: a group's tasks share one attention.
LABELS = ((r"(linear|down|up|norm_scale|norm_bias)", "router"),)
AXES = {
    "linear": ("groups", "embed", "rank"),
    "down": ("groups", "embed", "rank"),
    "up": ("groups", "rank", "embed"),
    "norm_scale": ("groups", "embed"),
    "norm_bias": ("groups", "embed"),
}


@dataclasses.dataclass(frozen=True)
class TextAttention:
    """Weights of prompts by the text that they stand before.

    Attributes:
        kind: see the module.
        width: of the bottleneck of `'sub'` and `'token'`.
        temperature: T; `'dot'` and `'constant'` have none.

    Raises:
        ValueError: an unknown kind, or numbers that are not positive.
    """

    kind: str = "sub"
    width: int = 100
    temperature: float = 2000.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(unknown_name("attention", self.kind, list(KINDS)))
        if self.width < 1 or not self.temperature > 0:
            raise ValueError(
                f"Attention needs a positive width and temperature, got {self.width} and "
                f"{self.temperature}."
            )

    @property
    def reads_text(self) -> bool:
        """Whether weights depend on the text at all."""
        return KINDS[self.kind].query is not None

    def init(self, key: Key, groups: int, width: int) -> dict[str, Array]:
        """Initial values: maps uniform in +-1/sqrt(inputs), as torch has them, alike in all groups,
        so that a run starts from the same alone and among others."""
        made, maps = {}, KINDS[self.kind].maps
        for number, (name, shape_of) in enumerate(sorted(maps.items())):
            shape = shape_of(width, self.width)
            limit = shape[0] ** -0.5
            draw = jax.random.fold_in(key, number)
            one = jax.random.uniform(draw, shape, minval=-limit, maxval=limit)
            made[name] = jnp.repeat(one[None], groups, axis=0)
        if maps:
            made["norm_scale"] = jnp.ones((groups, width))
            made["norm_bias"] = jnp.zeros((groups, width))
        return made

    def scores(
        self,
        params: Params,
        runs: Grouped,
        task_ids: Int[Array, "..."],
        pooled: Float[Array, "... H"] | None,
        prompts: Float[Array, "*#examples J P H"],
    ) -> Float[Array, "... J _"]:
        """What the softmax over candidates is taken of: one score for all rows of a prompt,
        [..., J, 1], or one for each, [..., J, P].

        Args:
            params: see `init`.
            runs: the bank's rows.
            task_ids: of each example.
            pooled: x of each example; None for a kind that does not read it.
            prompts: J candidates, of each example or of all.
        """
        kind = KINDS[self.kind]
        if kind.query is None:
            return jnp.zeros((*task_ids.shape, prompts.shape[-3], 1))
        if pooled is None:
            raise ValueError(f"Attention {self.kind!r} reads the text, and there is none.")
        own = {
            name: gather_group_params(params[name], runs, task_ids)
            for name in params
            if name in AXES
        }
        query = kind.query(own, pooled)
        keys = prompts if kind.by_row else prompts.max(-2, keepdims=True)
        found = jnp.einsum("...jph,...h->...jp", keys, query, precision=FLOAT32)
        return found / self.temperature if kind.maps else found


def _product(x: Array, kernel: Array) -> Array:
    return jnp.einsum("...i,...io->...o", x, kernel, precision=FLOAT32)


def _normalized(params: Params, x: Array) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + EPSILON)
    scale, bias = (
        expand_leading_dims(params[f"norm_{part}"], x.ndim) for part in ("scale", "bias")
    )
    return scaled * scale + bias

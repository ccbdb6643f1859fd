"""Attention from a text to prompts, as in ATTEMPT (Asai et al. 2022, arXiv 2205.11961).

The text is pooled to one vector x, the maximum of each feature over its tokens' embeddings. A
prompt P_j is pooled to one vector p_j, the maximum over its rows. The score of prompt j is

    dot         p_j . x
    linear      p_j . LN(x W) / T
    sub         p_j . LN(silu(x W_down) W_up) / T
    token       P_j[i] . LN(silu(x W_down) W_up) / T      for every row i of the prompt
    constant    0

and weights are the softmax of the scores over j. The linear maps have no bias; LayerNorm has a
scale and a bias.
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

EPSILON = 1e-5  # of torch's LayerNorm, which the released code uses


class _Kind(NamedTuple):
    """A kind of attention.

    Attributes:
        maps: the shape of each linear map, as a function of H and the bottleneck width.
        query: computes the query from the text vector; None if the text is not read.
        by_row: whether each row of a prompt has its own score.
    """

    maps: dict[str, Callable[[int, int], tuple[int, int]]]
    query: Callable[[Params, Array], Array] | None = None
    by_row: bool = False


def _linear_query(params: Params, x: Array) -> Array:
    return _normalized(params, _product(x, params["linear"]))


def _bottleneck_query(params: Params, x: Array) -> Array:
    hidden = jax.nn.silu(_product(x, params["down"]))
    return _normalized(params, _product(hidden, params["up"]))


_BOTTLENECK = {
    "down": lambda width, inner: (width, inner),
    "up": lambda width, inner: (inner, width),
}
KINDS = {
    "constant": _Kind({}),
    "dot": _Kind({}, lambda params, x: x),
    "linear": _Kind({"linear": lambda width, inner: (width, width)}, _linear_query),
    "sub": _Kind(_BOTTLENECK, _bottleneck_query),
    "token": _Kind(_BOTTLENECK, _bottleneck_query, by_row=True),
}
# Labels of all parameters. Rows are groups: the tasks of a group share one attention.
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
    """Attention over prompts, given the text that follows them.

    Attributes:
        kind: see the module docstring.
        width: bottleneck width of `'sub'` and `'token'`.
        temperature: T; not used by `'dot'` and `'constant'`.

    Raises:
        ValueError: an unknown kind, or a width or temperature that is not positive.
    """

    kind: str = "sub"
    width: int = 100
    temperature: float = 2000.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(unknown_name("attention", self.kind, list(KINDS)))
        if self.width < 1 or not self.temperature > 0:
            raise ValueError(
                "The width of the attention must be at least 1 and its temperature positive, got "
                f"width = {self.width} and temperature = {self.temperature}. Correct "
                "ATTENTION_WIDTH (for CrossPT, CrossPT.width) or ATTENTION_TEMPERATURE."
            )

    @property
    def reads_text(self) -> bool:
        """Whether weights depend on the text."""
        return KINDS[self.kind].query is not None

    def init(self, key: Key, groups: int, width: int) -> dict[str, Array]:
        """Returns initial parameters: linear maps uniform in ±1/sqrt(fan-in), as in torch.

        All groups get the same values, so a run starts from the same values in a job of one run
        and in a fleet.

        Args:
            key: random key of the job.
            groups: G, the number of groups.
            width: H, the model width; not the bottleneck width.
        """
        params, maps = {}, KINDS[self.kind].maps
        for number, (name, shape_of) in enumerate(sorted(maps.items())):
            shape = shape_of(width, self.width)
            limit = shape[0] ** -0.5
            map_key = jax.random.fold_in(key, number)
            kernel = jax.random.uniform(map_key, shape, minval=-limit, maxval=limit)
            params[name] = jnp.repeat(kernel[None], groups, axis=0)
        if maps:
            params["norm_scale"] = jnp.ones((groups, width))
            params["norm_bias"] = jnp.zeros((groups, width))
        return params

    def scores(
        self,
        params: Params,
        runs: Grouped,
        task_ids: Int[Array, "..."],
        pooled: Float[Array, "... H"] | None,
        prompts: Float[Array, "... J P H"],
    ) -> Float[Array, "... J _"]:
        """Returns the scores of the candidates, before the softmax.

        There is one score per candidate, [..., J, 1], or one per row of each candidate,
        [..., J, P].

        Args:
            params: see `init`.
            runs: the bank's rows.
            task_ids: the bank row of each example.
            pooled: x of each example; None for a kind that does not read the text.
            prompts: J candidates; the leading axes are omitted if all examples share them.

        Raises:
            ValueError: the kind reads the text, and `pooled` is None.
        """
        kind = KINDS[self.kind]
        if kind.query is None:
            return jnp.zeros((*task_ids.shape, prompts.shape[-3], 1))
        if pooled is None:
            raise ValueError(
                f"The attention {self.kind!r} reads the text, but no text vector was passed. Pass "
                "it to `compose` as PromptContext.pooled."
            )
        group_params = {
            name: gather_group_params(params[name], runs, task_ids)
            for name in params
            if name in AXES
        }
        query = kind.query(group_params, pooled)
        keys = prompts if kind.by_row else prompts.max(-2, keepdims=True)
        scores = jnp.einsum("...jph,...h->...jp", keys, query, precision=FLOAT32)
        return scores / self.temperature if kind.maps else scores


def _product(x: Array, kernel: Array) -> Array:
    return jnp.einsum("...i,...io->...o", x, kernel, precision=FLOAT32)


def _normalized(params: Params, x: Array) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + EPSILON)
    scale, bias = (
        expand_leading_dims(params[f"norm_{part}"], x.ndim) for part in ("scale", "bias")
    )
    return scaled * scale + bias

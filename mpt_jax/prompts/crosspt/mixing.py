"""Weights of the prompts that CrossPT's router scores, with random draws in training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.prompts import reparameterization
from mpt_jax.prompts.crosspt.compositions import RUN
from mpt_jax.prompts.crosspt.routing import (
    NORMALIZE,
    ROUTERS,
    SMALL,
    example_noise,
    keep_largest,
    noise,
    of_rows,
)
from mpt_jax.prompts.row_ops import (
    expand_leading_dims,
    gather_group_params,
    gather_rows,
    numbers_within_rows,
)

_DRAWN = ("router", "share")  # what is drawn, each with its own random key


def mixture_weights(method: Any, params, runs, task_ids, given):
    """Returns the weight of each prompt that the router scores [..., S], 0 if not kept, and the
    indices kept [..., k]; the arguments are those of `PromptMethod.compose`."""
    router, logits = ROUTERS[method.router], _logits(method, params, runs, task_ids, given)
    noisy: Any = logits
    temperature: Any = 1.0
    if router.is_random:
        noisy, temperature = add_noise(method, logits, params, runs, task_ids, given, "router")
    # Ranks noisy logits rather than scores, which saturate at 0 and 1 at a low temperature.
    kept, indices = keep_largest(noisy, method.top_k)
    scores = router.scores(noisy / temperature)
    if router.is_random:
        drawn_at = None if given.key is None else temperature
        return NORMALIZE[method.normalize](scores, logits, kept, drawn_at), indices
    scores = jnp.where(kept, scores, 0.0)
    return scores / (scores.sum(-1, keepdims=True) + SMALL if router.normalized else 1), indices


def add_noise(
    method: Any, logits, params, runs, task_ids, given, name: str
) -> tuple[jax.Array, Any]:
    """Returns logits [..., n] plus the step's noise, and the temperature of the step's draws.

    Without a random key (`given.key`), logits are unchanged and the temperature is 1.
    """
    if given.key is None:
        return logits, 1.0
    key, count = jax.random.fold_in(given.key, _DRAWN.index(name)), logits.shape[-1]
    if method.draws == RUN:
        added = of_rows(noise(key, runs, count), task_ids)
    else:
        numbers = numbers_within_rows(task_ids) if given.numbers is None else given.numbers
        added = jax.lax.stop_gradient(example_noise(key, runs, task_ids, numbers, count))
    if name == "share" and method.share_temperature is not None:
        return logits + added, jnp.full((1,) * logits.ndim, method.share_temperature)
    clock = jax.lax.stop_gradient(gather_group_params(params["clock"], runs, task_ids))
    return logits + added, expand_leading_dims(method.annealing(clock)[..., None], logits.ndim)


def _logits(method: Any, params, runs, task_ids, given):
    if ROUTERS[method.router].reads_text:
        sources = gather_group_params(reparameterization.apply(params, "sources"), runs, task_ids)
        scores = method.attention().scores(params, runs, task_ids, given.pooled, sources)
        return scores[..., 0]
    if "router" in params:
        return gather_rows(params["router"], task_ids)
    return jnp.zeros((*task_ids.shape, method.num_scored))

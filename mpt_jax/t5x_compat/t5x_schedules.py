"""T5X's learning-rate schedules: products of factors such as `'constant * linear_warmup'`.

T5X's run files bind such a schedule to `Trainer.learning_rate_fn`. With this library's optimizer
the schedule is only logged, by either trainer; training uses the schedules of `PromptOptimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array


def create_learning_rate_scheduler(  # noqa: PLR0913 - T5X's arguments
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int = 100000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Callable[[Array | int], Array]:
    """Returns the product of named factors, as a function of the step.

    Args:
        factors: names joined by `*`: constant, linear_warmup, linear_decay (includes the constant
            and the warmup, so use it as the only factor), rsqrt_decay, rsqrt_normalized_decay,
            decay_every, cosine_decay.
        base_learning_rate: the value of constant.
        warmup_steps: number of warmup steps, after which all decays except decay_every begin.
        decay_factor: relative decrease of linear_decay per step; multiplier of decay_every.
        steps_per_decay: number of steps after which decay_every multiplies again.
        steps_per_cycle: period of cosine_decay, in steps.
        step_offset: number that is subtracted from the step before the factors are computed.
        min_learning_rate: lower bound of the product.

    Raises:
        ValueError: `factors` has an unknown name.
    """
    known: dict[str, Callable[[Array], Array | float]] = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup_steps),
        "linear_decay": lambda step: (
            base_learning_rate
            * jnp.minimum(step / warmup_steps, 1.0 + decay_factor * (warmup_steps - step))
        ),
        "rsqrt_decay": lambda step: 1.0 / jnp.sqrt(jnp.maximum(step, warmup_steps)),
        "rsqrt_normalized_decay": lambda step: (
            math.sqrt(warmup_steps) / jnp.sqrt(jnp.maximum(step, warmup_steps))
        ),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": lambda step: (
            0.5
            + 0.5
            * jnp.cos(jnp.pi * (jnp.maximum(0.0, step - warmup_steps) / steps_per_cycle % 1.0))
        ),
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise ValueError(unknown_name("learning-rate factor", name, list(known)))

    def learning_rate(step: Array | int) -> Array:
        since = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        rate = jnp.asarray(1.0, jnp.float32)
        for name in names:
            rate = rate * known[name](since)
        return jnp.maximum(rate, min_learning_rate).astype(jnp.float32)

    return learning_rate

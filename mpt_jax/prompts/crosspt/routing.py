"""How CrossPT's router turns its logits into weights of source prompts.

A score s_j in [0, 1] for each of S candidates, of which the k largest are kept, then weights:

    router              score in training                          at inference     weights
    relaxed_bernoulli   sigmoid((r_j + logit(u_j)) / temperature)  sigmoid(r_j)     see Normalize
    softmax             softmax(r)_j                               the same         s / sum(s)
    sigmoid             sigmoid(r_j)                               the same         s
    uniform             1 / S                                      the same         s / sum(s)
    attention           softmax of text attention                  the same         s / sum(s)

with u uniform in (0, 1), drawn once for each run and step (Maddison et al. 2017, Jang et al. 2017:
the relaxed Bernoulli distribution).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Int, Key
from mpt_jax.prompts.base import name_hash

SMALL = 1e-8  # what the released code adds


@dataclasses.dataclass(frozen=True)
class Annealing:
    """A temperature that falls in a straight line from `start` to `end` over `steps` steps, and
    stays there. Defaults are the released code's (5 to 0.001, 0.02 a step).

    Raises:
        ValueError: numbers that are not positive, or an end above the start.
    """

    start: float = 5.0
    end: float = 0.001
    steps: int = 250

    def __post_init__(self):
        if not self.start >= self.end > 0 or self.steps < 0:
            raise ValueError(
                f"Annealing needs start >= end > 0 and steps >= 0, got {self.start}, {self.end} "
                f"and {self.steps}."
            )

    def __call__(self, step: Float[Array, "..."]) -> Float[Array, "..."]:
        """The temperature of a step, counted from 0."""
        done = jnp.clip(step / max(self.steps, 1), 0.0, 1.0) if self.steps else jnp.ones_like(step)
        return self.start * (1 - done) + self.end * done  # never below the end, in any precision


@dataclasses.dataclass(frozen=True)
class Router:
    """A kind of router.

    Attributes:
        scores: of logits; of a draw, with its noise and divided by its temperature.
        normalized: whether weights are divided by their sum.
        is_random: whether training draws.
        has_logits: whether it learns S logits for each task.
        reads_text: whether scores come from text attention.
    """

    scores: Callable[[Array], Array]
    normalized: bool = True
    is_random: bool = False
    has_logits: bool = True
    reads_text: bool = False


ROUTERS = {
    "relaxed_bernoulli": Router(jax.nn.sigmoid, is_random=True),
    "softmax": Router(jax.nn.softmax),
    "sigmoid": Router(jax.nn.sigmoid, normalized=False),
    "uniform": Router(
        lambda logits: jnp.full(logits.shape, 1 / logits.shape[-1]), has_logits=False
    ),
    "attention": Router(jax.nn.softmax, has_logits=False, reads_text=True),
}


def by_sum(scores: Array, logits: Array, kept: Array, in_training: bool) -> Array:
    """`s / (sum(s) + 1e-8)`, in training and at inference.

    A cold draw takes each source whole with the probability that inference weighs it by, or none at
    all: of S undecided sources in 2^-S of the steps.
    """
    del logits, in_training
    scores = jnp.where(kept, scores, 0.0)
    return scores / (scores.sum(-1, keepdims=True) + SMALL)


def by_softmax(scores: Array, logits: Array, kept: Array, in_training: bool) -> Array:
    """The released code: in training the softmax of `s / sum(s) + 1e-8`, at inference that of the
    logits. So training never weighs one source e times another or more, and inference may."""
    if in_training:
        total = jnp.where(kept, scores, 0.0).sum(-1, keepdims=True)
        logits = scores / jnp.maximum(total, SMALL) + SMALL
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1)


# What follows scores of the relaxed Bernoulli.
NORMALIZE = {"sum": by_sum, "softmax": by_softmax}


def keep_largest(values: Float[Array, "... S"], count: int | None) -> tuple[Array, Array]:
    """Which of the values are among the `count` largest (of equal ones the first), and their
    places, rising, [..., count]."""
    if count is None or count == values.shape[-1]:
        every = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
        return jnp.ones(values.shape, bool), every
    places = jnp.sort(jax.lax.top_k(jax.lax.stop_gradient(values), count)[1], -1)
    kept = jax.nn.one_hot(places, values.shape[-1], dtype=jnp.int32).sum(-2) > 0
    return kept, places


def noise(key: Key, runs: Runs, count: int) -> Float[Array, "K n"]:
    """logit(u), u uniform, of every run: by its name, so the same alone and in any company."""
    names = np.array([name_hash(name) for name in runs.run_names], np.uint32)
    keys = jax.vmap(lambda name: jax.random.fold_in(key, name))(names)
    return jax.vmap(lambda one: jax.random.logistic(one, (count,)))(keys)


def of_rows(table: Float[Array, "K n"], task_ids: Int[Array, "..."]) -> Float[Array, "... n"]:
    """Rows of a small table, without gradient."""
    return jax.lax.stop_gradient(table[task_ids])

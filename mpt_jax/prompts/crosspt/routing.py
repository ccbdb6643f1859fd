"""CrossPT's routers, which turn logits into weights of source prompts.

Each of S candidates gets a score s_j in [0, 1]. The k largest are kept and turned into weights:

    router              score in training                          at inference     weights
    relaxed_bernoulli   sigmoid((r_j + logit(u_j)) / temperature)  sigmoid(r_j)     see NORMALIZE
    softmax             softmax(r)_j                               the same         s / sum(s)
    sigmoid             sigmoid(r_j)                               the same         s
    uniform             1 / S                                      the same         s / sum(s)
    attention           softmax of text attention                  the same         s / sum(s)

with u_j uniform in (0, 1), drawn for every example, source and step, or once for all examples of a
run in a step. The training scores of relaxed_bernoulli thus follow the relaxed Bernoulli
distribution (Maddison et al. 2017, Jang et al. 2017).
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

SMALL = 1e-8  # added by the released code


@dataclasses.dataclass(frozen=True)
class Annealing:
    """Temperature that falls linearly from `start` to `end` over `steps` steps, then stays there.

    The defaults match the released code (from 5 to 0.001, by 0.02 per step).

    Raises:
        ValueError: `end` is not positive or is greater than `start`, or `steps` is negative.
    """

    start: float = 5.0
    end: float = 0.001
    steps: int = 250

    def __post_init__(self):
        if not self.start >= self.end > 0 or self.steps < 0:
            raise ValueError(
                f"Annealing needs start >= end > 0 and steps >= 0, got start = {self.start}, end = "
                f"{self.end} and steps = {self.steps}. Correct ANNEALING_STEPS, or "
                "routing.Annealing.start and routing.Annealing.end."
            )

    def __call__(self, step: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the temperature of a step, counted from 0."""
        done = jnp.clip(step / max(self.steps, 1), 0.0, 1.0) if self.steps else jnp.ones_like(step)
        return self.start * (1 - done) + self.end * done  # never below `end`, in any precision


@dataclasses.dataclass(frozen=True)
class Router:
    """A kind of router.

    Attributes:
        scores: the function from logits to scores. For random draws, the logits include noise and
            are divided by the temperature.
        normalized: whether weights are normalized.
        is_random: whether training draws scores at random.
        has_logits: whether each task has S trainable logits.
        reads_text: whether scores come from attention to the text.
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


def by_sum(scores: Array, logits: Array, kept: Array, temperature: Array | None) -> Array:
    """Returns p_j / sum(p) at inference, with p = sigmoid(logits), and weights with these means in
    training (ours).

    In training, a score s_j with mean m_j gets the weight (p_j / m_j) s_j / sum(p). At a low
    temperature a draw either includes or excludes a source, so a step's weights add up to one only
    on average. With `top_k`, which sources are kept is drawn as well, and means differ.
    """
    probabilities = jax.nn.sigmoid(logits)
    total = jnp.where(kept, probabilities, 0.0).sum(-1, keepdims=True) + SMALL
    if temperature is not None:
        means = expected_scores(logits, temperature)
        # At a low temperature the mean is p, which the midpoint rule finds only to 1/256.
        exact = (temperature <= 0.05) | (means < SMALL)
        ratio = jnp.where(exact, 1.0, probabilities / jnp.maximum(means, SMALL))
        scores = scores * jax.lax.stop_gradient(ratio)
    return jnp.where(kept, scores, 0.0) / total


def expected_scores(logits: Float[Array, "... S"], temperature: Array) -> Float[Array, "... S"]:
    """Returns the mean of sigmoid((logit + logit(u)) / temperature) over u in (0, 1), by the
    midpoint rule, to 1/256."""
    uniform = (jnp.arange(128) + 0.5) / 128
    noise = (jnp.log(uniform) - jnp.log1p(-uniform)).reshape((1,) * logits.ndim + (-1,))
    return jax.nn.sigmoid((logits[..., None] + noise) / temperature[..., None]).mean(-1)


def by_softmax(scores: Array, logits: Array, kept: Array, temperature: Array | None) -> Array:
    """Normalizes like the released code.

    In training it returns the softmax of `s / sum(s) + 1e-8`, at inference the softmax of the
    logits. Two weights therefore differ by a factor of at most e in training, while their ratio
    has no bound at inference.
    """
    if temperature is not None:
        total = jnp.where(kept, scores, 0.0).sum(-1, keepdims=True)
        logits = scores / jnp.maximum(total, SMALL) + SMALL
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1)


# Normalizations of the relaxed Bernoulli's scores.
NORMALIZE = {"sum": by_sum, "softmax": by_softmax}


def keep_largest(values: Float[Array, "... S"], count: int | None) -> tuple[Array, Array]:
    """Returns a mask of the `count` largest values, and their ascending indices [..., count].

    None keeps all values. Among equal values, the first are kept.
    """
    if count is None or count == values.shape[-1]:
        indices = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
        return jnp.ones(values.shape, bool), indices
    indices = jnp.sort(jax.lax.top_k(jax.lax.stop_gradient(values), count)[1], -1)
    kept = jax.nn.one_hot(indices, values.shape[-1], dtype=jnp.int32).sum(-2) > 0
    return kept, indices


def noise(key: Key, runs: Runs, count: int) -> Float[Array, "K n"]:
    """Returns n draws of logit(u), with u uniform in (0, 1), for every run.

    Draws depend on the run's name, not on its bank row, so they are the same in a job of one run
    and in a fleet.
    """
    return jax.vmap(lambda run_key: jax.random.logistic(run_key, (count,)))(_run_keys(key, runs))


def example_noise(
    key: Key, runs: Runs, task_ids: Int[Array, "..."], numbers: Int[Array, "..."], count: int
) -> Float[Array, "... n"]:
    """Returns n draws as `noise`, for every example. They depend on the name of the example's run
    and on its number among the run's examples in the batch."""
    keys = _run_keys(key, runs)[task_ids.ravel()]
    draw = lambda key, number: jax.random.logistic(jax.random.fold_in(key, number), (count,))  # noqa: E731
    return jax.vmap(draw)(keys, numbers.ravel()).reshape(*task_ids.shape, count)


def _run_keys(key: Key, runs: Runs) -> Array:
    names = np.array([name_hash(name) for name in runs.run_names], np.uint32)
    return jax.vmap(lambda name: jax.random.fold_in(key, name))(names)


def of_rows(table: Float[Array, "K n"], task_ids: Int[Array, "..."]) -> Float[Array, "... n"]:
    """Returns `table[task_ids]` without gradient."""
    return jax.lax.stop_gradient(table[task_ids])

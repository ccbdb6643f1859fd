"""Initial values of prompts and of the low-rank factors.

A prompt initializer is a callable object `(key, task_name, P, context) -> [P, H]` float32, and
knows nothing of methods. Sources: Lester et al. 2021 (arXiv 2104.08691) for the modes; the MPT
paper (arXiv 2303.02861) for sampled vocabulary as the default. It leaves the factors' initial
values at "random"; ours start every product near one, so that a fresh P* is not scaled away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs, look_up
from mpt_jax.core.shapes import Array, Float, Key
from mpt_jax.prompts.base import InitContext, name_key


@runtime_checkable
class PromptInit(Protocol):
    """`(key, task_name, P, context) -> [P, H]` float32."""

    def __call__(
        self, key: Key, task_name: str, prompt_length: int, context: InitContext
    ) -> Float[Array, "P H"]: ...


# One for all runs, or run -> its own.
PromptInits = PromptInit | Mapping[str, PromptInit]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in [-scale, scale]; 0.5 is the random start of the released ATTEMPT code."""

    scale: float = 0.5

    def __call__(self, key, task_name, prompt_length, context):
        shape = (prompt_length, context.embedding.shape[1])
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Embeddings of ids drawn without replacement among the first `population` (most frequent).

    Raises:
        ValueError: fewer ids than prompt rows.
    """

    population: int = 5000

    def __call__(self, key, task_name, prompt_length, context):
        population = min(self.population, context.embedding.shape[0])
        if population < prompt_length:
            raise ValueError(
                f"Cannot draw {prompt_length} distinct ids out of {population}: shorten the "
                "prompt, or raise SampledVocabulary.population."
            )
        ids = jax.random.choice(key, population, (prompt_length,), replace=False)
        return context.embedding[ids].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """One row for each label, the mean of its tokens' embeddings; the rest sampled vocabulary.

    Attributes:
        labels: task name -> its label words, or one list for every task.

    Raises:
        ValueError: no labels for a task, or more labels than prompt rows.
    """

    labels: Mapping[str, Sequence[str]] | Sequence[str]
    rest: PromptInit = SampledVocabulary()

    def __call__(self, key, task_name, prompt_length, context):
        labels = self.labels
        if isinstance(labels, Mapping):
            labels = look_up("task with class labels", task_name, labels)
        words = [_ids(label, context) for label in labels]
        rows = [context.embedding[ids].astype(jnp.float32).mean(0) for ids in words]
        return _fill(rows, "labels", self.rest(key, task_name, prompt_length, context))


@dataclasses.dataclass(frozen=True)
class Text:
    """One row for each token of a text; the rest sampled vocabulary.

    Raises:
        ValueError: more tokens than prompt rows.
    """

    text: str
    rest: PromptInit = SampledVocabulary()

    def __call__(self, key, task_name, prompt_length, context):
        rows = list(context.embedding[_ids(self.text, context)].astype(jnp.float32))
        return _fill(rows, "tokens", self.rest(key, task_name, prompt_length, context))


@dataclasses.dataclass(frozen=True)
class FromArray:
    """A [P, H] array from a .npy file (never unpickled).

    Raises:
        ValueError: another shape than [P, H].
    """

    path: str

    def __call__(self, key, task_name, prompt_length, context):
        array = np.load(Path(self.path), allow_pickle=False)
        expected = (prompt_length, context.embedding.shape[1])
        if array.shape != expected:
            raise ValueError(
                f"{self.path} holds {array.shape}, but this model's prompts are {expected} "
                "(prompt length, model width)."
            )
        return jnp.asarray(array, jnp.float32)


def initial_prompts(
    init: PromptInits,
    key: Key,
    runs: Runs,
    rows: Sequence[int],
    prompt_length: int,
    context: InitContext,
) -> Float[Array, "rows P H"]:
    """The initial prompts of some rows of a bank.

    Args:
        init: an initializer for all, or one for each run.
        key: of the job.
        runs: the bank's rows.
        rows: which.
        prompt_length: P.
        context: what initializers may look at.

    Raises:
        ValueError: there is none for a run.
    """
    made = []
    for row in rows:
        run, chosen = runs.run_names[row], init
        if isinstance(chosen, Mapping):
            chosen = look_up("run among initializers", run, chosen)
        made.append(chosen(name_key(key, run), runs.task_names[row], prompt_length, context))
    return jnp.stack(made)


def _ids(text: str, context: InitContext) -> np.ndarray:
    if context.vocabulary is None:
        raise ValueError(f"Starting from the text {text!r} needs the model's vocabulary.")
    ids = np.asarray(context.vocabulary.encode(text), np.int32)
    if not ids.size:
        raise ValueError(f"The vocabulary encodes {text!r} as no tokens at all.")
    return ids


def _fill(rows: list[Array], what: str, rest: Array) -> Array:
    if len(rows) > rest.shape[0]:
        raise ValueError(
            f"{len(rows)} {what} do not fit a prompt of {rest.shape[0]} rows: lengthen the "
            "prompt or shorten the list."
        )
    return rest.at[: len(rows)].set(jnp.stack(rows))


# --- Factors -------------------------------------------------------------------------------------


@runtime_checkable
class FactorInit(Protocol):
    """`(key, P, H, R) -> (left [P, R], right [R, H])` float32."""

    def __call__(
        self, key: Key, prompt_length: int, width: int, rank: int
    ) -> tuple[Float[Array, "P R"], Float[Array, "R H"]]: ...


def ones_noise(key, prompt_length, width, rank):
    """Products near one: ones plus N(0, 0.02) on both sides, so that tasks and ranks differ."""
    left, right = normal002(key, prompt_length, width, rank)
    return (1.0 + left) / rank, 1.0 + right


def normal002(key, prompt_length, width, rank):
    """N(0, 0.02) on both sides, as PEFT starts: at rank one the product is about 4e-4."""
    key_left, key_right = jax.random.split(key)
    return (
        0.02 * jax.random.normal(key_left, (prompt_length, rank)),
        0.02 * jax.random.normal(key_right, (rank, width)),
    )


def signs(key, prompt_length, width, rank):
    """Random signs; the left side is divided by sqrt(R) so that products have unit variance."""
    key_left, key_right = jax.random.split(key)
    return (
        jax.random.rademacher(key_left, (prompt_length, rank), jnp.float32) / rank**0.5,
        jax.random.rademacher(key_right, (rank, width), jnp.float32),
    )

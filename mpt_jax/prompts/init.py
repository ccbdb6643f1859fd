"""Initializers of prompts and of low-rank factors.

A prompt initializer is a callable object `(key, task_name, P, context) -> [P, H]` float32. It does
not depend on the prompt method. The kinds of initializers are from Lester et al. 2021 (arXiv
2104.08691); the default, sampled vocabulary, is from the MPT paper (arXiv 2303.02861). The paper
says only that the factors are initialized randomly. Our default, `ones_noise`, makes every product
of factors close to one, so that initial prompts have the scale of P*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs, entry_of_run
from mpt_jax.core.shapes import Array, Float, Key
from mpt_jax.prompts.base import InitContext, name_key
from mpt_jax.runtime.tensors import load_npy


@runtime_checkable
class PromptInit(Protocol):
    """A prompt initializer: `(key, task_name, P, context) -> [P, H]` float32."""

    def __call__(
        self, key: Key, task_name: str, prompt_length: int, context: InitContext
    ) -> Float[Array, "P H"]: ...


# One initializer for all runs, or a mapping run name -> initializer.
PromptInits = PromptInit | Mapping[str, PromptInit]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Values drawn uniformly from [-scale, scale]; the released ATTEMPT code uses 0.5."""

    scale: float = 0.5

    def __call__(self, key, task_name, prompt_length, context):
        shape = (prompt_length, context.embedding.shape[1])
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Values drawn from a normal distribution with mean 0; CoOp uses a standard deviation of
    0.02."""

    standard_deviation: float = 0.02

    def __call__(self, key, task_name, prompt_length, context):
        shape = (prompt_length, context.embedding.shape[1])
        return self.standard_deviation * jax.random.normal(key, shape)


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Embeddings of token ids drawn without replacement.

    Attributes:
        population: the number of first ids to draw from. In T5's vocabulary, the first ids are the
            most frequent tokens.
        ids: the ids to draw from, instead of the first `population`. Rows of tokens that
            pretraining never saw are nearly alike, and far from all others.

    Raises:
        ValueError: there are fewer ids than prompt rows, or the backbone does not embed one.
    """

    population: int = 5000
    ids: Sequence[int] | None = None

    def __call__(self, key, task_name, prompt_length, context):
        embedded = context.embedding.shape[0]
        ids = range(min(self.population, embedded)) if self.ids is None else self.ids
        if len(ids) < prompt_length:
            raise ValueError(
                f"Cannot draw {prompt_length} distinct token ids from {len(ids)} for a prompt of "
                f"{prompt_length} positions (SampledVocabulary.population is {self.population}, "
                f"and the backbone embeds {embedded} ids). Lower PROMPT_LENGTH, or raise "
                "SampledVocabulary.population if the backbone embeds more ids."
            )
        if not 0 <= min(ids) <= max(ids) < embedded:
            raise ValueError(
                f"SampledVocabulary.ids has ids from {min(ids)} to {max(ids)}, but the backbone "
                f"embeds ids 0 to {embedded - 1}. Use ids of this backbone's vocabulary."
            )
        drawn = jax.random.choice(key, len(ids), (prompt_length,), replace=False)
        return context.embedding[jnp.asarray(ids)[drawn]].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """One prompt row per class label: the mean of the label's token embeddings.

    Attributes:
        labels: a mapping from task name to class labels, or one list of labels for all tasks.
        rest: the initializer of the remaining prompt rows.

    Raises:
        ValueError: a task has no labels or more labels than prompt rows, a label has no tokens, or
            the context has no vocabulary.
    """

    labels: Mapping[str, Sequence[str]] | Sequence[str]
    rest: PromptInit = SampledVocabulary()

    def __call__(self, key, task_name, prompt_length, context):
        labels = self.labels
        if isinstance(labels, Mapping):
            labels = entry_of_run(labels, task_name, "ClassLabels.labels", kind="task")
        words = [_ids(label, context) for label in labels]
        rows = [context.embedding[ids].astype(jnp.float32).mean(0) for ids in words]
        rest = self.rest(key, task_name, prompt_length, context)
        return _fill(rows, "labels", task_name, rest, context.parts)


@dataclasses.dataclass(frozen=True)
class Text:
    """The token embeddings of a text, one per prompt row. `rest` initializes the remaining rows.

    Raises:
        ValueError: the text has no tokens or more tokens than the prompt has rows, or the context
            has no vocabulary.
    """

    text: str
    rest: PromptInit = SampledVocabulary()

    def __call__(self, key, task_name, prompt_length, context):
        rows = list(context.embedding[_ids(self.text, context)].astype(jnp.float32))
        rest = self.rest(key, task_name, prompt_length, context)
        return _fill(rows, "tokens", task_name, rest, context.parts)


@dataclasses.dataclass(frozen=True)
class FromArray:
    """A [P, H] array read from a .npy file. Pickled arrays are rejected.

    Raises:
        ValueError: the file is not an intact `.npy` file of numbers, or the array's shape is not
            [P, H].
    """

    path: str

    def __call__(self, key, task_name, prompt_length, context):
        array = load_npy(Path(self.path).read_bytes(), self.path)
        expected = (prompt_length, context.embedding.shape[1])
        if array.shape != expected:
            raise ValueError(
                f"{self.path} holds an array of shape {array.shape}, but this model's prompts "
                f"have shape {expected} (prompt length, model width). Save an array of this shape, "
                "or choose another initializer."
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
    """Returns the initial prompts of some bank rows.

    Args:
        init: one initializer for all runs, or one for each run.
        key: random key of the job.
        runs: the bank's rows.
        rows: the bank rows to initialize.
        prompt_length: P.
        context: inputs of initializers.

    Raises:
        ValueError: a run has no initializer.
    """
    prompts = []
    for row in rows:
        run, initializer = runs.run_names[row], init
        if isinstance(initializer, Mapping):
            initializer = entry_of_run(initializer, run, "The table of initializers")
        prompts.append(
            initializer(name_key(key, run), runs.task_names[row], prompt_length, context)
        )
    return jnp.stack(prompts)


def _ids(text: str, context: InitContext) -> np.ndarray:
    if context.vocabulary is None:
        raise ValueError(
            f"Initializing a prompt from the text {text!r} needs a vocabulary. Set "
            "PromptedEncoderDecoder.input_vocabulary (of CLIP: PromptedDualEncoder.tokenizer)."
        )
    ids = np.asarray(context.vocabulary.encode(text), np.int32)
    if not ids.size:
        raise ValueError(
            f"A prompt cannot be initialized from the text {text!r}: the vocabulary encodes it as "
            "zero tokens. Use another text."
        )
    return ids


def _fill(rows: list[Array], what: str, task_name: str, rest: Array, parts: int) -> Array:
    """Returns `rest` with its first rows, or those of each of its parts, replaced."""
    each = rest.reshape(parts, -1, rest.shape[-1])
    if len(rows) > each.shape[1]:
        raise ValueError(
            f"A prompt of {each.shape[1]} rows is too short for {len(rows)} {what} (task "
            f"{task_name!r}). Raise PROMPT_LENGTH (of CLIP: CONTEXT_LENGTH), or use fewer {what} "
            "to initialize the prompt."
        )
    return each.at[:, : len(rows)].set(jnp.stack(rows)).reshape(rest.shape)


# --- Factors -------------------------------------------------------------------------------------


@runtime_checkable
class FactorInit(Protocol):
    """A factor initializer: `(key, P, H, R) -> (left [P, R], right [R, H])` float32."""

    def __call__(
        self, key: Key, prompt_length: int, width: int, rank: int
    ) -> tuple[Float[Array, "P R"], Float[Array, "R H"]]: ...


def ones_noise(key, prompt_length, width, rank):
    """Returns noise with standard deviation 0.02, plus one in the first column of U and row of V.

    Products are near one, and the noise makes tasks differ. Adam's first step has the same size for
    all entries, so it changes the product by the same amount at every rank.
    """
    left, right = normal002(key, prompt_length, width, rank)
    return left.at[:, 0].add(1.0), right.at[0].add(1.0)


def ones(key, prompt_length, width, rank):
    """Returns one in the first column of U and row of V, and zeros: products are exactly one, and
    further ranks learn nothing."""
    del key
    left, right = jnp.zeros((prompt_length, rank)), jnp.zeros((rank, width))
    return left.at[:, 0].set(1.0), right.at[0].set(1.0)


def normal002(key, prompt_length, width, rank):
    """Draws both factors from a normal distribution with standard deviation 0.02, as in PEFT.

    At rank one, the entries of the product are therefore tiny, about 4e-4.
    """
    key_left, key_right = jax.random.split(key)
    return (
        0.02 * jax.random.normal(key_left, (prompt_length, rank)),
        0.02 * jax.random.normal(key_right, (rank, width)),
    )


def signs(key, prompt_length, width, rank):
    """Returns random signs, with the left factor divided by sqrt(R): products have variance one."""
    key_left, key_right = jax.random.split(key)
    return (
        jax.random.rademacher(key_left, (prompt_length, rank), jnp.float32) / rank**0.5,
        jax.random.rademacher(key_right, (rank, width), jnp.float32),
    )

"""Insertion of prompts: one prompt is composed per example and written into the example's slots.

In an unpacked batch a row is one example, and its prompt precedes the text. In a packed batch a row
holds several examples, and each position gathers the prompt row of its own example. In both cases
one prompt is composed per example, so prompt methods need not distinguish the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import encoder_mask, is_packed
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int, Key, Params
from mpt_jax.models.losses import MixtureWeights
from mpt_jax.prompts.base import PromptContext, PromptMethod
from mpt_jax.prompts.row_ops import numbers_within_rows

# [B, E] feature that `number_examples` adds to a batch.
NUMBERS = "prompt_numbers"


class PromptedEmbeddings(NamedTuple):
    """The encoder's input.

    Attributes:
        embeddings: [B, T, H] token embeddings, with prompts at their slots.
        prompts: see `losses.ModelOutputs`; None if the method has no prompt.
        mixed: mixture weights, for a method with candidates.
    """

    embeddings: Float[Array, "B T H"]
    prompts: Float[Array, "B _ H"] | None = None
    mixed: MixtureWeights | None = None


class ExampleIndex(NamedTuple):
    """The examples in the rows of a batch, up to E per row.

    Attributes:
        number: [B, T] number of each position's example within its row, from 0; E at the padding
            of a packed row.
        task_ids: [B, E] bank row of each example.
    """

    number: Int[Array, "B T"]
    task_ids: Int[Array, "B E"]

    @classmethod
    def of(cls, batch: Batch, shortest: int) -> ExampleIndex:
        """Returns the index of a batch's examples.

        Args:
            batch: the batch contract's features.
            shortest: the length of the shortest prompt, which limits the examples per packed row.
        """
        task_ids = batch["encoder_task_ids"]
        if not is_packed(batch):
            return cls(jnp.zeros_like(task_ids), task_ids[:, :1])
        rows, positions = task_ids.shape
        limit = max(positions // shortest, 1)
        segment_ids = batch["encoder_segment_ids"]
        number = jnp.where(segment_ids > 0, segment_ids - 1, limit)
        ids = jnp.zeros((rows, limit), task_ids.dtype)
        ids = ids.at[jnp.arange(rows)[:, None], number].max(task_ids, mode="drop")
        return cls(number, ids)


def number_examples(method: PromptMethod, runs: Runs, batch: Batch) -> dict[str, Array]:
    """Returns a batch with the number of each example among those of its run.

    Microbatches of it then draw the same prompts as the whole batch. A batch is unchanged if the
    method draws nothing.
    """
    if not method.is_random:
        return dict(batch)
    task_ids = ExampleIndex.of(batch, min(method.prompt_lengths(runs))).task_ids
    return {**batch, NUMBERS: numbers_within_rows(task_ids)}


def insert_prompts(
    method: PromptMethod,
    params: Params,
    runs: Runs,
    batch: Batch,
    embedded: Float[Array, "B T H"],
    key: Key | None = None,
) -> PromptedEmbeddings:
    """Writes every example's prompt into the positions that the batch reserves for it.

    Args:
        method: the prompt method.
        params: the method's parameters.
        runs: the bank's rows.
        batch: the batch contract's features.
        embedded: embeddings of the batch's tokens.
        key: random key of a training step; see `PromptContext`.
    """
    if method.prompt_length == 0:
        return PromptedEmbeddings(embedded)
    examples = ExampleIndex.of(batch, min(method.prompt_lengths(runs)))
    count = examples.task_ids.shape[1]
    mask, slots = encoder_mask(batch), batch["encoder_prompt_slots"]
    pooled = None
    if method.reads_text:
        pooled = max_pool_text(embedded, mask & (slots == 0), examples.number, count)
    packed = is_packed(batch)
    # Unpacked batches drop the example axis: fleets gather rows along the batch axis only.
    task_ids = examples.task_ids if packed else examples.task_ids[:, 0]
    given = (pooled, batch.get(NUMBERS))
    pooled, numbers = (x if packed or x is None else x[:, 0] for x in given)
    context = PromptContext(pooled, key, numbers)
    prompts = method.compose(params, runs, task_ids, context)
    mixed = None
    if method.candidates:
        weights = method.mixture(params, runs, task_ids, context)
        weights = jax.lax.stop_gradient(weights if packed else weights[:, None])
        mixed = MixtureWeights(weights, examples.task_ids, _present(mask, examples.number, count))
    if packed or method.has_variable_lengths(runs):
        rows = rows_at(prompts if packed else prompts[:, None], examples.number, slots)
        return PromptedEmbeddings(
            place_rows(rows, embedded, slots), rows if packed else prompts, mixed
        )
    return PromptedEmbeddings(place(prompts, embedded), prompts, mixed)


def rows_at(
    prompts: Float[Array, "B E P H"], number: Int[Array, "B T"], slots: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Returns, for each slot, row `slots - 1` of its example's prompt; arbitrary elsewhere."""
    rows, count, length, width = prompts.shape
    index = jnp.minimum(number, count - 1) * length + jnp.maximum(slots - 1, 0)
    flat = prompts.reshape(rows, count * length, width)
    return jnp.take_along_axis(flat, index[..., None], axis=1)


def max_pool_text(
    embedded: Float[Array, "B T H"],
    is_text: Bool[Array, "B T"],
    number: Int[Array, "B T"],
    count: int,
) -> Float[Array, "B E H"]:
    """Returns the maximum of each feature over an example's text, in float32; 0 if it has none.

    Args:
        embedded: token embeddings.
        is_text: whether a position holds a text token, not a prompt row or padding.
        number: see `ExampleIndex`.
        count: E, the maximum number of examples per row.
    """
    values = jnp.where(is_text[..., None], embedded.astype(jnp.float32), -jnp.inf)
    if count == 1:
        pooled = values.max(1, keepdims=True)
    else:
        rows, _, width = embedded.shape
        pooled = jnp.full((rows, count, width), -jnp.inf)
        pooled = pooled.at[jnp.arange(rows)[:, None], number].max(values, mode="drop")
    return jnp.where(jnp.isfinite(pooled), pooled, 0.0)


def _present(mask: Bool[Array, "B T"], number: Int[Array, "B T"], count: int) -> Array:
    """Returns whether each example exists, [B, E]."""
    present = jnp.zeros((mask.shape[0], count), bool)
    return present.at[jnp.arange(mask.shape[0])[:, None], number].max(mask, mode="drop")


def place(prompts: Float[Array, "B P H"], embedded: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """Writes prompts into the first P positions, which the feature converter reserves for them.

    Only for unpacked batches, in which slot i+1 is position i of every example.
    """
    length = prompts.shape[1]
    if embedded.shape[1] < length:
        raise ValueError(
            f"A prompt of {length} positions does not fit into a row of {embedded.shape[1]} "
            f"positions. Set PromptFeatureConverter.prompt_length to {length}, so that every row "
            "reserves positions for the prompt before the text."
        )
    if length == 0:
        return embedded
    return jnp.concatenate([prompts.astype(embedded.dtype), embedded[:, length:]], axis=1)


def place_rows(
    rows: Float[Array, "B T H"], embedded: Float[Array, "B T H"], slots: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Writes a prompt row into every position that is a prompt slot."""
    return jnp.where(slots[..., None] > 0, rows.astype(embedded.dtype), embedded)

"""How a prompt meets the text: composed once for every example, written into its positions.

Unpacked, an example is a row, and its prompt lies in front of the text. Packed, a row holds several
examples, and positions look their row of their own example's prompt up. Both compose one prompt for
each example, so a method need not know which it is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import encoder_mask
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int, Key, Params
from mpt_jax.models.losses import MixtureWeights
from mpt_jax.prompts.base import PromptContext, PromptMethod


class PromptedEmbeddings(NamedTuple):
    """What the encoder reads.

    Attributes:
        embeddings: [B, T, H] token embeddings, and prompts where they belong.
        prompts: see `losses.ModelOutputs`; None without a prompt.
        mixed: of a method with candidates.
    """

    embeddings: Float[Array, "B T H"]
    prompts: Float[Array, "B _ H"] | None = None
    mixed: MixtureWeights | None = None


class ExampleIndex(NamedTuple):
    """Which examples lie in the rows of a batch: up to E in each.

    Attributes:
        number: [B, T] the example of each position, from 0 on; E at a packed row's padding.
        task_ids: [B, E] the bank row of each.
    """

    number: Int[Array, "B T"]
    task_ids: Int[Array, "B E"]

    @classmethod
    def of(cls, batch: Batch, shortest: int) -> ExampleIndex:
        """Those of a batch.

        Args:
            batch: the batch contract's features.
            shortest: positions that the shortest prompt takes.
        """
        task_ids = batch["encoder_task_ids"]
        if "encoder_segment_ids" not in batch:
            return cls(jnp.zeros_like(task_ids), task_ids[:, :1])
        rows, positions = task_ids.shape
        most = max(positions // shortest, 1)
        number = jnp.where(batch["encoder_segment_ids"] > 0, batch["encoder_segment_ids"] - 1, most)
        found = jnp.zeros((rows, most), task_ids.dtype)
        found = found.at[jnp.arange(rows)[:, None], number].max(task_ids, mode="drop")
        return cls(number, found)


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
        params: its parameters.
        runs: the bank's rows.
        batch: the batch contract's features.
        embedded: embeddings of the batch's tokens.
        key: of a training step; see `PromptContext`.
    """
    if method.prompt_length == 0:
        return PromptedEmbeddings(embedded)
    found = ExampleIndex.of(batch, min(method.prompt_lengths(runs)))
    count = found.task_ids.shape[1]
    mask, slots = encoder_mask(batch), batch["encoder_prompt_slots"]
    pooled = None
    if method.reads_text:
        pooled = max_pool_text(embedded, mask & (slots == 0), found.number, count)
    packed = "encoder_segment_ids" in batch
    # Unpacked batches drop the axis of examples: fleets look rows up along the batch's alone.
    task_ids = found.task_ids if packed else found.task_ids[:, 0]
    given = PromptContext(pooled if packed or pooled is None else pooled[:, 0], key)
    prompts = method.compose(params, runs, task_ids, given)
    mixed = None
    if method.candidates:
        weights = method.mixture(params, runs, task_ids, given)
        weights = jax.lax.stop_gradient(weights if packed else weights[:, None])
        mixed = MixtureWeights(weights, found.task_ids, _present(mask, found.number, count))
    if packed or method.has_variable_lengths(runs):
        rows = rows_at(prompts if packed else prompts[:, None], found.number, slots)
        return PromptedEmbeddings(
            place_rows(rows, embedded, slots), rows if packed else prompts, mixed
        )
    return PromptedEmbeddings(place(prompts, embedded), prompts, mixed)


def rows_at(
    prompts: Float[Array, "B E P H"], number: Int[Array, "B T"], slots: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Row `slots - 1` of the prompt of each position's example; anything where there is none."""
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
    """The largest value of each feature over the text of each example, float32; 0 without text.

    Args:
        embedded: token embeddings.
        is_text: where there is a token of a text, and neither prompt nor padding.
        number: the example of each position.
        count: E.
    """
    values = jnp.where(is_text[..., None], embedded.astype(jnp.float32), -jnp.inf)
    if count == 1:
        found = values.max(1, keepdims=True)
    else:
        rows, _, width = embedded.shape
        found = jnp.full((rows, count, width), -jnp.inf)
        found = found.at[jnp.arange(rows)[:, None], number].max(values, mode="drop")
    return jnp.where(jnp.isfinite(found), found, 0.0)


def _present(mask: Bool[Array, "B T"], number: Int[Array, "B T"], count: int) -> Array:
    """Whether there is an example, [B, E]."""
    found = jnp.zeros((mask.shape[0], count), bool)
    return found.at[jnp.arange(mask.shape[0])[:, None], number].max(mask, mode="drop")


def place(prompts: Float[Array, "B P H"], embedded: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """Writes prompts into the first P positions, which the feature converter reserved for them.

    For unpacked batches only: there slot i+1 is position i of every example.
    """
    length = prompts.shape[1]
    if embedded.shape[1] < length:
        raise ValueError(
            f"A prompt of {length} positions does not fit a row of {embedded.shape[1]}: the "
            "feature converter must reserve prompt_length positions in front of the text."
        )
    if length == 0:
        return embedded
    return jnp.concatenate([prompts.astype(embedded.dtype), embedded[:, length:]], axis=1)


def place_rows(
    rows: Float[Array, "B T H"], embedded: Float[Array, "B T H"], slots: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Writes a prompt row into every position that is a prompt slot, wherever it lies."""
    return jnp.where(slots[..., None] > 0, rows.astype(embedded.dtype), embedded)

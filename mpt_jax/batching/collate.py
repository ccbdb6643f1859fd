"""Collation of token ids into batches, in NumPy, for all rows of a batch at once.

Two other functions also build unpacked rows, because they run in a graph:
`data.feature_converter.PromptFeatureConverter._place` (TensorFlow, one example at a time) and
`serving.predict.compiled.Functions._batch` (JAX). Tests compare all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpt_jax.batching import packing

Batch = dict[str, np.ndarray]
PromptLength = int | Sequence[int]


class Example(NamedTuple):
    """One example.

    Attributes:
        inputs: token ids of the input text, with the end-of-sequence id.
        targets: token ids of the target text, with the end-of-sequence id; empty if unknown.
        row: the bank row of the example's prompt.
    """

    inputs: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray = ()
    row: int = 0


class Ragged(NamedTuple):
    """Sequences of different lengths, one after another.

    Attributes:
        values: the elements of all sequences [N].
        lengths: the length of each sequence [n].
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Any]) -> Ragged:
        """Returns these sequences of token ids."""
        lengths = np.array([len(x) for x in sequences], np.int64)
        parts = [np.asarray(x, np.int32) for x in sequences]
        return cls(np.concatenate([np.empty(0, np.int32), *parts]), lengths)


class Places(NamedTuple):
    """Where the n examples of a batch are.

    Attributes:
        rows: the row of the batch.
        encoder: the first encoder position, that of the first prompt slot.
        decoder: the first decoder position.
        segments: the number of the example in its row, from 1.
    """

    rows: np.ndarray
    encoder: np.ndarray
    decoder: np.ndarray
    segments: np.ndarray


def unpacked(
    examples: Sequence[Example], prompt_length: PromptLength, text_length: int, target_length: int
) -> Batch:
    """Builds a batch with one example per row: prompt slots, then the text, then padding.

    Args:
        examples: the B examples.
        prompt_length: the prompt length P, or a list with the prompt length of each bank row.
        text_length: the maximum number of input tokens: T minus the longest prompt length.
        target_length: the maximum number of target tokens, L.

    Raises:
        ValueError: the inputs or targets of an example are longer than their limit.
    """
    for example in examples:
        _check(example, text_length, target_length)
    inputs, targets, banks, reserved = _flat(examples, prompt_length)
    shape = len(examples), int(np.max(prompt_length)) + text_length, target_length
    return unpacked_rows(inputs, targets, banks, reserved, shape)


def unpacked_rows(
    inputs: Ragged,
    targets: Ragged,
    banks: np.ndarray,
    prompt_lengths: np.ndarray,
    shape: tuple[int, int, int],
) -> Batch:
    """Builds a batch with one example per row.

    Args:
        inputs, targets: the token ids of each example, short enough for a row.
        banks: the bank row of each example.
        prompt_lengths: the number of prompt slots of each example.
        shape: the numbers of rows (at least n), of encoder and of decoder positions.
    """
    zeros = np.zeros(len(banks), np.int64)
    places = Places(np.arange(len(banks)), zeros, zeros, zeros)
    batch = _texts(inputs, targets, prompt_lengths, places, shape)
    # As in SeqIO, the last target is also an input, at a position that has no loss weight.
    batch["decoder_input_tokens"][:, 1:] = batch["decoder_target_tokens"][:, :-1]
    column = np.zeros((shape[0], 1), np.int32)
    column[: len(banks), 0] = banks
    is_text = (batch["encoder_input_tokens"] != 0) | (batch["encoder_prompt_slots"] != 0)
    weights = batch["decoder_loss_weights"]
    weights[:] = batch["decoder_target_tokens"] != 0
    batch["encoder_task_ids"] = column * is_text
    batch["decoder_task_ids"] = column * weights
    return batch


def packed(
    examples: Sequence[Example], prompt_length: PromptLength, lengths: Mapping[str, int]
) -> Batch:
    """Builds a batch with several examples per row, each with its own prompt.

    Uses as few rows as `packing.best_fit` finds.

    Args:
        examples: the examples; at least one.
        prompt_length: the prompt length P, or a list with the prompt length of each bank row. An
            example's prompt slots are in front of its text.
        lengths: the number of positions of a row on each side: `inputs` (prompt slots included)
            and `targets`.

    Raises:
        ValueError: an example is longer than a row, has no targets, has neither inputs nor a
            prompt, or contains id 0, which is padding.
    """
    shape = lengths["inputs"], lengths["targets"]
    inputs, targets, banks, reserved = _flat(examples, prompt_length)
    for example, length in zip(examples, reserved.tolist(), strict=True):
        empty = 0 in (length + len(example.inputs), len(example.targets))
        if empty or 0 in example.inputs or 0 in example.targets:
            raise ValueError(
                f"Cannot pack an example of bank row {example.row} ({len(example.inputs)} input "
                f"and {len(example.targets)} target tokens): its inputs or targets are empty or "
                "contain id 0, which is padding. Correct or remove the example."
            )
    needed = np.stack([reserved + inputs.lengths, targets.lengths], axis=1)
    places = packed_places(packing.best_fit(needed, shape), needed)
    number = int(places.rows.max()) + 1
    return packed_rows(inputs, targets, banks, reserved, places, (number, *shape))


def packed_places(rows: np.ndarray, needed: np.ndarray) -> Places:
    """Returns the places of packed examples. The examples of a row are in the order of their index.

    Args:
        rows: the row of each example.
        needed: the numbers of encoder and decoder positions of each example.
    """
    order = np.argsort(rows, kind="stable")
    in_order, ends = rows[order], np.cumsum(needed[order], axis=0)
    new = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1])[: len(rows)])
    counts = np.diff(np.append(new, len(rows)))
    starts = ends - needed[order]
    firsts = np.empty((len(rows), 3), np.int64)
    firsts[order, :2] = starts - np.repeat(starts[new], counts, axis=0)
    firsts[order, 2] = np.arange(len(rows)) - np.repeat(new, counts) + 1
    return Places(rows, *firsts.T)


def packed_rows(
    inputs: Ragged,
    targets: Ragged,
    banks: np.ndarray,
    prompt_lengths: np.ndarray,
    places: Places,
    shape: tuple[int, int, int],
) -> Batch:
    """Builds a batch with several examples per row.

    Args:
        inputs, targets, banks, prompt_lengths: see `unpacked_rows`. No example contains id 0.
        places: the places of the examples.
        shape: the numbers of rows, of encoder and of decoder positions.
    """
    batch = _texts(inputs, targets, prompt_lengths, places, shape)
    sides = {
        "encoder": (places.encoder, prompt_lengths + inputs.lengths, shape[1]),
        "decoder": (places.decoder, targets.lengths, shape[2]),
    }
    for side, (firsts, lengths, length) in sides.items():
        within = _within(lengths)
        at = np.repeat(places.rows * length + firsts, lengths) + within
        values = {"positions": within, "segment_ids": np.repeat(places.segments, lengths)}
        values["task_ids"] = np.repeat(banks, lengths)
        for name, value in values.items():
            batch[f"{side}_{name}"] = _zeros((shape[0], length))
            batch[f"{side}_{name}"].ravel()[at] = value
        if side == "decoder":
            batch["decoder_loss_weights"].ravel()[at] = 1
            # The first position of an example has no token before it.
            later = at[within > 0]
            tokens = batch["decoder_target_tokens"].ravel()
            batch["decoder_input_tokens"].ravel()[later] = tokens[later - 1]
    return batch


def _texts(
    inputs: Ragged,
    targets: Ragged,
    prompt_lengths: np.ndarray,
    places: Places,
    shape: tuple[int, int, int],
) -> Batch:
    """Returns a batch with prompt slots, inputs and targets only, at their places."""
    rows, width, length = shape
    names = ("encoder_input_tokens", "encoder_prompt_slots")
    batch = {name: _zeros((rows, width)) for name in names}
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    batch |= {name: _zeros((rows, length)) for name in names}
    first = places.rows * width + places.encoder
    slots = _within(prompt_lengths)
    batch["encoder_prompt_slots"].ravel()[np.repeat(first, prompt_lengths) + slots] = slots + 1
    at = np.repeat(first + prompt_lengths, inputs.lengths) + _within(inputs.lengths)
    batch["encoder_input_tokens"].ravel()[at] = inputs.values
    first = places.rows * length + places.decoder
    at = np.repeat(first, targets.lengths) + _within(targets.lengths)
    batch["decoder_target_tokens"].ravel()[at] = targets.values
    return batch


def _flat(
    examples: Sequence[Example], prompt_length: PromptLength
) -> tuple[Ragged, Ragged, np.ndarray, np.ndarray]:
    """Returns the inputs, targets, bank rows and prompt lengths of examples."""
    banks = np.array([example.row for example in examples], np.int32)
    lengths = np.ravel(prompt_length).astype(np.int64)
    reserved = lengths[banks if np.ndim(prompt_length) else np.zeros_like(banks)]
    inputs, targets = [x.inputs for x in examples], [x.targets for x in examples]
    return Ragged.of(inputs), Ragged.of(targets), banks, reserved


def _within(lengths: np.ndarray) -> np.ndarray:
    """Returns 0 .. length - 1 for each of the lengths, one after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(lengths) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)


def _zeros(shape: tuple[int, int]) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _check(example: Example, text_length: int, target_length: int) -> None:
    limits = {
        "inputs": ("text_length", text_length),
        "targets": ("target_length", target_length),
    }
    for name, (setting, limit) in limits.items():
        if len(getattr(example, name)) > limit:
            raise ValueError(
                f"An example has {len(getattr(example, name))} tokens in {name}, but the limit is "
                f"{limit}. Shorten it, or raise {setting}."
            )

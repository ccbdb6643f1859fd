"""Collation of token ids into batches, in NumPy.

For callers that have token ids as lists: the feature converter (packed rows), benchmarks, and
programs without SeqIO. Two other functions also build unpacked rows, because they run in a graph:
`data.feature_converter.PromptFeatureConverter._place` (TensorFlow, one example at a time) and
`serving.predict.compiled.Functions._batch` (JAX). Tests compare all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    batch = _empty(len(examples), int(np.max(prompt_length)) + text_length, target_length)
    for number, example in enumerate(examples):
        _check(example, text_length, target_length)
        _write(batch, number, example, _length_of(prompt_length, int(example.row)), (0, 0))
    # As in SeqIO, the last target is also an input, at a position that has no loss weight.
    batch["decoder_input_tokens"][:, 1:] = batch["decoder_target_tokens"][:, :-1]
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
    reserved = [_length_of(prompt_length, int(example.row)) for example in examples]
    needed = [
        (length + len(e.inputs), len(e.targets))
        for length, e in zip(reserved, examples, strict=True)
    ]
    for example, need in zip(examples, needed, strict=True):
        if 0 in need or 0 in example.inputs or 0 in example.targets:
            raise ValueError(
                f"Cannot pack an example of bank row {example.row} ({len(example.inputs)} input "
                f"and {len(example.targets)} target tokens): its inputs or targets are empty or "
                "contain id 0, which is padding. Correct or remove the example."
            )
    rows = packing.best_fit(np.array(needed), shape)
    batch = _empty(len(rows), *shape)
    for side, length in (("encoder", shape[0]), ("decoder", shape[1])):
        for name in ("segment_ids", "positions"):
            batch[f"{side}_{name}"] = np.zeros((len(rows), length), np.int32)
    for number, members in enumerate(rows):
        starts = (0, 0)
        for segment, index in enumerate(members, start=1):
            _write(batch, number, examples[index], reserved[index], starts)
            sides = zip(("encoder", "decoder"), starts, needed[index], strict=True)
            for side, first, count in sides:
                batch[f"{side}_segment_ids"][number, first : first + count] = segment
                batch[f"{side}_positions"][number, first : first + count] = np.arange(count)
            starts = (starts[0] + needed[index][0], starts[1] + needed[index][1])
    return batch


def _length_of(prompt_length: PromptLength, row: int) -> int:
    return int(np.ravel(prompt_length)[row if np.ndim(prompt_length) else 0])


def _empty(rows: int, encoder: int, decoder: int) -> Batch:
    names = {
        "encoder": ("input_tokens", "prompt_slots", "task_ids"),
        "decoder": ("input_tokens", "target_tokens", "loss_weights", "task_ids"),
    }
    length = {"encoder": encoder, "decoder": decoder}
    return {
        f"{side}_{name}": np.zeros((rows, length[side]), np.int32)
        for side, features in names.items()
        for name in features
    }


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


def _write(
    batch: Batch, number: int, example: Example, prompt_length: int, starts: tuple[int, int]
) -> None:
    """Writes an example into a row, starting at the encoder and decoder positions `starts`."""
    first, text = starts[0], starts[0] + prompt_length
    end = text + len(example.inputs)
    batch["encoder_prompt_slots"][number, first:text] = np.arange(1, prompt_length + 1)
    batch["encoder_input_tokens"][number, text:end] = example.inputs
    batch["encoder_task_ids"][number, first:end] = example.row
    first, end = starts[1], starts[1] + len(example.targets)
    if first < end:
        batch["decoder_target_tokens"][number, first:end] = example.targets
        batch["decoder_input_tokens"][number, first + 1 : end] = example.targets[:-1]
        batch["decoder_loss_weights"][number, first:end] = 1
        batch["decoder_task_ids"][number, first:end] = example.row

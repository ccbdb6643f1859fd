"""Different kinds of batches of the same ragged examples, and the FLOPs that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.ragged_mix import TARGET_LIMIT, TEXT_LIMIT
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.batching import bucketing
from mpt_jax.batching.collate import Batch, Example, packed, unpacked

MULTIPLE = 32  # text lengths of buckets are multiples of this


def longest_unsorted(examples: Sequence[Example], prompt_length: int, size: int) -> list[Batch]:
    """Dynamic padding: batches of `size` in arrival order, each as long as its longest text."""
    parts = (examples[at : at + size] for at in range(0, len(examples), size))
    return [_as_long_as_the_longest(part, prompt_length) for part in parts]


def longest_sorted(examples: Sequence[Example], prompt_length: int, size: int) -> list[Batch]:
    """Dynamic padding after sorting by length within 50 batches (or all, if fewer), like
    transformers' `group_by_length`."""
    order = bucketing.sorted_batches(_lengths(examples), size, window=50)
    return [_as_long_as_the_longest([examples[i] for i in part], prompt_length) for part in order]


def bucketed(examples: Sequence[Example], prompt_length: int, size: int) -> list[Batch]:
    """Ours: sorted within 16 batches, and trimmed to multiples of 32 tokens."""
    limits = {"inputs": TEXT_LIMIT, "targets": TARGET_LIMIT}
    lengths = {"inputs": range(MULTIPLE, TEXT_LIMIT, MULTIPLE)}
    buckets = bucketing.of_settings(lengths, prompt_length, limits)
    order = bucketing.sorted_batches(_lengths(examples), size)
    batches = (_full([examples[i] for i in part], prompt_length) for part in order)
    return [buckets.trim(batch) for batch in batches]


def padded(examples: Sequence[Example], prompt_length: int, size: int) -> list[Batch]:
    """Every row as long as the limits."""
    parts = (examples[at : at + size] for at in range(0, len(examples), size))
    return [_full(part, prompt_length) for part in parts]


def packed_rows(times: float) -> Callable[[Sequence[Example], int, int], list[Batch]]:
    """Ours: rows of `times` the limits, packed by best fit over all examples. A batch has as many
    rows as hold `size` examples on average. The last batch is padded with empty rows, so that all
    batches have the same shape."""

    def make(examples: Sequence[Example], prompt_length: int, size: int) -> list[Batch]:
        lengths = {
            "inputs": round(times * (prompt_length + TEXT_LIMIT)),
            "targets": round(times * TARGET_LIMIT),
        }
        whole = packed(examples, prompt_length, lengths)
        total = len(whole["encoder_input_tokens"])
        rows = max(1, round(size * total / len(examples)))
        missing = -total % rows
        filled = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in whole.items()}
        steps = range(0, total + missing, rows)
        return [{name: x[at : at + rows] for name, x in filled.items()} for at in steps]

    return make


KINDS: dict[str, Callable[[Sequence[Example], int, int], list[Batch]]] = {
    "unsorted": longest_unsorted,
    "sorted": longest_sorted,
    "buckets": bucketed,
    "packed_1x": packed_rows(1),
    "packed_2x": packed_rows(2),
    "padded": padded,
}


def positions(batches: Sequence[Batch]) -> int:
    """Returns the number of computed encoder positions, B x T summed over batches."""
    return sum(batch["encoder_input_tokens"].size for batch in batches)


def needed_flops(config: T5Config, examples: Sequence[Example], prompt_length: int) -> float:
    """Returns the operations that a training step needs for these examples without padding: 4 for
    every weight and token (2 forward, 2 for the gradient of the input; frozen weights have no
    gradient), and 12 for every pair of positions, layer and column of attention."""
    width, heads = config.emb_dim, config.num_heads * config.head_dim
    feed_forward = width * config.mlp_dim * (len(config.mlp_activations) + 1)
    attention = 4 * width * heads
    encoder = config.num_encoder_layers * (attention + feed_forward)
    keys_and_values = config.num_decoder_layers * 2 * width * heads
    others = attention + 2 * width * heads + feed_forward
    decoder = config.num_decoder_layers * others + width * config.vocab_size
    total = 0.0
    for example in examples:
        inputs, targets = prompt_length + len(example.inputs), len(example.targets)
        total += 4 * (inputs * (encoder + keys_and_values) + targets * decoder)
        pairs = config.num_encoder_layers * inputs**2
        pairs += config.num_decoder_layers * targets * (targets + inputs)
        total += 12 * heads * pairs
    return total


def _lengths(examples: Sequence[Example]) -> np.ndarray:
    return np.array([len(example.inputs) for example in examples])


def _full(examples: Sequence[Example], prompt_length: int) -> Batch:
    return unpacked(examples, prompt_length, TEXT_LIMIT, TARGET_LIMIT)


def _as_long_as_the_longest(examples: Sequence[Example], prompt_length: int) -> Batch:
    text = max(len(example.inputs) for example in examples)
    return unpacked(examples, prompt_length, text, max(len(e.targets) for e in examples))

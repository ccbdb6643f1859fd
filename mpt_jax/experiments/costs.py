"""Operations of training, counted from a run record: comparable between methods and machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mpt_jax.core import schema


class Architecture(msgspec.Struct):
    """The schema of a backbone's configuration in a run record, with only the fields that
    operations depend on."""

    vocab_size: schema.Count
    emb_dim: schema.Count
    num_heads: schema.Count
    head_dim: schema.Count
    mlp_dim: schema.Count
    num_encoder_layers: schema.Count
    num_decoder_layers: schema.Count
    mlp_activations: list[str]


class Lengths(msgspec.Struct):
    """The schema of the maximum lengths in a run record."""

    inputs: schema.Count
    targets: schema.Count


def training_operations(record: Mapping[str, Any]) -> float:
    """Returns the operations of the training steps of a target job, 2 for a multiply-add.

    Counts the matrix products of T5 and its attention, for examples of the maximum length: a batch
    that is trimmed to its texts takes fewer. Frozen weights need no product for their gradient, so
    a step takes two forward passes' worth of products with weights, and three if most parameters
    are trainable. Not counted: prompts, the optimizer and teachers; a packed row counts as one
    example.

    Args:
        record: A line of run.jsonl (`results.read_record`). Returns 0 if it lacks the lengths, as
            lines of earlier versions and of jobs on images do.

    Raises:
        ValueError: the lengths or the backbone's configuration are damaged.
    """
    lengths = record.get("task_feature_lengths")
    if not lengths or not record.get("backbone_config"):
        return 0.0
    schema.check(lengths, Lengths, "The task_feature_lengths of run.jsonl")
    schema.check(record["backbone_config"], Architecture, "The backbone_config of run.jsonl")
    trained = record["trainable_parameters"] > record["parameters"] / 2  # not so with BitFit
    prompted = lengths["inputs"] + (record.get("prompt_length") or 0)
    weights, attention = forward_products(record["backbone_config"], prompted, lengths["targets"])
    per_example = 2 * ((3 if trained else 2) * weights + 3 * attention)
    return float(per_example * record["batch_size"] * record["total_steps"])


def forward_products(
    config: Mapping[str, Any], encoder_length: int, decoder_length: int
) -> tuple[int, int]:
    """Returns the multiply-adds of a forward pass of one example: of products with weights, and of
    attention (queries with keys, probabilities with values).

    Args:
        config: The backbone's configuration, as artifacts and run records hold it.
        encoder_length: T, the positions that the encoder reads, prompt included.
        decoder_length: L, the positions of the decoder.
    """
    width, heads = config["emb_dim"], config["num_heads"] * config["head_dim"]
    feed_forward = (len(config["mlp_activations"]) + 1) * width * config["mlp_dim"]
    projection, t, l = width * heads, encoder_length, decoder_length  # noqa: E741
    encoder, decoder = config["num_encoder_layers"], config["num_decoder_layers"]
    weights = encoder * t * (4 * projection + feed_forward)
    weights += decoder * (l * (6 * projection + feed_forward) + t * 2 * projection)
    weights += l * width * config["vocab_size"]
    attention = 2 * heads * (encoder * t * t + decoder * (l * l + l * t))
    return weights, attention

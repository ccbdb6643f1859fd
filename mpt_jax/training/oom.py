"""What to change when a step does not fit a device's memory, with the sizes that are known."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


class OutOfMemory(RuntimeError):
    """A step did not fit; the message says what takes room and what makes it less."""


@contextlib.contextmanager
def explain_oom(trainer: Any, batch: Mapping[str, Any]) -> Iterator[None]:
    """Inside, an error that tells of memory becomes one that says what to change.

    Args:
        trainer: the `Trainer` whose steps run; untyped because its module imports this one.
        batch: this process's rows, of the largest step so far.

    Raises:
        OutOfMemory: the device, or the compiler for it, ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(describe(trainer, batch, str(error).partition("\n")[0])) from error


def describe(trainer: Any, batch: Mapping[str, Any], said: str) -> str:
    """What takes a device's memory, and what each setting that matters would make of it.

    Args:
        trainer: the `Trainer` whose step did not fit.
        batch: this process's rows.
        said: the error's first line.
    """
    config, mesh = trainer.model.module.config, trainer.partitioner.mesh
    shards, model_axis = math.prod(mesh.devices.shape[:-1]), mesh.devices.shape[-1]
    rows = len(batch["encoder_input_tokens"]) * jax.process_count() // shards
    encoder, decoder = (
        np.shape(batch[f"{side}_tokens"])[1] for side in ("encoder_input", "decoder_target")
    )
    parts = trainer.num_microbatches
    layers = encoder * config.num_encoder_layers + decoder * config.num_decoder_layers
    row = layers * config.emb_dim * np.dtype(config.dtype).itemsize
    at_a_time = max(rows // parts, 1)
    backbone, learned = _bytes(trainer.state.frozen), _bytes(trainer.state.trainable)
    moments = _bytes(trainer.state.opt_state)
    lines = [
        f"A training step does not fit the memory of a device ({said}). Each device holds "
        f"{_size(backbone)} of backbone, {_size(learned + moments)} of trainable parameters and "
        "their moments, "
        f"and what a step makes of {at_a_time} rows at a time, of {encoder} encoder and "
        f"{decoder} decoder positions each: {_size(at_a_time * row)} for the inputs of its layers "
        "alone, several times that in all. In the order to try:",
    ]
    # Parts are of one size, so at most half as many rows at a time may take more than twice them.
    more = next((count for count in range(2 * parts, rows + 1) if rows % count == 0), None)
    if more is not None:
        lines.append(
            f"trainer.Trainer.num_microbatches = {more} takes {rows // more} rows at a time "
            f"({_size(rows // more * row)}), with the same numbers to rounding."
        )
    if getattr(config, "remat", "full") != "full":
        lines.append(
            "config.t5_config.remat = 'full' keeps little more than those inputs, for about a "
            "third more work."
        )
    lines.append(
        f"partitioning.PjitPartitioner.num_partitions = {2 * model_axis} splits the backbone over "
        f"twice as many devices ({_size(backbone / 2)} each), where there are as many."
    )
    lines += _smaller_steps(rows, rows * shards, trainer.model.runs.num_groups)
    return "\n  * ".join(lines) + "\n`mpt-jax plan` compiles a step for TPUs that are not here."


def _smaller_steps(rows: int, all_rows: int, groups: int) -> list[str]:
    """What makes a step of `rows` on each device smaller, of groups that keep an example each."""
    lines = []
    if rows >= 2 and all_rows >= 2 * groups:
        lines.append(
            f"BATCH_SIZE, halved, takes {rows // 2} rows in a step of each device; that changes "
            "what is learned."
        )
    lines.append("A lower limit in TASK_FEATURE_LENGTHS changes what is learned of longer texts.")
    if groups > 1 and rows >= 2:
        lines.append(
            f"{groups} runs share this step: two jobs of half as many take {rows // 2} rows each, "
            "and learn the same."
        )
    return lines


def larger_batch(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with more positions; batches are cut to a few lengths. An empty one has none."""
    return first if _positions(first) > _positions(second) else second


def _positions(batch: Mapping[str, Any]) -> int:
    names = ("encoder_input_tokens", "decoder_target_tokens")
    return sum(np.size(batch[name]) for name in names if name in batch)


def _bytes(tree: Any) -> int:
    """What a tree takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(count: int | float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

"""Loss terms and metrics of target tokens, computed from logits over the vocabulary.

Logits [B, L, V] would be the largest arrays of a step with long targets. Targets of more than
`CHUNK` positions are therefore computed a chunk at a time, and the backward pass computes the
logits of each chunk again instead of storing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Batch, Float, Int
from mpt_jax.models.objective import Objective

# The largest number of positions whose logits exist at the same time. Targets of label tasks fit
# into one chunk, which is not recomputed. B x 16 rows keep products with the head compute-bound.
CHUNK = 16

# Computes logits [B, L, V], float32, from final decoder states [B, L, H].
Head = Callable[[Any], Any]
# Values by name of term or metric, at each target position.
TokenValues = dict[str, Float[Array, "B L"]]


def token_values(
    objective: Objective,
    batch: Batch,
    head: Head,
    states: Float[Array, "B L H"],
    teacher_states: Float[Array, "B L H"] | None = None,
) -> TokenValues:
    """Returns the loss terms and metrics that read logits, float32, at each target position.

    Args:
        objective: the objective that defines the terms.
        batch: the batch contract's features. Its `teacher_logits`, if present, replace
            `teacher_states`.
        head: computes the logits of student and teachers from their states.
        states: the final decoder states of the student.
        teacher_states: the final decoder states of the teachers, for the KL.

    Returns:
        The terms `cross_entropy`, `z_loss` and, if the objective has it, `kl`; the metrics `loss`
        (cross entropy without label smoothing) and `token_accuracy`, which have no gradient.
    """
    distillation = objective.distillation
    teacher, is_cached = None, "teacher_logits" in batch
    if distillation is not None and distillation.logits:
        teacher = batch["teacher_logits"] if is_cached else teacher_states
        assert teacher is not None, "the KL needs outputs of the teachers"
        teacher = _padded(teacher)

    def values(first: Array | int, states: Array, targets: Array) -> TokenValues:
        logits = head(states)
        found = values_of_logits(logits, targets, objective.label_smoothing)
        if distillation is not None and teacher is not None:
            # A slice and not an input of the loop, which would copy logits of the batch.
            part = _slice(teacher, first, states.shape[1])
            part = jax.lax.stop_gradient(part if is_cached else head(part))
            found["kl"] = kl_divergence(part, logits, distillation.temperature)
        return found

    return _by_chunk(values, states, batch["decoder_target_tokens"])


def values_of_logits(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], label_smoothing: float = 0.0
) -> TokenValues:
    """Returns the values of `token_values` that do not depend on teachers.

    With label smoothing s, the target keeps a mass of 1 - s and the other V - 1 ids share s. The
    entropy of this distribution is subtracted, so a perfect prediction costs zero, as in T5X.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    plain = losses = log_z - picked
    if label_smoothing:
        others = logits.shape[-1] - 1
        keep, share = 1.0 - label_smoothing, label_smoothing / others
        to_others = others * log_z - (logits.sum(-1) - picked)
        entropy = -(keep * jnp.log(keep) + others * share * jnp.log(share))
        losses = keep * losses + share * to_others - entropy
    correct = jnp.argmax(jax.lax.stop_gradient(logits), -1) == targets
    return {
        "cross_entropy": losses,
        "z_loss": jnp.square(log_z),
        "loss": jax.lax.stop_gradient(plain),
        "token_accuracy": correct.astype(jnp.float32),
    }


def kl_divergence(
    teacher_logits: Float[Array, "B L V"], student_logits: Float[Array, "B L V"], temperature: float
) -> Float[Array, "B L"]:
    """Returns KL(teacher || student) over the vocabulary at each position, in nats, float32."""
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def _by_chunk(
    values: Callable[[Array | int, Array, Array], TokenValues],
    states: Float[Array, "B L H"],
    targets: Int[Array, "B L"],
) -> TokenValues:
    """Returns `values(first position, states, targets)` of all positions, a chunk at a time."""
    length = states.shape[1]
    chunks, size = _chunks(length)
    if chunks == 1:
        return values(0, states, targets)

    def split(x: Array) -> Array:  # the batch axis stays as it is, and may be sharded
        parts = _padded(x).reshape(x.shape[0], chunks, size, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]

    # Inside a scan the compiler cannot merge the two computations of a chunk anyway.
    recomputed = jax.checkpoint(values, prevent_cse=False)
    inputs = (jnp.arange(chunks) * size, split(states), split(targets))
    _, found = jax.lax.scan(lambda _, chunk: (None, recomputed(*chunk)), None, inputs)
    return jax.tree.map(join, found)


def _chunks(length: int) -> tuple[int, int]:
    """Returns the number of chunks of targets, and the positions of each, which is at most CHUNK.
    The last chunk may need padding."""
    chunks = math.ceil(length / CHUNK)
    return chunks, math.ceil(length / chunks)


def _padded(x: Array) -> Array:
    """Returns `x` [B, L, ...] with zeros after the targets, so that all chunks are full."""
    chunks, size = _chunks(x.shape[1])
    return jnp.pad(x, [(0, 0), (0, chunks * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _slice(x: Array, first: Array | int, size: int) -> Array:
    """Returns `size` positions of `x` [B, L, ...]."""
    if x.dtype == jnp.bfloat16:  # XLA for CPUs would first convert all of it to float32
        return _slice(x.view(jnp.uint16), first, size).view(jnp.bfloat16)
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

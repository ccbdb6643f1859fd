"""Loss terms. Each is a (sum [G], weight [G]) pair, one entry for each group (independent run).

Sums and weights are accumulated apart over microbatches and hosts and divided once, so a mean is
never taken of means. Weights depend on the batch alone, never on parameters: `weights` computes
them without a forward pass. The total is

    sum over groups g of  CE_g + z_g + lambda (KL_g + hidden_g)        MPT paper, equation (5)

Groups share no parameters, so adding them changes no gradient of any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import TEACHER_FEATURES, encoder_positions
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int
from mpt_jax.models.objective import Distillation, Objective  # gin files name them here

Sums = dict[str, Float[Array, " G"]]


@dataclasses.dataclass(frozen=True)
class GroupIds:
    """Which group each position of a batch belongs to.

    Attributes:
        num_groups: G.
        encoder: [B, T] group numbers.
        decoder: [B, L] group numbers.
    """

    num_groups: int
    encoder: Int[Array, "B T"]
    decoder: Int[Array, "B L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureWeights:
    """What the prompts of a batch were mixed from.

    Attributes:
        weights: [B, E, J] of each candidate, E examples to a row.
        task_ids: [B, E] the bank row of each example.
        present: [B, E] whether there is one.
    """

    weights: Float[Array, "B E J"]
    task_ids: Int[Array, "B E"]
    present: Bool[Array, "B E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What a forward pass gives the losses.

    Attributes:
        logits: [B, L, V] float32; empty where they are of teachers and no term reads them.
        encoder_hidden: the chosen encoder states, each [B, T, H]; empty when not distilled.
        decoder_hidden: the chosen decoder states, each [B, L, H].
        prompts: the composed prompts [B, P, H]; of a packed batch the prompt's row at each
            position [B, T, H], anything where there is none.
        mixed: of a method that mixes candidates, what it mixed each prompt from.
    """

    logits: Float[Array, "B L V"]
    encoder_hidden: tuple[Array, ...] = ()
    decoder_hidden: tuple[Array, ...] = ()
    prompts: Float[Array, "B _ H"] | None = None
    mixed: MixtureWeights | None = None


def teacher_features(distillation: Distillation, teacher: ModelOutputs) -> dict[str, Array]:
    """What the logits and the hidden terms read of teachers, as features of a batch.

    Returns:
        `teacher_logits` [B, L, V], less the largest of each position: no softmax sees that, and
        what is likely, and matters, then loses little in a shorter dtype. `teacher_encoded`
        [B, T, states, H] and `teacher_decoded` [B, L, states, H], the chosen states of each stack.
        None of a term that is off.
    """
    found: dict[str, Array] = {}
    if distillation.logits:
        found["teacher_logits"] = teacher.logits - teacher.logits.max(-1, keepdims=True)
    if distillation.hidden:
        found["teacher_encoded"] = jnp.stack(teacher.encoder_hidden, axis=2)
        found["teacher_decoded"] = jnp.stack(teacher.decoder_hidden, axis=2)
    return found


def teacher_outputs_from_batch(batch: Batch) -> ModelOutputs | None:
    """The teachers' outputs that a batch holds as `teacher_features`; None where it holds none."""
    if not TEACHER_FEATURES.keys() & batch.keys():
        return None
    states = lambda x: () if x is None else tuple(x[:, :, i] for i in range(x.shape[2]))  # noqa: E731
    return ModelOutputs(
        batch.get("teacher_logits", jnp.zeros((0, 0, 0))),
        states(batch.get("teacher_encoded")),
        states(batch.get("teacher_decoded")),
    )


def group_sum(values: Array, groups: Int[Array, "..."], num_groups: int) -> Float[Array, " G"]:
    """Sums values [...] by group number [...] into [G]."""
    if num_groups == 1:
        return values.sum()[None]
    return jax.ops.segment_sum(values.ravel(), groups.ravel(), num_groups)


def token_losses(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], label_smoothing: float = 0.0
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Cross entropy and squared log-partition of each target token, float32.

    With label smoothing the target keeps 1 - s and the other V - 1 ids share s; the entropy of
    that distribution is subtracted, so a perfect prediction costs zero, as in T5X.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = log_z - picked
    if label_smoothing:
        others = logits.shape[-1] - 1
        keep, share = 1.0 - label_smoothing, label_smoothing / others
        to_others = others * log_z - (logits.sum(-1) - picked)
        entropy = -(keep * jnp.log(keep) + others * share * jnp.log(share))
        losses = keep * losses + share * to_others - entropy
    return losses, jnp.square(log_z)


def kl_divergence(
    teacher_logits: Float[Array, "B L V"], student_logits: Float[Array, "B L V"], temperature: float
) -> Float[Array, "B L"]:
    """KL(teacher || student) of each position over the whole vocabulary, in nats, float32."""
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def term_sums(
    objective: Objective,
    batch: Batch,
    groups: GroupIds,
    student: ModelOutputs,
    teacher: ModelOutputs | None,
) -> Sums:
    """The sum [G] of every term of the objective over a batch."""
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    losses, z_losses = token_losses(
        student.logits, batch["decoder_target_tokens"], objective.label_smoothing
    )
    by_token = lambda x: group_sum(x * weights, groups.decoder, groups.num_groups)  # noqa: E731
    found = {"cross_entropy": by_token(losses)}
    if objective.z_loss:
        found["z_loss"] = by_token(z_losses)
    distil = objective.distillation
    if distil is None:
        return found
    if teacher is None:
        raise ValueError("An objective with distillation needs the teachers' outputs.")
    teacher = _constant(teacher)
    if distil.logits:
        found["kl"] = by_token(kl_divergence(teacher.logits, student.logits, distil.temperature))
    if distil.hidden:
        encoder = _squared_distance(teacher.encoder_hidden, student.encoder_hidden)
        positions = encoder_positions(batch, distil.include_prompt_positions)
        found["hidden_encoder"] = group_sum(encoder * positions, groups.encoder, groups.num_groups)
        found["hidden_decoder"] = by_token(
            _squared_distance(teacher.decoder_hidden, student.decoder_hidden)
        )
    if distil.prompt_distance:
        assert student.prompts is not None and teacher.prompts is not None
        distance = jnp.square(teacher.prompts - student.prompts).sum(-1)
        reach = distance.shape[1]  # the prompts of an unpacked batch are its first positions
        slots = (batch["encoder_prompt_slots"][:, :reach] > 0).astype(jnp.float32)
        where = groups.encoder[:, :reach]
        found["prompt_distance"] = group_sum(distance * slots, where, groups.num_groups)
    return found


def normalizers(
    objective: Objective, batch: Batch, groups: GroupIds, width: int, num_layers: tuple[int, int]
) -> Sums:
    """The weight [G] of every term, a function of the batch alone.

    Args:
        objective: which terms there are.
        batch: the batch contract's features.
        groups: the group of every position.
        width: H.
        num_layers: how many encoder and decoder states the hidden term compares.
    """
    tokens = batch["decoder_loss_weights"].astype(jnp.float32)
    slots = batch["encoder_prompt_slots"]
    num_tokens = group_sum(tokens, groups.decoder, groups.num_groups)
    examples = group_sum((slots == 1).astype(jnp.float32), groups.encoder, groups.num_groups)
    found: Sums = {}
    for term in objective.coefficients():
        if term == "hidden_encoder" or term == "hidden_decoder":
            assert objective.distillation is not None
            encoder = term == "hidden_encoder"
            if objective.distillation.reduce == "sum":
                found[term] = examples * num_layers[0 if encoder else 1]
                continue
            count = num_tokens
            if encoder:
                positions = encoder_positions(
                    batch, objective.distillation.include_prompt_positions
                )
                count = group_sum(positions, groups.encoder, groups.num_groups)
            found[term] = count * width * num_layers[0 if encoder else 1]
        elif term == "prompt_distance":
            assert objective.distillation is not None
            if objective.distillation.reduce == "sum":
                found[term] = examples
                continue
            positions = (slots > 0).astype(jnp.float32)
            found[term] = group_sum(positions, groups.encoder, groups.num_groups) * width
        else:
            found[term] = num_tokens
    return found


def total_loss(objective: Objective, sums: Sums, weights: Sums) -> tuple[Array, Sums]:
    """Divides once, weighs, adds.

    Returns:
        The total over terms and groups, and each term's mean [G], unweighted. A group that a
        batch does not contain contributes zero.
    """
    means = {
        name: jnp.where(weights[name] > 0, sums[name] / jnp.maximum(weights[name], 1e-30), 0.0)
        for name in sums
    }
    factors: Mapping[str, float] = objective.coefficients()
    total = sum((factors[name] * means[name].sum() for name in means), jnp.float32(0))
    return total, means


def _constant(outputs: ModelOutputs) -> ModelOutputs:
    return jax.tree.map(jax.lax.stop_gradient, outputs)


def _squared_distance(first: tuple[Array, ...], second: tuple[Array, ...]) -> Array:
    """Squared distance over features, added over layers: [B, T]."""
    return sum(
        jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(-1)
        for a, b in zip(first, second, strict=True)
    )  # pyright: ignore[reportReturnType]

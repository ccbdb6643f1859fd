"""Loss terms. Each is a (sum [G], normalizer [G]) pair with one entry per group.

A step has one normalizer per term and group, for its whole batch over all hosts. The sums of its
microbatches are divided by it, so they add up to the mean over the batch, and means are never
averaged. Normalizers depend only on the batch, never on parameters: `normalizers` computes them
without a forward pass. The total over groups g is

    sum_g  CE_g + c z_g + lambda (s KL_g + encoder_g + decoder_g + prompt_g)

    CE_g        `cross_entropy`     cross entropy of the targets
    z_g         `z_loss`            squared log-partition
    KL_g        `kl`                KL(teacher || student) of the output distributions
    encoder_g   `hidden_encoder`    squared distance of encoder hidden states
    decoder_g   `hidden_decoder`    squared distance of decoder hidden states
    prompt_g    `prompt_distance`   squared distance of prompts

with c = Objective.z_loss, lambda = Distillation.weight, and s = temperature^2 if t2_scale, else 1.
Disabled terms are omitted. Equation (5) of the MPT paper has CE, KL and the hidden-state terms.

Groups share no parameters, so summing over groups changes no group's gradient. `token_losses`
computes the terms that read logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import TEACHER_FEATURES, encoder_mask
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int
from mpt_jax.models.objective import Distillation, HasTerms, Objective  # gin files name them here
from mpt_jax.models.token_losses import Head, TokenValues

Sums = dict[str, Float[Array, " G"]]


@dataclasses.dataclass(frozen=True)
class GroupIds:
    """The group of each position of a batch.

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
    """Weights of the candidates that the prompts of a batch are mixed from.

    Attributes:
        weights: [B, E, J] weight of each candidate, with E examples per row.
        task_ids: [B, E] bank row of each example.
        present: [B, E] whether the example exists.
    """

    weights: Float[Array, "B E J"]
    task_ids: Int[Array, "B E"]
    present: Bool[Array, "B E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a forward pass that the losses use.

    Attributes:
        states: final decoder states [B, L, H], from which the head of the model computes logits;
            None for the teacher outputs in a batch, which include the logits if they are used.
        encoder_hidden: selected encoder states, each [B, T, H]; empty unless they are distilled.
        decoder_hidden: selected decoder states, each [B, L, H]; empty unless they are distilled.
        prompts: the composed prompts [B, P, H]; in a packed batch, the prompt row at each slot
            [B, T, H], with arbitrary values at positions that are not slots.
        mixed: mixture weights, for a method that mixes candidates.
    """

    states: Float[Array, "B L H"] | None = None
    encoder_hidden: tuple[Array, ...] = ()
    decoder_hidden: tuple[Array, ...] = ()
    prompts: Float[Array, "B _ H"] | None = None
    mixed: MixtureWeights | None = None


def teacher_features(
    distillation: Distillation, teacher: ModelOutputs, head: Head
) -> dict[str, Array]:
    """Returns the teacher outputs that the KL and hidden-state terms use, as batch features.

    Returns:
        `teacher_logits` [B, L, V], minus the maximum at each position: the softmax is the same,
        and the logits of likely tokens lose little precision in a narrower dtype.
        `teacher_encoded` [B, T, states, H] and `teacher_decoded` [B, L, states, H], the selected
        states of each stack. Disabled terms have no features.
    """
    features: dict[str, Array] = {}
    if distillation.logits:
        logits = head(teacher.states)
        features["teacher_logits"] = logits - logits.max(-1, keepdims=True)
    if distillation.hidden and distillation.encoder_weight:
        features["teacher_encoded"] = jnp.stack(teacher.encoder_hidden, axis=2)
    if distillation.hidden and distillation.decoder_weight:
        features["teacher_decoded"] = jnp.stack(teacher.decoder_hidden, axis=2)
    return features


def teacher_outputs_from_batch(batch: Batch) -> ModelOutputs | None:
    """Returns the teacher outputs in a batch (`teacher_features`), or None if there are none."""
    if not TEACHER_FEATURES.keys() & batch.keys():
        return None
    states = lambda x: () if x is None else tuple(x[:, :, i] for i in range(x.shape[2]))  # noqa: E731
    return ModelOutputs(
        None, states(batch.get("teacher_encoded")), states(batch.get("teacher_decoded"))
    )


def group_sum(values: Array, groups: Int[Array, "..."], num_groups: int) -> Float[Array, " G"]:
    """Sums values [...] by group number [...] into [G]."""
    if num_groups == 1:
        return values.sum()[None]
    return jax.ops.segment_sum(values.ravel(), groups.ravel(), num_groups)


def term_sums(
    objective: Objective,
    batch: Batch,
    groups: GroupIds,
    tokens: TokenValues,
    student: ModelOutputs,
    teacher: ModelOutputs | None,
) -> Sums:
    """Returns the sum [G] of every term of the objective over a batch.

    Args:
        objective: the objective that defines the terms.
        batch: the batch contract's features.
        groups: the group of every position.
        tokens: the terms that read logits, from `token_values`.
        student: the outputs of the student.
        teacher: the outputs of the teachers; None without distillation.

    Raises:
        ValueError: the objective distills, and `teacher` is None.
    """
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    by_token = lambda x: group_sum(x * weights, groups.decoder, groups.num_groups)  # noqa: E731
    terms = [term for term in objective.coefficients() if term in ("cross_entropy", "z_loss", "kl")]
    sums = {term: by_token(tokens[term]) for term in terms}
    distillation = objective.distillation
    if distillation is None:
        return sums
    if teacher is None:
        raise ValueError(
            "Objective.distillation is set, but no teacher outputs were passed. Pass them as "
            "`teacher`, or leave Objective.distillation unset."
        )
    teacher = _stop_gradients(teacher)
    if distillation.hidden and distillation.encoder_weight:
        encoder = _squared_distance(teacher.encoder_hidden, student.encoder_hidden)
        mask = _distilled_positions(distillation, batch)
        sums["hidden_encoder"] = group_sum(encoder * mask, groups.encoder, groups.num_groups)
    if distillation.hidden and distillation.decoder_weight:
        sums["hidden_decoder"] = by_token(
            _squared_distance(teacher.decoder_hidden, student.decoder_hidden)
        )
    if distillation.prompt_distance:
        assert student.prompts is not None and teacher.prompts is not None
        distance = jnp.square(teacher.prompts - student.prompts).sum(-1)
        length = distance.shape[1]  # in an unpacked batch, prompts are the first positions
        slots = (batch["encoder_prompt_slots"][:, :length] > 0).astype(jnp.float32)
        slot_groups = groups.encoder[:, :length]
        sums["prompt_distance"] = group_sum(distance * slots, slot_groups, groups.num_groups)
    return sums


def normalizers(
    objective: Objective, batch: Batch, groups: GroupIds, width: int, num_states: tuple[int, int]
) -> Sums:
    """Returns the normalizer [G] of every term, which depends only on the batch.

    Args:
        objective: the objective that defines the terms.
        batch: the batch contract's features.
        groups: the group of every position.
        width: H, the model width.
        num_states: the number of encoder states and the number of decoder states that the
            hidden-state terms compare.
    """
    count = lambda real, ids: group_sum(real.astype(jnp.float32), ids, groups.num_groups)  # noqa: E731
    tokens = count(batch["decoder_loss_weights"], groups.decoder)
    by_term = {"cross_entropy": tokens, "z_loss": tokens, "kl": tokens}
    if (distillation := objective.distillation) is not None:
        slots = batch["encoder_prompt_slots"]
        examples = count(slots == 1, groups.encoder)
        mask = _distilled_positions(distillation, batch)
        reduced = lambda n: examples if distillation.reduce == "sum" else n * width  # noqa: E731
        by_term |= {
            "hidden_encoder": reduced(count(mask, groups.encoder)) * num_states[0],
            "hidden_decoder": reduced(tokens) * num_states[1],
            "prompt_distance": reduced(count(slots > 0, groups.encoder)),
        }
    return {term: by_term[term] for term in objective.coefficients()}


def total_loss(
    objective: HasTerms,
    sums: Sums,
    normalizers: Sums,
    coefficients: Mapping[str, Array] | None = None,
) -> tuple[Array, Sums]:
    """Returns the total loss: the sum of each term's mean times its coefficient.

    Args:
        objective: the objective that defines the terms and their coefficients.
        sums: the sum [G] of every term, from `term_sums`.
        normalizers: the normalizer [G] of every term, from `normalizers`.
        coefficients: other coefficients of the terms.

    Returns:
        The total over terms and groups, and each term's mean [G] without its coefficient. A group
        without examples in the batch contributes zero.
    """
    means = {
        name: jnp.where(
            normalizers[name] > 0, sums[name] / jnp.maximum(normalizers[name], 1e-30), 0.0
        )
        for name in sums
    }
    used = objective.coefficients() if coefficients is None else coefficients
    total = sum((used[name] * means[name].sum() for name in means), jnp.float32(0))
    return total, means


def _distilled_positions(distillation: Distillation, batch: Batch) -> Bool[Array, "B T"]:
    """Returns whether the encoder state at each position counts in the hidden-state term."""
    if distillation.include_text_positions:
        return encoder_mask(batch, distillation.include_prompt_positions)
    return batch["encoder_prompt_slots"] > 0


def _stop_gradients(outputs: ModelOutputs) -> ModelOutputs:
    return jax.tree.map(jax.lax.stop_gradient, outputs)


def _squared_distance(first: tuple[Array, ...], second: tuple[Array, ...]) -> Array:
    """Returns the squared distance at each position, summed over features and layers."""
    return sum(
        jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(-1)
        for a, b in zip(first, second, strict=True)
    )  # pyright: ignore[reportReturnType]

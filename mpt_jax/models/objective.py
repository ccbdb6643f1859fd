"""Configuration of the loss: the objective, and distillation from teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

_POSITIONS = ("include_prompt_positions", "include_text_positions")
_STACKS = ("encoder_weight", "decoder_weight")
# Fields that earlier versions did not have.
_LATER = ("include_text_positions", *_STACKS)


@dataclasses.dataclass(frozen=True, repr=False)
class Distillation:
    """Distillation of the student from its teachers (MPT paper, section 3.2).

    The paper does not state the temperature, the layers or the reduction, so they are settings.

    Attributes:
        weight: lambda, the coefficient of all distillation terms.
        logits: whether to use KL(teacher || student) of the output distributions.
        hidden: whether to use the squared distance between encoder and decoder hidden states of
            teacher and student.
        prompt_distance: whether to use the squared distance between the prompts of teacher and
            student, as in the paper's ablation; intended for use with `logits` and `hidden` off.
        temperature: the divisor of the logits of teacher and student; for `logits`.
        t2_scale: whether to multiply the KL by temperature squared (Hinton et al. 2015); for
            `logits`. The paper does not do this.
        hidden_layers: `'last'` (each stack's output after its final norm), `'all'`, or indices
            into (embeddings, layer 1, ..., output), averaged over layers; for `hidden`.
        include_prompt_positions, include_text_positions: whether encoder states at prompt
            positions, and those at text positions, count; for `hidden`.
        encoder_weight, decoder_weight: the coefficients of the encoder's and the decoder's hidden
            states, relative to `weight`; 0 turns one off; for `hidden`.
        reduce: for `hidden` and `prompt_distance`: `'mean'` over positions and features, or
            `'sum'` over them (a mean over examples). The KL is always a mean over target tokens.

    Raises:
        ValueError: a value is out of range, or a setting is changed whose terms are all off.
    """

    weight: float = 0.9
    logits: bool = True
    hidden: bool = True
    prompt_distance: bool = False
    temperature: float = 1.0
    t2_scale: bool = False
    hidden_layers: str | Sequence[int] = "last"
    include_prompt_positions: bool = True
    reduce: str = "mean"
    include_text_positions: bool = True
    encoder_weight: float = 1.0
    decoder_weight: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"Distillation.temperature must be positive, got {self.temperature}. Use 1 to "
                "leave the logits unscaled."
            )
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"Distillation.reduce must be 'mean' or 'sum', got {self.reduce!r}.")
        if isinstance(self.hidden_layers, str) and self.hidden_layers not in ("last", "all"):
            raise ValueError(
                f"Distillation.hidden_layers must be 'last', 'all' or a list of indices, got "
                f"{self.hidden_layers!r}."
            )
        if not (self.logits or self.hidden or self.prompt_distance):
            raise ValueError(
                "Distillation.logits, hidden and prompt_distance are all False, so distillation "
                "would do nothing. Set one of them to True, or leave Objective.distillation unset."
            )
        if not (self.include_prompt_positions or self.include_text_positions):
            raise ValueError(
                "Distillation.include_prompt_positions and include_text_positions are both False, "
                "so no encoder state would count. Set encoder_weight to 0 instead."
            )
        weights = self.encoder_weight, self.decoder_weight
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"Distillation.encoder_weight and decoder_weight are {weights[0]} and "
                f"{weights[1]}; they must not be negative, nor both 0. Correct them, or set "
                "hidden to False."
            )
        refuse_ineffective(self, ("temperature", "t2_scale"), "logits")
        refuse_ineffective(self, ("hidden_layers", *_POSITIONS, *_STACKS), "hidden")
        refuse_ineffective(self, ("reduce",), "hidden", "prompt_distance")
        refuse_ineffective(self, _POSITIONS, "encoder_weight")

    def __repr__(self) -> str:
        """Leaves out later fields at their defaults, so that fingerprints of jobs stay the same."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        ]
        return f"Distillation({', '.join(shown)})"


def refuse_ineffective(chosen: Any, settings: Sequence[str], *terms: str) -> None:
    """Raises ValueError if a setting has a non-default value but all `terms` it affects are off.

    Args:
        chosen: the dataclass with the settings and the terms.
        settings: names of settings that affect only `terms`.
        *terms: names of the fields that turn terms on.
    """
    if any(getattr(chosen, term) for term in terms):
        return
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        if field.name in settings and value != field.default:
            raise ValueError(
                f"{type(chosen).__name__}.{field.name}={value!r} would have no effect with "
                f"{' and '.join(f'{t}={getattr(chosen, t)}' for t in terms)}. Leave it at "
                f"{field.default!r}, or turn on {' or '.join(terms)}."
            )


@runtime_checkable
class HasTerms(Protocol):
    """The objective of any model, with the names of its loss terms."""

    def coefficients(self) -> dict[str, float]:
        """Returns each enabled term's coefficient in the total loss."""
        ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss to minimize.

    Attributes:
        label_smoothing: the probability moved from the target id to all other ids, in [0, 1).
        z_loss: the coefficient of the squared log-partition (T5 pretraining: 1e-4).
        distillation: the settings of distillation; None trains on the targets only. With
            distillation, the model also holds the teachers' prompts.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    distillation: Distillation | None = None

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"Objective.label_smoothing must be in [0, 1), got {self.label_smoothing}. Use 0 "
                "for no smoothing."
            )

    def coefficients(self) -> dict[str, float]:
        """Returns each enabled term's coefficient in the total loss."""
        coefficients = {"cross_entropy": 1.0}
        if self.z_loss:
            coefficients["z_loss"] = self.z_loss
        if (distillation := self.distillation) is not None:
            weight = distillation.weight
            if distillation.logits:
                scale = distillation.temperature**2 if distillation.t2_scale else 1.0
                coefficients["kl"] = weight * scale
            if distillation.hidden:
                for stack in ("encoder", "decoder"):
                    if part := getattr(distillation, f"{stack}_weight"):
                        coefficients[f"hidden_{stack}"] = weight * part
            if distillation.prompt_distance:
                coefficients["prompt_distance"] = weight
        return coefficients

"""Configuration of the loss: the objective, and distillation from teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
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
        include_prompt_positions: whether encoder states at prompt positions count; for `hidden`.
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
        self._refuse_ineffective(("temperature", "t2_scale"), "logits")
        self._refuse_ineffective(("hidden_layers", "include_prompt_positions"), "hidden")
        self._refuse_ineffective(("reduce",), "hidden", "prompt_distance")

    def _refuse_ineffective(self, settings: tuple[str, ...], *terms: str) -> None:
        """Raises ValueError if a setting has a non-default value but all `terms` it affects are
        off."""
        if any(getattr(self, term) for term in terms):
            return
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in settings and value != field.default:
                raise ValueError(
                    f"Distillation.{field.name}={value!r} would have no effect with "
                    f"{' and '.join(f'{term}=False' for term in terms)}. Leave it at "
                    f"{field.default!r}, or set {' or '.join(f'{term}=True' for term in terms)}."
                )


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
                coefficients["hidden_encoder"] = coefficients["hidden_decoder"] = weight
            if distillation.prompt_distance:
                coefficients["prompt_distance"] = weight
        return coefficients

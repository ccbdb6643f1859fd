"""Distillation of a dual encoder: settings, and the loss terms of each example.

    KL      `kl`            KL(teacher || student) of the class distributions
    image   `hidden_image`  mean squared difference of the image's normalized features
    text    `hidden_text`   the same of the texts of the task's classes, averaged over the classes

It is the recipe of MPT (arXiv 2303.02861), with features of images and texts as hidden states. The
KL compares the classes of the example's task, whichever classes compete in the cross entropy. In a
multi-label task, every class has its own distribution, and the mean of their KLs is taken.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Bool, Float, Int
from mpt_jax.models.objective import refuse_ineffective

ARTIFACTS, ZERO_SHOT = "artifacts", "zero_shot"


@dataclasses.dataclass(frozen=True)
class ClassDistillation:
    """Distillation of a dual encoder from its teachers.

    Attributes:
        weight: lambda, the coefficient of all distillation terms.
        logits: whether to use the KL of the class distributions.
        hidden: whether to use the differences of features.
        temperature: tau, the divisor of the logits of teacher and student; the KL is multiplied by
            tau squared (Hinton et al. 2015). For `logits`.
        image_weight, text_weight: the coefficients of the features of images and of texts, relative
            to `weight`; 0 turns one off; for `hidden`.
        teacher: `'artifacts'`, the plain prompts of single tasks (`Origins.teachers`), or
            `'zero_shot'`, the backbone with the templates of each task.

    Raises:
        ValueError: a value is out of range, or a setting is changed whose terms are all off.
    """

    weight: float = 0.9
    logits: bool = True
    hidden: bool = True
    temperature: float = 1.0
    image_weight: float = 1.0
    text_weight: float = 1.0
    teacher: str = ARTIFACTS

    def __post_init__(self):
        if not (self.weight > 0 and self.temperature > 0):
            raise ValueError(
                "ClassDistillation.weight and temperature must be positive, got "
                f"{self.weight} and {self.temperature}. To train without teachers, set "
                "DISTILLATION = None."
            )
        if self.teacher not in (ARTIFACTS, ZERO_SHOT):
            raise ValueError(unknown_name("DISTILL_FROM", self.teacher, (ARTIFACTS, ZERO_SHOT)))
        if not (self.logits or self.hidden):
            raise ValueError(
                "ClassDistillation.logits and hidden are both False, so distillation would do "
                "nothing. Set one of them to True, or set DISTILLATION = None."
            )
        weights = self.image_weight, self.text_weight
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"ClassDistillation.image_weight and text_weight are {weights[0]} and "
                f"{weights[1]}; they must not be negative, nor both 0. Correct them, or set hidden "
                "to False."
            )
        refuse_ineffective(self, ("temperature",), "logits")
        refuse_ineffective(self, ("image_weight", "text_weight"), "hidden")

    def coefficients(self) -> dict[str, float]:
        """Returns each enabled term's coefficient in the total loss."""
        coefficients = {}
        if self.logits:
            coefficients["kl"] = self.weight * self.temperature**2
        if self.hidden and self.image_weight:
            coefficients["hidden_image"] = self.weight * self.image_weight
        if self.hidden and self.text_weight:
            coefficients["hidden_text"] = self.weight * self.text_weight
        return coefficients


def class_divergence(
    teacher: Float[Array, "B C"],
    student: Float[Array, "B C"],
    own: Bool[Array, "B C"],
    temperature: float,
) -> Float[Array, " B"]:
    """Returns KL(teacher || student) of each example's distribution over its own classes, in nats.

    Args:
        teacher, student: logits; arbitrary at classes that are not the example's own.
        own: whether each class exists in the example's task.
        temperature: the divisor of the logits.
    """
    of = lambda x: jax.nn.log_softmax(jnp.where(own, x / temperature, -jnp.inf))  # noqa: E731
    first, second = of(teacher), of(student)
    return (jnp.exp(first) * jnp.where(own, first - second, 0.0)).sum(-1)


def multi_label_divergence(
    teacher: Float[Array, "B C"],
    student: Float[Array, "B C"],
    own: Bool[Array, "B C"],
    temperature: float,
) -> Float[Array, " B"]:
    """Returns the mean over each example's own classes of KL(teacher || student), where every class
    is a distribution of two outcomes; see `class_divergence`."""
    first, second = (jnp.where(own, x / temperature, 0.0) for x in (teacher, student))
    each = jax.nn.sigmoid(first) * (first - second)
    each = each + jax.nn.softplus(second) - jax.nn.softplus(first)
    return jnp.where(own, each, 0.0).sum(-1) / own.sum(-1)


def image_distance(
    teacher: Float[Array, "B U"], student: Float[Array, "B U"]
) -> Float[Array, " B"]:
    """Returns the mean squared difference of each image's normalized features."""
    return jnp.square(student - teacher).mean(-1)


def text_distance(
    teacher: Float[Array, "N U"],
    student: Float[Array, "N U"],
    entries: Int[Array, "B C"],
    own: Bool[Array, "B C"],
) -> Float[Array, " B"]:
    """Returns the mean over each example's own classes of the mean squared difference of their
    normalized features.

    Args:
        teacher, student: the features of the bank's entries.
        entries: the entry of each class of each example; arbitrary at classes that do not exist.
        own: whether each class exists in the example's task.
    """
    each = image_distance(teacher, student)
    return jnp.where(own, each[entries], 0.0).sum(-1) / own.sum(-1)

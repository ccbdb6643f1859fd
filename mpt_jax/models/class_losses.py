"""Loss terms and metrics of image classification, per group and per run.

Each term is a (sum [G], normalizer [G]) pair, as in losses.py. An example counts once: its loss is
the cross entropy of its class or, in a multi-label task, the mean over the task's classes of the
binary cross entropies. For distillation, see class_distillation.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int
from mpt_jax.models import losses, metrics
from mpt_jax.models.class_distillation import ClassDistillation  # gin files name it here

OWN, UNION = "own", "union"


@dataclasses.dataclass(frozen=True, repr=False)
class ClassObjective:
    """The loss of a dual encoder.

    Attributes:
        softmax: the classes that compete for an example's probability: `'own'`, those of its task,
            or `'union'`, those of all tasks in its group, as in MVLPT's released code. Tasks may
            have the same classes, so only `'own'` has one right answer.
        distillation: the settings of distillation; None trains on the classes only. With
            distillation, the model also holds what teachers compute from class texts, and their
            image tokens.
    """

    softmax: str = OWN
    distillation: ClassDistillation | None = None

    def __post_init__(self):
        if self.softmax not in (OWN, UNION):
            raise ValueError(unknown_name("CLASS_SOFTMAX", self.softmax, (OWN, UNION)))

    def __repr__(self) -> str:
        """Leaves out distillation if there is none, so that fingerprints of jobs stay the same."""
        rest = "" if self.distillation is None else f", distillation={self.distillation!r}"
        return f"ClassObjective(softmax={self.softmax!r}{rest})"

    def coefficients(self) -> dict[str, float]:
        """Returns each enabled term's coefficient in the total loss."""
        terms = {} if self.distillation is None else self.distillation.coefficients()
        return {"cross_entropy": 1.0, **terms}


def class_cross_entropy(logits: Float[Array, "B _"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns the cross entropy of each example's class, in nats. Logits of minus infinity are
    classes that do not compete."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
    return log_z - picked


def multi_label_cross_entropy(
    logits: Float[Array, "B C"], labels: Float[Array, "B C"], own: Bool[Array, "B C"]
) -> Float[Array, " B"]:
    """Returns the mean over an example's own classes of the binary cross entropies, in nats."""
    logits = jnp.where(own, logits, 0.0)
    each = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.where(own, each, 0.0).sum(-1) / own.sum(-1)


def by_group(
    values: Float[Array, " B"], batch: Batch, groups: Int[Array, " B"], num_groups: int
) -> Float[Array, " G"]:
    """Returns the weighted sum of examples' values in each group."""
    return losses.group_sum(values * batch["loss_weights"], groups, num_groups)


def class_metrics(
    batch: Batch,
    example_losses: Float[Array, " B"],
    is_correct: Bool[Array, " B"],
    has_label: Bool[Array, " B"],
    num_rows: int,
) -> metrics.StepMetrics:
    """Returns each bank row's loss in nats and accuracy, without gradient. Multi-label examples
    have no accuracy.

    Args:
        batch: the batch contract's features.
        example_losses: the loss of each example.
        is_correct: whether the most probable class is the example's.
        has_label: whether the example has exactly one class.
        num_rows: K.
    """
    by_row = lambda x: losses.group_sum(x, batch["task_ids"], num_rows)  # noqa: E731
    weights = batch["loss_weights"]
    single = weights * has_label
    return {
        "loss": metrics.Metric(
            by_row(jax.lax.stop_gradient(example_losses) * weights), by_row(weights)
        ),
        "accuracy": metrics.Metric(by_row(is_correct * single), by_row(single)),
    }

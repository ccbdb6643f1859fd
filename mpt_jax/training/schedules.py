"""Learning-rate schedules, with one setting for all groups or one per group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mpt_jax.core.shapes import Array, Float, Int

PerGroup = int | float | Sequence[int | float]


DECAYS = ("linear", "cosine", "constant", "rsqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warmup to `peak`, then a decay. All fields except `decay`
    take one number, or one per group.

    Attributes:
        peak: the highest learning rate.
        total_steps: the step at which a linear or cosine decay ends; required for these decays and
            for `warmup_fraction`.
        warmup_steps: the length of the warmup in steps. With a warmup, the first step has learning
            rate zero.
        warmup_fraction: the length of the warmup as a fraction of total_steps; cannot be combined
            with `warmup_steps`.
        decay: `'linear'` or `'cosine'` (to zero at total_steps), `'rsqrt'` (proportional to
            1 / sqrt(step) after the warmup, as in T5's pretraining), or `'constant'`.

    Raises:
        ValueError: `decay` is unknown, `total_steps` is required but None, or the warmup is set
            twice.
    """

    peak: PerGroup
    total_steps: PerGroup | None = None
    warmup_steps: PerGroup = 0
    warmup_fraction: PerGroup = 0.0
    decay: str = "linear"

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(
                f"Schedule.decay must be one of {', '.join(DECAYS)}, got {self.decay!r}."
            )
        needs_total = self.decay in ("linear", "cosine") or np.any(self.warmup_fraction)
        if needs_total and self.total_steps is None:
            raise ValueError(
                f"A schedule with decay={self.decay!r} and warmup_fraction={self.warmup_fraction} "
                "needs total_steps, but it is None. Set Schedule.total_steps (for example, to "
                "%TRAIN_STEPS)."
            )
        if np.any(self.warmup_steps) and np.any(self.warmup_fraction):
            raise ValueError(
                f"Schedule.warmup_steps={self.warmup_steps} and "
                f"warmup_fraction={self.warmup_fraction} both set the length of the warmup. Set "
                "only one of the two."
            )

    def __call__(
        self, step: Int[Array, "..."], group: Int[Array, "..."] | int = 0
    ) -> Float[Array, "..."]:
        """Returns the learning rate of a group at a step, counted from 0."""
        pick = lambda value: per_group(value)[group if np.ndim(value) else 0]  # noqa: E731
        step = jnp.asarray(step, jnp.float32)
        total = pick(1.0 if self.total_steps is None else self.total_steps)
        warmup = pick(self.warmup_steps) + jnp.round(pick(self.warmup_fraction) * total)
        ramp = jnp.where(warmup > 0, jnp.minimum(1.0, step / jnp.maximum(warmup, 1.0)), 1.0)
        left = jnp.clip((total - step) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        decays = {
            "linear": left,
            "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left),
            "rsqrt": jnp.sqrt(
                jnp.maximum(warmup, 1.0) / jnp.maximum(step, jnp.maximum(warmup, 1.0))
            ),
            "constant": jnp.ones_like(left),
        }
        return pick(self.peak) * ramp * decays[self.decay]


@dataclasses.dataclass(frozen=True)
class EpochCosine:
    """Learning rate of CoOp's released code, which changes once per epoch.

    In the first epoch it is `warmup_rate`. In epoch e = 1, 2, ... it is
    `peak (1 + cos(pi (e - 1) / E)) / 2` with E epochs in all, so it never reaches zero. All fields
    take one number, or one per group.

    Attributes:
        peak: the learning rate of the second epoch.
        total_steps: the number of steps of all epochs.
        steps_per_epoch: the number of steps of an epoch, at least 1.
        warmup_rate: the learning rate of the first epoch.

    Raises:
        ValueError: `steps_per_epoch` is less than 1.
    """

    peak: PerGroup
    total_steps: PerGroup
    steps_per_epoch: PerGroup
    warmup_rate: PerGroup = 1e-5

    def __post_init__(self):
        if np.min(self.steps_per_epoch) < 1:
            raise ValueError(
                f"EpochCosine.steps_per_epoch must be at least 1, got {self.steps_per_epoch}. Set "
                "STEPS_PER_EPOCH to the number of training examples of a run over BATCH_SIZE."
            )

    def __call__(
        self, step: Int[Array, "..."], group: Int[Array, "..."] | int = 0
    ) -> Float[Array, "..."]:
        """Returns the learning rate of a group at a step, counted from 0."""
        pick = lambda value: per_group(value)[group if np.ndim(value) else 0]  # noqa: E731
        # Integers: XLA divides floats by a constant with a small error, so epochs would start late.
        whole = lambda value: pick(value).astype(jnp.int32)  # noqa: E731
        length = whole(self.steps_per_epoch)
        epoch = jnp.asarray(step, jnp.int32) // length
        epochs = -(-whole(self.total_steps) // length)
        cosine = 0.5 * pick(self.peak) * (1 + jnp.cos(jnp.pi * (epoch - 1) / epochs))
        return jnp.where(epoch < 1, pick(self.warmup_rate), cosine)


def per_group(value: PerGroup) -> Array:
    """Returns a setting as a float32 array: [1] for all groups, or [G]."""
    return jnp.atleast_1d(jnp.asarray(value, jnp.float32))

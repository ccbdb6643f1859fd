"""Fallback for `t5x.trainer`."""

from mpt_jax.training.trainer import Trainer

__all__ = ["Trainer"]

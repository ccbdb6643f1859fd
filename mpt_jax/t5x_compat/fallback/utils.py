"""Fallback for `t5x.utils`."""

from mpt_jax.checkpointing.checkpoint_config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.t5x_compat.bindings import TrainStateInitializer
from mpt_jax.t5x_compat.t5x_schedules import create_learning_rate_scheduler

__all__ = [
    "CheckpointConfig",
    "DatasetConfig",
    "RestoreCheckpointConfig",
    "SaveCheckpointConfig",
    "TrainStateInitializer",
    "create_learning_rate_scheduler",
]

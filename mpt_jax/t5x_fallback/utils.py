"""T5X's `t5x.utils`."""

from mpt_jax.checkpoints import CheckpointConfig, RestoreCheckpointConfig, SaveCheckpointConfig
from mpt_jax.data import DatasetConfig
from mpt_jax.initializer import TrainStateInitializer
from mpt_jax.schedules import create_learning_rate_scheduler

__all__ = [
    "CheckpointConfig",
    "DatasetConfig",
    "RestoreCheckpointConfig",
    "SaveCheckpointConfig",
    "TrainStateInitializer",
    "create_learning_rate_scheduler",
]

"""T5X's checkpoint configuration: when to save, how many to keep, which to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class SaveCheckpointConfig:
    """When to save checkpoints and how many to keep. Field names are T5X's.

    Attributes:
        period: the number of steps between saves; None saves only at the end.
        keep: the number of latest checkpoints to keep; None keeps all.
        save_dataset: whether the data position is saved with the state. Without it, a resumed job
            reads its data from the start, so resuming is not exact.
        dtype: T5X's setting; must be None or `'float32'`, since checkpoints are always float32.
        state_transformation_fns: T5X's setting; must be empty, since this trainer exports prompts
            to MODEL_DIR/artifact.

    Raises:
        ValueError: `period` is below 1, or a T5X setting would have no effect.
    """

    period: int | None = None
    keep: int | None = 1
    save_dataset: bool = True
    dtype: str | None = None
    state_transformation_fns: Sequence[Any] = ()

    def __post_init__(self):
        if self.period is not None and self.period < 1:
            raise ValueError(
                f"SaveCheckpointConfig.period must be at least 1, got {self.period}. Raise "
                "SAVE_PERIOD, or set it to None to save only at the end."
            )
        _only_float32("SaveCheckpointConfig", self.dtype)
        if self.state_transformation_fns:
            raise ValueError(
                "SaveCheckpointConfig.state_transformation_fns would have no effect with this "
                "trainer. Leave it empty; the prompts are written to MODEL_DIR/artifact."
            )


@dataclasses.dataclass
class RestoreCheckpointConfig:
    """Which checkpoints to read. Field names are T5X's.

    Attributes:
        path: one or more paths, each of a MODEL_DIR or of a checkpoint in one; empty for none.
        mode: `'latest'` or `'all'` to read the latest or all checkpoints of each MODEL_DIR,
            `'specific'` to read the checkpoint at each path.
        dtype: T5X's setting; must be None or `'float32'`, since checkpoints are always float32.

    Raises:
        ValueError: `mode` is unknown, or `dtype` would have no effect.
    """

    path: str | Sequence[str] = ""
    mode: str = "latest"
    dtype: str | None = None

    def __post_init__(self):
        _only_float32("RestoreCheckpointConfig", self.dtype)
        if self.mode not in ("latest", "all", "specific"):
            raise ValueError(
                f"RestoreCheckpointConfig.mode must be 'latest', 'all' or 'specific', got "
                f"{self.mode!r}."
            )


@dataclasses.dataclass
class CheckpointConfig:
    """Saving and restoring of a training job.

    A job always resumes from its own MODEL_DIR, and initial values come from the initializer's
    origins, so `restore` must be None for training.

    Attributes:
        save: when to save; None saves only at the end.
        restore: T5X's setting; must be None.
    """

    save: SaveCheckpointConfig | None = None
    restore: RestoreCheckpointConfig | None = None


def _only_float32(config: str, dtype: str | None) -> None:
    if dtype not in (None, "float32"):
        raise ValueError(
            f"{config}.dtype={dtype!r} would have no effect: prompts and optimizer state are "
            f"float32 on disk and in memory. Set {config}.dtype to None."
        )

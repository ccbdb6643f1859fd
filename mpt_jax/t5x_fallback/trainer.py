"""T5X's `t5x.trainer`."""

from mpt_jax.trainer import EarlyStoppingAction, TerminateOnNanAction, Trainer

__all__ = ["EarlyStoppingAction", "TerminateOnNanAction", "Trainer"]

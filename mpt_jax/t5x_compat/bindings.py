"""What stage files bind that is one thing under T5X and another with our trainer.

    TrainStateInitializer   T5X's is `train_state_adapter`'s, which makes T5X's train
                            state. Ours makes its own state, and needs from gin only to be told the
                            origins.
    save_hooks              T5X writes MODEL_DIR/artifact at its saves; ours does so itself.
    stoppable               T5X's trainer is made to stop on request; ours does so itself.

A gin file imports this module before it builds anything, so under T5X the job's other processes
are joined here: T5X itself joins none on TPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpt_jax.config import trainer_choice
from mpt_jax.runtime import distributed
from mpt_jax.t5x_compat import preemptible, train_state_adapter
from mpt_jax.training.initialization import Origins


class OwnInitializer:
    """What our trainer reads origins from. Built with T5X's arguments, so that either trainer can
    be given the name `TrainStateInitializer`.

    Args:
        optimizer_def: not read; the model has it.
        init_fn: not read.
        input_shapes: not read.
        partitioner: not read.
        input_types: not read.
        origins: where first values come from.
    """

    def __init__(
        self,
        optimizer_def: Any = None,
        init_fn: Callable[..., Any] | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        partitioner: Any = None,
        input_types: Mapping[str, Any] | None = None,
        *,
        origins: Origins,
    ):
        self.origins = origins


def own_save_hooks(model_dir: str) -> list[Any]:
    """None: our trainer writes MODEL_DIR/artifact itself."""
    return []


def own_stoppable(trainer_cls: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer as it is: our loop listens itself."""
    return trainer_cls


# Decided when a gin file imports this module; by then the name `t5x` is taken.
if trainer_choice.is_real(sys.modules.get("t5x")):
    TrainStateInitializer = train_state_adapter.TrainStateInitializer
    save_hooks = train_state_adapter.save_hooks
    stoppable = preemptible.stoppable
    distributed.initialize()
else:
    TrainStateInitializer = OwnInitializer
    save_hooks = own_save_hooks
    stoppable = own_stoppable

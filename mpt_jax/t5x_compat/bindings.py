"""Names that stage files bind, with one implementation for T5X and one for this library's trainer.

    TrainStateInitializer   T5X: builds T5X's train state (`train_state_adapter`). Own trainer:
                            only holds the origins, since the trainer builds its state itself.
    save_hooks              T5X: writes MODEL_DIR/artifact at every save. Own trainer: no hooks,
                            since the trainer writes the artifact itself.
    stoppable               T5X: makes the trainer stop on request. Own trainer: does nothing,
                            since the trainer handles stop requests itself.

Gin imports this module before it builds any object. Under T5X, the job's processes therefore
connect to each other here, since T5X does not connect them on TPUs.
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
    """Holder of the origins, for this library's trainer. It takes T5X's arguments, so that gin
    files can bind `TrainStateInitializer` for either trainer.

    Args:
        optimizer_def: ignored; the model has the optimizer.
        init_fn: ignored.
        input_shapes: ignored.
        partitioner: ignored.
        input_types: ignored.
        origins: origins of the initial parameters.
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
    """Returns no hooks: this library's trainer writes MODEL_DIR/artifact itself."""
    return []


def own_stoppable(trainer_cls: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the trainer unchanged: this library's loop handles stop requests itself."""
    return trainer_cls


# Decided when a gin file imports this module; by then `t5x` is loaded.
if trainer_choice.is_real(sys.modules.get("t5x")):
    TrainStateInitializer = train_state_adapter.TrainStateInitializer
    save_hooks = train_state_adapter.save_hooks
    stoppable = preemptible.stoppable
    distributed.initialize()
else:
    TrainStateInitializer = OwnInitializer
    save_hooks = own_save_hooks
    stoppable = own_stoppable

"""The `train_state_initializer_cls` of stage files, for whichever trainer runs them.

T5X's is `t5x_host`'s, which makes T5X's train state. Ours makes its own state, and needs from
gin only to be told the origins; the class here carries them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpt_jax import t5x_host, t5x_import
from mpt_jax.train_state import Origins


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
    """None: our trainer writes MODEL_DIR/artefact itself."""
    return []


# Decided when a gin file imports this module; by then the name `t5x` is taken.
if t5x_import.is_real(sys.modules.get("t5x")):
    TrainStateInitializer = t5x_host.TrainStateInitializer
    save_hooks = t5x_host.save_hooks
else:
    TrainStateInitializer = OwnInitializer
    save_hooks = own_save_hooks

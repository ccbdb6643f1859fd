"""T5 1.0 and 1.1 (and mT5, Flan-T5, ByT5, which share their layout), in T5X's parameter tree."""

from mpt_jax.backbones.t5.config import T5Config, t5_config
from mpt_jax.backbones.t5.network import Transformer, parameter_shapes

__all__ = ["T5Config", "Transformer", "parameter_shapes", "t5_config"]

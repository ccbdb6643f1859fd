"""MPT-JAX: multitask prompt tuning on a frozen encoder-decoder, in JAX."""

from mpt_jax.runtime.deferred_keras import defer_keras
from mpt_jax.runtime.quiet import start_quietly

__version__ = "0.1.0"

defer_keras()
start_quietly()

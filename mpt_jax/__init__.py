"""MPT-JAX: multitask prompt tuning on a frozen encoder-decoder, in JAX."""

__version__ = "0.1.0"

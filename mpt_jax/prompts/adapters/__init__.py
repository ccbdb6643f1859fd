"""Methods that change layers of the frozen backbone by a few parameters of each task."""

from mpt_jax.prompts.adapters import lora

__all__ = ["lora"]

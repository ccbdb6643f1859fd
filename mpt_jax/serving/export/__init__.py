"""`mpt-jax export`: predict and score as files that JAX alone runs, and their way back.

writing    functions lowered for several platforms, weights beside them as arguments
loading    what calls them; imports nothing of this library, nor Flax
"""

from mpt_jax.serving.export.loading import Exported, load

__all__ = ["Exported", "load"]

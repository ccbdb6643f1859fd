"""`mpt-jax export`: predict and score as files that run with JAX only, and a loader for them.

writing    lowers the functions for several platforms, with weights as arguments
loading    loads and calls the functions; imports neither Flax nor the rest of this library
"""

from mpt_jax.serving.export.loading import Exported, load

__all__ = ["Exported", "load"]

"""Entry of `import t5x` if Google's T5X is not installed: see mpt_jax/t5x_compat/fallback.

On some import paths Python finds this file before a real T5X, so it looks for one first and loads
it instead. It has no further logic, since installers may copy it.
"""

from mpt_jax.config import trainer_choice

trainer_choice.activate(__name__)

"""`import t5x` where Google's T5X is not installed: see mpt_jax/t5x_compat/fallback.

This file is found before, or instead of, a real T5X on some import paths, so it looks for one
first and steps aside for it. It holds no logic of its own, since installers may copy it.
"""

from mpt_jax.config import trainer_choice

trainer_choice.activate(__name__)

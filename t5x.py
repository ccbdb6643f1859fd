"""Module that `import t5x` loads if Google's T5X is not installed (mpt_jax/t5x_compat/fallback).

Python may find this file before a real T5X. The file therefore searches for a real T5X first, and
loads that instead. It has no other logic, because installers may copy it.
"""

from mpt_jax.config import trainer_choice

trainer_choice.activate(__name__)

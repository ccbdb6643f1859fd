"""Modules that `import t5x` finds if T5X is not installed.

T5X is not on PyPI, so a gin file with `from t5x import utils` would fail on most machines. These
modules re-export this library's objects under the names that its gin files and T5X's run files use.
If a real T5X is installed, it is used instead, unless MPT_JAX_TRAINER=own.
"""

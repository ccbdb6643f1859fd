"""Prompt methods. Importing this package registers every method that ships with MPT-JAX."""

from mpt_jax.prompts import (
    adapters,
    attempt,
    cocoop,
    heads,
    lanes,
    mpt,
    no_prompt,
    prompt_tuning,
    shared_prompt,
    sites,
    upt,
    zero_shot,
)
from mpt_jax.prompts.base import PromptMethod, get_method, method_names, register
from mpt_jax.prompts.crosspt import crosspt

__all__ = [
    "PromptMethod",
    "adapters",
    "attempt",
    "cocoop",
    "crosspt",
    "get_method",
    "heads",
    "lanes",
    "method_names",
    "mpt",
    "no_prompt",
    "prompt_tuning",
    "register",
    "shared_prompt",
    "sites",
    "upt",
    "zero_shot",
]

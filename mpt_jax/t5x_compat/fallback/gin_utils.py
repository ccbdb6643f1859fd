"""Fallback for `t5x.gin_utils`."""

from mpt_jax.config.gin_utils import bool_fn, string_split_fn, sum_fn, summarize_gin_config

__all__ = ["bool_fn", "string_split_fn", "sum_fn", "summarize_gin_config"]

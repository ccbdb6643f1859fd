"""Fallback for `t5x.partitioning`."""

from mpt_jax.training.partitioning import PjitPartitioner, standard_logical_axis_rules

__all__ = ["PjitPartitioner", "standard_logical_axis_rules"]

"""Pipeline from SeqIO tasks to batches: feature converter, sampling, iterators."""

from mpt_jax.data import tasks_alias

tasks_alias.install()

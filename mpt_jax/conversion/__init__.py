"""Checkpoints and prompts from one format into another, each conversion checked by reading it back.

Formats are read and written in `mpt_jax.convert`; here they are told apart by content, joined to
prompt artefacts, compared, and offered as `mpt-jax convert`.
"""

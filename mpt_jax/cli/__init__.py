"""The `mpt-jax` command."""

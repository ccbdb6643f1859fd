"""Shapes, parameter trees, runs and the batch contract. Imports no other package of MPT-JAX."""

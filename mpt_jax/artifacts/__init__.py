"""Prompt artifacts, their model cards and where they come from."""

"""Prompt artifacts, with their compatibility checks, model cards and provenance."""

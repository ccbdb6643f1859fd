"""Adapters for the real T5X, and the fallback that `import t5x` loads if T5X is not used."""

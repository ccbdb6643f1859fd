"""Experiments with several runs: fleets, stages, the demo, the paper's tables and the report."""

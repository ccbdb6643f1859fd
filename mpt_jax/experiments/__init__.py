"""Chains of runs: fleets, stages, the demo, the paper's tables and the report."""

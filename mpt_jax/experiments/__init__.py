"""Experiments built from several runs: fleets, stages, the demo, the paper's tables, the report."""

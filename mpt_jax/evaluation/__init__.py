"""Evaluation of a run and what it writes: metrics, best steps, final artifacts."""

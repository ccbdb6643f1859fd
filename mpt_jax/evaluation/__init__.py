"""Evaluation of runs, and the files they write: metrics, run records, final artifacts."""

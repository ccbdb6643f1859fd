"""Gin files: finding, parsing and checking them, and which trainer answers to `t5x`."""

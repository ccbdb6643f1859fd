"""Serving of a bank of trained prompts on one backbone: prediction and export."""

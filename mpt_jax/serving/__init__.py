"""A bank of trained prompts on one backbone: prediction and export."""

"""Backbones: networks that take embeddings and masks, and do not handle prompts."""

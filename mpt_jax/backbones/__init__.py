"""Backbones: frozen networks that take embeddings and masks and know nothing of prompts."""

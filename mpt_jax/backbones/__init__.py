"""Backbones: frozen networks that take embeddings and masks and never hear of prompts."""

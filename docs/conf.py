"""Configuration of the documentation site (`make docs`)."""

import importlib.metadata

project = "MPT-JAX"
release = importlib.metadata.version("mpt-jax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "MPT-JAX"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes are in the signatures

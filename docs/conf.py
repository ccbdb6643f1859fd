"""Configuration of the documentation site (`make docs`)."""

import importlib.metadata
import re

project = "MPT-JAX"
release = importlib.metadata.version("mpt-jax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "MPT-JAX"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes are in the signatures
napoleon_use_ivar = True

# Pages beside this folder are offered as files: their own links are those of the repository.
OUTSIDE = re.compile(r"\]\((\.\./(?:README|CONTRIBUTING|CHANGELOG)\.md)(?:#[^)]*)?\)")


def setup(app):
    """Connects what is done to every page."""
    app.connect("source-read", _link_files)


def _link_files(app, name, source):
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])

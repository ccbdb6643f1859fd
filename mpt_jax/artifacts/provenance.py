"""The code behind a run: git revision and package versions."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import mpt_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "numpy")


def git_revision() -> str | None:
    """Returns the commit of the source tree, followed by `+changes` if tracked files were changed.

    Returns None if the source tree is not a git checkout.
    """
    folder = Path(mpt_jax.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    run = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()
    revision = run("rev-parse", "HEAD")
    return (revision + "+changes" if run("status", "--porcelain", "-uno") else revision) or None


def package_versions() -> dict[str, str | None]:
    """Returns the installed version of each of `PACKAGES`; None if a package is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

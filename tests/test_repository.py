"""What must not be in the repository, whatever the code does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Absolute paths of somebody's machine; after a letter or slash it is part of a longer path or URL.
MACHINE_PATH = re.compile(rb"(?<![\w./}])/(?:work|root|home|Users|opt|mnt)/[\w.-]+|file://")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of its files")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if name]


def test_no_file_mentions_a_machine_path() -> None:
    found = {}
    for path in tracked_files():
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content or path == Path(__file__):
            continue
        if hits := MACHINE_PATH.findall(content):
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert not found


def test_gin_folders_are_not_python_packages() -> None:
    """With an __init__.py, `import gin` in the clone would find gin/ instead of gin-config."""
    assert not list((ROOT / "gin").rglob("*.py"))


def test_no_file_is_larger_than_the_tiny_backbone_may_be() -> None:
    limit = 12 * 2**20
    large = [str(p) for p in tracked_files() if p.is_file() and p.stat().st_size > limit]
    assert not large

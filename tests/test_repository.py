"""Repository hygiene: paths, file sizes, imports between tests, recorded properties."""

from __future__ import annotations

import ast
import csv
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Absolute paths of a machine. After a letter or slash, a match is part of a longer path or URL.
MACHINE_PATH = re.compile(rb"(?<![\w./}])/(?:work|root|home|Users|opt|mnt)/[\w.-]+|file://")

TEST_MODULE = re.compile(r"\btests(?:\.\w+)*(?:\.| import )test_\w+")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of its files")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if name]


def test_tracked_files_contain_no_machine_path() -> None:
    found = {}
    for path in tracked_files():
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content or path == Path(__file__):
            continue
        if hits := MACHINE_PATH.findall(content):
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert not found


def test_gin_folders_contain_no_python_files() -> None:
    """With an __init__.py, `import gin` in the clone would find gin/ instead of gin-config."""
    assert not list((ROOT / "gin").rglob("*.py"))


def test_tracked_files_within_size_limit() -> None:
    limit = 12 * 2**20
    large = [str(p) for p in tracked_files() if p.is_file() and p.stat().st_size > limit]
    assert not large


def imported_test_modules(path: Path) -> list[str]:
    """The test modules that a file imports, including in scripts for child processes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        found += [hit for name in names for hit in TEST_MODULE.findall(name)]
    return found


def test_test_modules_never_imported_by_other_files() -> None:
    """Helpers of several modules belong in tests/fixtures (CONTRIBUTING.md)."""
    found = {
        str(path.relative_to(ROOT)): hits
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__) and (hits := imported_test_modules(path))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "from tests import test_train",
        "from tests.test_train import run",
        "import tests.config.test_gin_utils as gin_tests",
        "SCRIPT = 'from tests.config import test_gin_utils'",
        "def late():\n    from tests.config.test_gin_utils import parse",
    ],
)
def test_imported_test_modules_any_import_form_detected(code: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(code)
    assert len(imported_test_modules(tmp_path / "test_x.py")) == 1


def test_pytest_fixtures_never_imported_and_shadowed() -> None:
    """A fixture of several modules needs no waiver in tests/fixtures/pytest_fixtures.py."""
    waiver = re.compile(r"noqa:[^#\n]*" + "F811")
    found = [str(p) for p in (ROOT / "tests").rglob("*.py") if waiver.search(p.read_text())]
    assert not found


def test_recorded_properties_all_have_their_test():
    """tests/record/properties.tsv maps old tests, from before the packages, to current ones."""
    with (ROOT / "tests" / "record" / "properties.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) > 1000
    defined: dict[str, set[str]] = {}
    missing = []
    for node in (node for row in rows for node in row["new"].split()):
        path, _, name = node.partition("::")
        if path not in defined:
            tree = ast.parse((ROOT / path).read_text()) if (ROOT / path).is_file() else ast.Module()
            defined[path] = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
        if name not in defined[path]:
            missing.append(node)
    assert not missing

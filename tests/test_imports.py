"""Package layout: modules import only packages above theirs, and the core needs no TensorFlow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fixtures.processes import run_script

ROOT = Path(__file__).resolve().parents[1]

# In data-flow order: a module imports only its own package and those before it.
CORE = """core runtime batching prompts backbones models artifacts convert training checkpointing
serving""".split()
BORDER = """data evaluation tasks config t5x_compat training_job train eval infer plan experiments
cli __main__""".split()
RANK = {name: rank for rank, name in enumerate(CORE + BORDER)}
BLOCKED = ("tensorflow", "tensorflow_datasets", "seqio", "t5", "torch", "transformers", "gin")

FILES = sorted((ROOT / "mpt_jax").rglob("*.py"))


def place_of(path: Path) -> str:
    """The layout name of a file: its top folder, or the file itself."""
    return path.relative_to(ROOT / "mpt_jax").parts[0].removesuffix(".py")


def imported_places(path: Path) -> list[tuple[str, int]]:
    """Layout names that a file imports, also inside functions, with their lines."""
    package = ["mpt_jax", *path.relative_to(ROOT / "mpt_jax").parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            top, name, *_ = [*module.split("."), ""]
            if top == "mpt_jax" and name not in ("", "__version__"):
                found.append((name, node.lineno))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_packages_above_its_own(path: Path) -> None:
    name = place_of(path)
    imported = imported_places(path)
    if name == "__init__":
        assert {package for package, _ in imported} == {"runtime"}, "only runtime"
        return
    assert name in RANK, f"the package {name} has no rank: add it to this test's lists"
    below = [
        f"line {line}: {other}"
        for other, line in imported
        if other != name and RANK.get(other, len(RANK)) >= RANK[name]
    ]
    assert not below, f"{path.relative_to(ROOT)} imports from below itself: {below}"


def test_core_packages_without_tensorflow_and_gin_import() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if place_of(path) in CORE
    ]
    script = f"""
import importlib, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None    # import raises ImportError
for name in {modules!r}:
    importlib.import_module(name)
"""
    run_script(script, fresh=True)

"""The wheel, installed outside the clone, contains what the commands need."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fixtures.processes import run_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_contains_all_gin_files_and_expected_folders_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"mpt_jax/configs/{p.relative_to(ROOT)}" for p in (ROOT / "gin").rglob("*.gin")}
    assert expected
    data = (p for p in (ROOT / "mpt_jax/tasks/data").rglob("*") if p.is_file())
    expected |= {str(p.relative_to(ROOT)) for p in data}
    assert "mpt_jax/tasks/data/tiny_clip/model.safetensors" in expected
    assert expected <= set(names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mpt_jax", "t5x.py"}


@pytest.mark.slow
def test_wheel_installed_finds_gin_files_and_tasks_from_any_folder(
    wheel: Path, tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    script = f"""
import pathlib, gin, mpt_jax, seqio, mpt_jax.tasks.toy, t5x
from mpt_jax.config import gin_utils
from mpt_jax.runtime import paths
from mpt_jax.train import train  # the gin files configure the main module
site = {str(site)!r}
for module in (mpt_jax, mpt_jax.tasks.toy):
    assert module.__file__.startswith(site), module.__file__
assert not gin.__file__.startswith(site), gin.__file__
gin_utils.parse(["gin/mpt_source.gin", "gin/tiny.gin"])
assert gin.query_parameter("%SOURCE_TASKS")[0] in seqio.TaskRegistry.names()
vocabulary = pathlib.Path(str(paths.shipped(name="toy.model")))
assert vocabulary.is_relative_to(site) and vocabulary.exists(), vocabulary
"""
    run_script(script, cwd=elsewhere, fresh=True, PYTHONPATH=str(site))

"""The shipped gin files under the real T5X, from a folder that does not hold them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_jax.config import trainer_choice
from tests.fixtures import real_t5x

ROOT = Path(__file__).resolve().parents[2]
pytestmark = real_t5x.NEEDED


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python module in `folder`. T5X comes before our t5x.py on the path, so that T5X is
    imported without our help."""
    spec = trainer_choice.find_real()
    assert spec is not None and spec.origin is not None
    path = [str(Path(spec.origin).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment |= {"MPT_JAX_ROOT": str(folder / "root"), "JAX_PLATFORMS": "cpu"}
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
    done.stderr = (folder / "log").read_text()
    return done


@pytest.mark.parametrize("searched", [True, False])
def test_gin_path_lets_t5x_find_the_shipped_files_from_an_empty_folder(searched, tmp_path):
    folder = run(tmp_path, "mpt_jax", "gin-path").stdout.strip()
    done = run(
        tmp_path,
        "t5x.train",
        *([f"--gin_search_paths={folder}"] if searched else []),
        *("--gin_file=gin/mpt_target.gin", "--gin_file=gin/tiny.gin"),
        *("--gin.TARGET_TASKS=['toy_mrpc']", "--gin.TRAIN_STEPS=2"),
        *("--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_STEPS=1"),
    )
    trained = tmp_path / "root" / "tiny" / "mpt_target" / "artifact" / "prompts.safetensors"
    assert trained.exists() == (done.returncode == 0) == searched, done.stderr[-4000:]
    assert ("Unable to open file: gin/mpt_target.gin" in done.stderr) != searched

"""One job of two processes, as its command lines start it, against the same job in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpt_jax import artefacts
from mpt_jax.tree import flatten

ROOT = Path(__file__).parents[1]
STAGE = (
    "--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin",
    "--gin.TRAIN_STEPS=6", "--gin.SAVE_PERIOD=3", "--gin.EVAL_PERIOD=6", "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.LEARNING_RATE=0.03",
    "--gin.train.actions={}",  # the last step is compared, not the best
)  # fmt: skip
SHARED = "--gin.paths.under.shared_filesystem=True"


def start(root: Path, steps: int, *more: str) -> subprocess.Popen:
    """A job that stops at a step; its schedule is that of six steps whatever it stops at."""
    environment = os.environ | {"MPT_JAX_ROOT": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "mpt_jax.train", *STAGE, f"--gin.train.total_steps={steps}", *more],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_two(root: Path, steps: int, *more: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    job = (f"--coordinator_address={address}", "--process_count=2", *more)
    return [start(root, steps, *job, f"--process_index={index}") for index in range(2)]


def finish(children: list[subprocess.Popen], code: int = 0) -> list[str]:
    logs = [child.communicate(timeout=600)[1] for child in children]
    for child, log in zip(children, logs, strict=True):
        assert child.returncode == code, log[-4000:]
    return logs


def learnt(root: Path) -> dict[str, np.ndarray]:
    params = artefacts.load_artefact(root / "tiny" / "mpt_source" / "artefact").params
    return {name: np.asarray(value) for name, value in flatten(params).items()}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_resume(tmp_path):
    finish([start(tmp_path / "one", 6)])
    finish(start_two(tmp_path / "two", 3, SHARED))
    logs = finish(start_two(tmp_path / "two", 6, SHARED))
    for index, log in enumerate(logs):
        assert f"Process {index} of 2." in log
        assert "checkpoint_3" in log, "it did not resume"
    one, two = learnt(tmp_path / "one"), learnt(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, value in one.items():
        # Sums over the batch are taken in another order.
        np.testing.assert_allclose(two[name], value, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.slow
def test_a_local_root_is_refused_by_every_process(tmp_path):
    for log in finish(start_two(tmp_path, 3), code=2):
        assert "shared_filesystem" in log

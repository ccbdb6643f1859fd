"""Whole runs of `train()` under faults: full and read-only disks, clock jumps, two runs in one
MODEL_DIR, readers of a running job. docs/reliability.md lists them."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpt_jax import eval
from mpt_jax.checkpointing import checkpoint_config, checkpoints, run_lock
from mpt_jax.runtime.files import write_atomic
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.trainer import Trainer
from tests.fixtures.training_runs import (
    STEPS,
    TASKS,
    assert_same_bits,
    build,
    dataset,
    prompts,
    run,
)


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory) -> Path:
    """MODEL_DIR of a run without faults."""
    folder = tmp_path_factory.mktemp("whole")
    run(backbone, folder)
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that fills the disk except for some bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
        file.truncate(max(0, filler.stat().st_size - leave))
    return filler


@pytest.mark.parametrize(
    "leave",
    [pytest.param(0, id="nothing"), pytest.param(24_000, id="some", marks=pytest.mark.slow)],
)
def test_train_full_disk_error_and_resumes_with_room(backbone, whole, small_disk, leave):
    model_dir = small_disk / "run"
    run(backbone, model_dir, steps=4)
    filler = fill(small_disk, leave)
    with pytest.raises(OSError, match=f"{model_dir}.*No space left on device"):
        run(backbone, model_dir)
    filler.unlink()
    assert (model_dir / "checkpoint_4").is_dir(), "the last save is whole"
    run(backbone, model_dir)
    assert_same_bits(prompts(whole), prompts(model_dir))


def test_train_read_only_model_dir_error(backbone, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=f"{small_disk}/run cannot be written.*Read-only"):
        run(backbone, small_disk / "run")


@pytest.mark.slow
def test_train_clock_goes_backwards_same_prompts(backbone, whole, tmp_path, monkeypatch):
    jumps = iter(range(2 * 10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    run(backbone, tmp_path, steps=4)
    run(backbone, tmp_path)
    assert_same_bits(prompts(whole), prompts(tmp_path))


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def test_train_model_dir_in_use_refused_and_unchanged(backbone, whole, tmp_path):
    model_dir = shutil.copytree(whole, tmp_path / "run")
    with run_lock.acquire(str(model_dir), period=600.0):
        before = listing(model_dir)
        with pytest.raises(run_lock.ModelDirInUse, match="being written by process"):
            run(backbone, model_dir, steps=STEPS + 2)
        assert listing(model_dir) == before
    run(backbone, model_dir, steps=STEPS + 2)
    assert not (model_dir / run_lock.FILE).exists()


def test_train_model_dir_taken_over_ends_without_save(backbone, tmp_path, monkeypatch):
    class Paused(Trainer):
        def train(self, batch):
            super().train(batch)
            if self.step == 3:
                record = json.loads((tmp_path / run_lock.FILE).read_text())
                other = {**record, "token": "another's", "host": "another"}
                for _ in range(20):  # as another run does, whatever this one writes between
                    write_atomic(tmp_path / run_lock.FILE, json.dumps(other))
                    time.sleep(0.05)

    monkeypatch.setattr(run_lock, "acquire", functools.partial(run_lock.acquire, period=0.1))
    with pytest.raises(run_lock.ModelDirInUse, match="taken over by .*another"):
        run(backbone, tmp_path, trainer_cls=Paused)
    assert checkpoints.saved_steps(checkpoints.epath.Path(tmp_path)) == [2]
    assert json.loads((tmp_path / run_lock.FILE).read_text())["token"] == "another's"


def test_evaluate_model_dir_of_running_job_unchanged(backbone, whole, tmp_path):
    """Neither the files that the run is writing nor its lock change."""
    model_dir, model = shutil.copytree(whole, tmp_path / "run"), build()
    (model_dir / f"checkpoint_{STEPS + 2}.orbax-checkpoint-tmp").mkdir()
    origins = initialization.Origins(backbone=backbone)
    with run_lock.acquire(str(model_dir), period=600.0):
        before = listing(model_dir)
        scores = eval.evaluate(
            model=model,
            dataset_cfg=dataset(model.runs, split="validation", shuffle=False),
            restore_checkpoint_cfg=checkpoint_config.RestoreCheckpointConfig(str(model_dir)),
            partitioner=PjitPartitioner(),
            output_dir=str(tmp_path / "eval"),
            train_state_initializer_cls=lambda: types.SimpleNamespace(origins=origins),
            summarize_config_fn=lambda *_: None,
        )
        assert listing(model_dir) == before
    assert set(scores[STEPS]) == set(TASKS)

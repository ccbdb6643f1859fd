"""The shipped gin files under the real T5X, driven as a user drives it: by command lines.

T5X is on no package registry. To run these tests, put a clone on PYTHONPATH:

    PYTHONPATH=../t5x python -m pytest -m '' tests/t5x
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpt_jax import artefacts, t5x_import

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.t5x,
    pytest.mark.slow,
    pytest.mark.skipif(
        t5x_import.find_real() is None,
        reason="the real T5X is not importable here; put a clone of it on PYTHONPATH",
    ),
]

STEPS = ("--gin.TRAIN_STEPS=20", "--gin.EVAL_PERIOD=20", "--gin.SAVE_PERIOD=10")
QUICK = ("--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_STEPS=1")


def run(script: str, *arguments: str, root: Path, trainer: str = "t5x") -> str:
    """One command line; returns its log."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        "MPT_JAX_ROOT": str(root),
        "MPT_JAX_TRAINER": trainer,
        "JAX_PLATFORMS": "cpu",
    }
    child = subprocess.run(
        [sys.executable, "-m", f"t5x.{script}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-6000:]
    return child.stderr


def stage(name: str, *more: str) -> list[str]:
    return [f"--gin_file=gin/{name}.gin", "--gin_file=gin/tiny.gin", *QUICK, *more]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prompts(model_dir: Path) -> dict[str, np.ndarray]:
    params = artefacts.load_artefact(model_dir / "artefact").params
    return {name: np.asarray(value) for name, value in params.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A ROOT whose three stages have been trained by T5X, 20 steps each."""
    root = tmp_path_factory.mktemp("root")
    run("train", *stage("pt_source", *STEPS), root=root)
    # In two goes, so that the second resumes.
    run("train", *stage("mpt_source", *STEPS, "--gin.train.total_steps=10"), root=root)
    log = run("train", *stage("mpt_source", *STEPS), root=root)
    assert re.search(r"Starting main loop over steps 10-20", log)
    return root / "tiny"


def test_a_checkpoint_is_smaller_than_a_twentieth_of_the_backbone(root):
    backbone = ROOT / "tasks" / "data" / "tiny_t5"
    (backbone,) = backbone.glob("checkpoint_*")
    assert 0 < size(root / "mpt_source" / "checkpoint_20") < size(backbone) / 20


def test_teachers_travel_as_an_artefact(root):
    teachers = artefacts.load_artefact(root / "pt_source" / "artefact")
    assert teachers.method.name == "prompt_tuning" and teachers.runs.num_rows == 6
    assert teachers.runs.num_groups == 6
    assert teachers.config["step"] == 20


def test_training_writes_what_t5x_writes(root):
    folder = root / "mpt_source"
    assert (folder / "config.gin").is_file() and (folder / "model-info.txt").is_file()
    assert "encoder" not in (folder / "model-info.txt").read_text()
    lines = (folder / "inference_eval" / "toy_sst2-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_a_resumed_run_equals_an_uninterrupted_one(root, tmp_path):
    """Bit for bit, on one CPU device."""
    whole = tmp_path / "whole"
    teachers = f"--gin.TEACHERS='{root / 'pt_source' / 'artefact'}'"
    run(
        "train",
        *stage("mpt_source", *STEPS, teachers, f"--gin.MODEL_DIR='{whole}'"),
        root=tmp_path,
    )
    once, twice = prompts(whole), prompts(root / "mpt_source")
    for name in once:
        np.testing.assert_array_equal(once[name], twice[name], err_msg=name)


def test_both_trainers_learn_the_same_prompts(root, tmp_path):
    """From one artefact, where nothing is drawn at random, the trainers agree to rounding."""
    found = {}
    for trainer in ("t5x", "own"):
        model_dir = tmp_path / trainer
        run(
            "train",
            *stage("mpt_target", *STEPS, f"--gin.MODEL_DIR='{model_dir}'"),
            f"--gin.INITIAL_ARTEFACT='{root / 'mpt_source' / 'artefact'}'",
            "--gin.train.actions={}",  # T5X's artefact is the last step's, ours the best one's
            root=tmp_path,
            trainer=trainer,
        )
        found[trainer] = prompts(model_dir)
    start = artefacts.load_artefact(root / "mpt_source" / "artefact")
    for name, ours in found["own"].items():
        moved = np.abs(ours - np.asarray(start.params[name]).mean(0)).max()
        assert moved > 1e-3
        np.testing.assert_allclose(found["t5x"][name], ours, atol=1e-4, err_msg=name)


def test_evaluation_and_inference(root):
    checkpoint = f"--gin.CHECKPOINT_PATH='{root / 'mpt_source' / 'checkpoint_20'}'"
    method = "--gin_file=gin/methods/mpt.gin"
    tasks = ("--gin.TASK_NAMES=%SOURCE_TASKS", "--gin.EVAL_TASKS=['toy_qqp']", checkpoint)
    files = {
        script: (f"--gin_file=gin/{script}.gin", method, "--gin_file=gin/tiny.gin", *tasks)
        for script in ("eval", "infer")
    }
    run("eval", *files["eval"], root=root.parent)
    metrics = root / "eval" / "inference_eval" / "toy_qqp-metrics.jsonl"
    assert json.loads(metrics.read_text())["step"] == 20
    texts = {}
    for trainer in ("t5x", "own"):
        folder = root / f"infer_{trainer}"
        # Our trainer reads the artefact, T5X its own checkpoint: the same prompts.
        more = [f"--gin.INFER_OUTPUT_DIR='{folder}'"]
        if trainer == "own":
            artefact = root / "mpt_source" / "artefact"
            more += ["--gin.CHECKPOINT_PATH=''", f"--gin.INITIAL_ARTEFACT='{artefact}'"]
        run("infer", *files["infer"], *more, root=root.parent, trainer=trainer)
        (written,) = folder.glob("toy_qqp-predict.jsonl-00000-of-00001")
        texts[trainer] = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(texts["t5x"]) == 200 and texts["t5x"] == texts["own"]

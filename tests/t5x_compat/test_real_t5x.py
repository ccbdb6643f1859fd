"""The shipped gin files under the real T5X, run from the command line as users do.

T5X is on no package registry. To run these tests, install it (tpu/requirements-t5x.txt), or put a
clone on PYTHONPATH:

    PYTHONPATH=../t5x python -m pytest -m t5x
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.config import trainer_choice
from mpt_jax.convert import t5x as convert
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.base import InitContext, PromptMethod
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from tests.fixtures import real_t5x
from tests.fixtures.real_t5x import NO_EVALUATION, Job, run, start

ROOT = real_t5x.ROOT
pytestmark = real_t5x.NEEDED

STEPS = ("--gin.TRAIN_STEPS=20", "--gin.EVAL_PERIOD=20", "--gin.SAVE_PERIOD=20")
QUICK = ("--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_STEPS=1")
SHIPPED = ROOT / "mpt_jax" / "tasks" / "data" / "tiny_t5"
# Starts from one artifact, so nothing is drawn at random; logs the loss of every step.
SAME = (*STEPS, *NO_EVALUATION, "--gin.STATS_PERIOD=1")
# Source prompts of 150 steps. Those that ship now have 300, so their gradients are small, and Adam,
# which divides by their size, makes rounding visible.
STARTED = ROOT / "tests" / "golden" / "before_packages" / "shipped_mpt_source"
SAME_SOURCE = (
    *SAME,
    f"--gin.INITIAL_ARTIFACT='{STARTED}'",
    "--gin.START_FROM='same'",
    "--gin.LEARNING_RATE=0.03",  # at ten times that, two processes' rounding grows to 0.01
)


def stop(children: list[Job], model_dir: Path) -> list[str]:
    """Ends a job by SIGTERM to its last process, once T5X's loop listens; returns the logs."""
    deadline = time.monotonic() + 1200
    while not (model_dir / "checkpoint_0").exists():  # T5X writes it before its loop
        assert time.monotonic() < deadline and all(child.poll() is None for child in children)
        time.sleep(0.2)
    children[-1].send_signal(signal.SIGTERM)
    logs = [child.finish(75) for child in children]
    assert all("Traceback" not in log.partition("stopping after step")[2] for log in logs)
    return logs


def stage(name: str, *more: str) -> list[str]:
    return [f"--gin_file=gin/{name}.gin", "--gin_file=gin/tiny.gin", *QUICK, *more]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prompts(model_dir: Path) -> dict[str, np.ndarray]:
    params = artifacts.load_artifact(model_dir / "artifact").params
    return {name: np.asarray(value) for name, value in params.items()}


def logged(model_dir: Path, trainer: str) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of training: T5X's TensorBoard file, or our lines."""
    found: dict[str, dict[int, float]] = {}
    if trainer == "own":
        lines = map(json.loads, (model_dir / "metrics.jsonl").read_text().splitlines())
        triples = (
            (name, line["step"], value)
            for line in lines
            if line["folder"] == "train"
            for name, value in line.items()
            if name not in ("folder", "step")
        )
    else:
        triples = _events(model_dir / "train")
    for name, step, value in triples:
        found.setdefault(name, {})[step] = value
    return found


def _events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    for path in folder.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag != "config":
                    yield value.tag, event.step, float(tensor_util.make_ndarray(value.tensor))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A ROOT whose two source stages have been trained by T5X, 20 steps each."""
    root = tmp_path_factory.mktemp("root")
    run("train", *stage("pt_source", *STEPS), root=root)
    # Stopped once, so that the second command resumes.
    child = start("train", *stage("mpt_source", *STEPS, "--gin.STATS_PERIOD=20"), root=root)
    (log,) = stop([child], root / "tiny" / "mpt_source")
    stopped = int(re.findall(r"stopping after step (\d+)", log)[0])
    assert 1 <= stopped < 20
    assert (root / "tiny" / "mpt_source" / f"checkpoint_{stopped}").is_dir()
    log = run("train", *stage("mpt_source", *STEPS), root=root)
    assert f"Starting main loop over steps {stopped}-20" in log
    return root / "tiny"


def by_either(root: Path, name: str, *arguments: str, kind: str = "same") -> dict[str, Path]:
    """The MODEL_DIRs of one stage trained by each of the two trainers."""
    model_dirs = {trainer: root / f"{kind}_{name}_{trainer}" for trainer in ("t5x", "own")}
    for trainer, model_dir in model_dirs.items():
        command = stage(name, *arguments, f"--gin.MODEL_DIR='{model_dir}'")
        run("train", *command, root=root.parent, trainer=trainer)
    return model_dirs


@pytest.fixture(scope="module")
def same_source(root) -> dict[str, Path]:
    """The MODEL_DIRs of one source stage, with distillation, by either trainer."""
    teachers = f"--gin.TEACHERS='{root / 'pt_source' / 'artifact'}'"
    return by_either(root, "mpt_source", *SAME_SOURCE, teachers)


@pytest.fixture(scope="module")
def packed_source(root) -> dict[str, Path]:
    """The same stage with several examples per row."""
    teachers = f"--gin.TEACHERS='{root / 'pt_source' / 'artifact'}'"
    packed = ("--gin_file=gin/runs/packed.gin", "--gin.PACKED_ROWS=6", "--gin.PACK_WINDOW=32")
    return by_either(root, "mpt_source", *SAME_SOURCE, *packed, teachers, kind="packed")


@pytest.fixture(scope="module")
def same_target(root) -> dict[str, Path]:
    """The MODEL_DIRs of one target stage by either trainer."""
    source = f"--gin.INITIAL_ARTIFACT='{root / 'mpt_source' / 'artifact'}'"
    return by_either(root, "mpt_target", *SAME, source)


# As gin/tiny.gin builds them; nothing is drawn, and learning rates are a tenth, for the reason of
# SAME_SOURCE.
TEACHERS = artifacts.load_artifact(SHIPPED / "teachers")
MIXED = {
    "attempt_target": (
        ATTEMPT(20, TEACHERS.runs.run_names, temperature=348.0),
        ("--gin.LEARNING_RATE=0.03", "--gin.ATTENTION_LEARNING_RATE=0.01"),
    ),
    "crosspt_target": (
        CrossPT(20, TEACHERS.runs.run_names, router="softmax", temperature=348.0),
        (
            "--gin.SOURCES=%SOURCE_TASKS",
            "--gin.REPARAMETERIZE=[]",
            "--gin.ROUTER='softmax'",
            "--gin.LEARNING_RATE=0.002",
            "--gin.SOURCE_LEARNING_RATE=0.005",
            "--gin.ROUTER_LEARNING_RATE=0.01",
        ),
    ),
}


def started(folder: Path, method: PromptMethod) -> artifacts.Artifact:
    """An artifact with the teachers as sources and otherwise random values, since the two trainers
    would draw different ones."""
    (checkpoint,) = SHIPPED.glob("checkpoint_*")
    embedding = np.asarray(convert.load_t5x(checkpoint)["token_embedder"]["embedding"], np.float32)
    runs = Runs(["toy_boolq"])
    params = method.init(jax.random.key(0), runs, InitContext(jnp.asarray(embedding)))
    params["sources"] = jnp.reshape(TEACHERS.folded(), params["sources"].shape)
    digests = {
        f"{name}_sha256": TEACHERS.config[f"{name}_sha256"]
        for name in ("embedding", "backbone", "vocabulary")
    }
    artifacts.save_artifact(
        folder, method, params, runs, digests=digests, backbone="tiny_t5", step=0
    )
    return artifacts.load_artifact(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A ROOT where no stage has run: the source prompts are the shipped teachers."""
    folder = tmp_path_factory.mktemp("bare") / "tiny"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def read(root) -> Path:
    """ROOT after evaluation and inference of the source stage's checkpoint."""
    checkpoint = f"--gin.CHECKPOINT_PATH='{root / 'mpt_source' / 'checkpoint_20'}'"
    tasks = ("--gin.TASK_NAMES=%SOURCE_TASKS", "--gin.EVAL_TASKS=['toy_qqp']", checkpoint)
    files = {
        script: (
            f"--gin_file=gin/{script}.gin",
            "--gin_file=gin/methods/mpt.gin",
            "--gin_file=gin/tiny.gin",
            *tasks,
        )
        for script in ("eval", "infer")
    }
    run("eval", *files["eval"], root=root.parent)
    for trainer in ("t5x", "own"):
        # This library's trainer reads the artifact, and T5X its checkpoint, with equal prompts.
        more = [f"--gin.INFER_OUTPUT_DIR='{root / f'infer_{trainer}'}'"]
        if trainer == "own":
            artifact = root / "mpt_source" / "artifact"
            more += ["--gin.CHECKPOINT_PATH=''", f"--gin.INITIAL_ARTIFACT='{artifact}'"]
        run("infer", *files["infer"], *more, root=root.parent, trainer=trainer)
    return root


def test_t5x_checkpoint_is_below_a_twentieth_of_backbone(root):
    (backbone,) = SHIPPED.glob("checkpoint_*")
    assert 0 < size(root / "mpt_source" / "checkpoint_20") < size(backbone) / 20


def test_t5x_teachers_are_saved_as_artifact(root):
    teachers = artifacts.load_artifact(root / "pt_source" / "artifact")
    assert teachers.method.name == "prompt_tuning" and teachers.runs.num_rows == 6
    assert teachers.runs.num_groups == 6
    assert teachers.config["step"] == 20


def test_t5x_training_writes_expected_files(root):
    folder = root / "mpt_source"
    assert (folder / "config.gin").is_file() and (folder / "model-info.txt").is_file()
    assert "encoder" not in (folder / "model-info.txt").read_text()
    lines = (folder / "inference_eval" / "toy_sst2-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20]


def test_t5x_resumed_run_equals_uninterrupted_run(root):
    """Bit for bit, on one CPU device."""
    teachers = f"--gin.TEACHERS='{root / 'pt_source' / 'artifact'}'"
    model_dir = f"--gin.MODEL_DIR='{root / 'whole'}'"
    arguments = stage("mpt_source", *STEPS, *NO_EVALUATION, teachers, model_dir)
    run("train", *arguments, root=root.parent)
    once, twice = prompts(root / "whole"), prompts(root / "mpt_source")
    for name in once:
        np.testing.assert_array_equal(once[name], twice[name], err_msg=name)


@pytest.mark.parametrize("stage", ["same_source", "packed_source", "same_target"])
def test_both_trainers_same_losses_and_prompts(stage, request):
    folders = request.getfixturevalue(stage)
    theirs, ours = (logged(folders[trainer], trainer) for trainer in ("t5x", "own"))
    assert ("term/kl" in same_metrics(theirs, ours)) == (stage != "same_target")
    per_row = list(ours["batch/examples_per_row"].values())
    assert per_row == pytest.approx(list(theirs["batch/examples_per_row"].values()))
    assert min(per_row) > 1 if stage == "packed_source" else set(per_row) == {1.0}
    started = artifacts.load_artifact(STARTED).params
    learned = same_prompts(folders)
    if stage != "same_target":
        for name, value in learned.items():
            assert np.abs(value - np.asarray(started[name])).max() > 1e-3, f"{name} did not move"


def same_metrics(theirs: dict, ours: dict) -> set[str]:
    """Compares the metrics logged in 20 steps; returns their names."""
    terms = {
        name for name in ours if name.startswith(("loss", "term/", "token_accuracy", "attention"))
    }
    assert terms <= set(theirs) and "loss" in terms
    for name in terms:  # ours of a task only at steps that had examples of it
        steps = list(ours[name])
        values = [[found[name][step] for step in steps] for found in (theirs, ours)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5, err_msg=name)
    assert list(ours["loss"]) == list(range(1, 21))
    return terms


def same_prompts(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """Compares the artifacts of both trainers; returns that of this library's trainer."""
    learned, theirs = prompts(folders["own"]), prompts(folders["t5x"])
    assert set(theirs) == set(learned)
    for name, value in theirs.items():
        np.testing.assert_allclose(value, learned[name], rtol=0, atol=1e-5, err_msg=name)
    return learned


@pytest.mark.parametrize("stage", MIXED)
def test_both_trainers_mixing_methods_same_prompts(stage, bare):
    method, rates = MIXED[stage]
    first = started(bare / f"{stage}_start", method)
    origin = (f"--gin.INITIAL_ARTIFACT='{first.path}'", "--gin.START_FROM='same'")
    folders = by_either(bare, stage, *SAME, *rates, *origin)
    names = same_metrics(*(logged(folders[trainer], trainer) for trainer in ("t5x", "own")))
    assert any(name.startswith("attention/toy_sst2") for name in names)
    for name, learned in same_prompts(folders).items():
        moved = np.abs(learned - np.asarray(first.params[name])).max()
        if stage == "attempt_target" and name == "sources":
            assert moved == 0, "T5X's artifact has them too, or the two would not be the same"
        else:
            assert moved > 1e-3, f"{name} did not move"


def test_t5x_resumed_run_with_draws_equals_uninterrupted_run(bare):
    """The temperature falls with a step counter, which T5X's checkpoints contain."""
    drawn = ("--gin.ANNEALING_STEPS=10", "--gin.TARGET_TASKS=['toy_boolq','toy_rte']")
    given = stage("crosspt_target", *STEPS, *NO_EVALUATION, *drawn)
    whole, parts = (f"--gin.MODEL_DIR='{bare / name}'" for name in ("whole", "parts"))
    run("train", *given, whole, root=bare.parent)
    (log,) = stop([start("train", *given, parts, root=bare.parent)], bare / "parts")
    stopped = int(re.findall(r"stopping after step (\d+)", log)[0])
    assert 1 <= stopped < 20
    for step in (stopped, 20):
        if step == 20:
            run("train", *given, parts, root=bare.parent)
        saved = convert.load_t5x(bare / "parts" / f"checkpoint_{step}")
        assert np.asarray(saved["prompt"]["clock"]).tolist() == [step]
    once, twice = prompts(bare / "whole"), prompts(bare / "parts")
    assert "clock" not in once and np.abs(once["router"]).max() > 1e-3
    for name in once:
        np.testing.assert_array_equal(once[name], twice[name], err_msg=name)


def test_t5x_eval_writes_metrics_of_checkpoint(read):
    metrics = read / "eval" / "inference_eval" / "toy_qqp-metrics.jsonl"
    assert json.loads(metrics.read_text())["step"] == 20


def test_both_trainers_same_predictions(read):
    texts = {}
    for trainer in ("t5x", "own"):
        (written,) = (read / f"infer_{trainer}").glob("toy_qqp-predict.jsonl-00000-of-00001")
        texts[trainer] = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(texts["t5x"]) == 200 and texts["t5x"] == texts["own"]


def test_t5x_two_processes_stop_together_and_match_one(root, same_source):
    """The environment names the processes; T5X alone would run two separate jobs."""
    model_dir = root / "two"
    arguments = stage(
        "mpt_source",
        *SAME_SOURCE,
        "--gin.STATS_PERIOD=20",
        f"--gin.TEACHERS='{root / 'pt_source' / 'artifact'}'",
        f"--gin.MODEL_DIR='{model_dir}'",
        "--gin.paths.under.shared_filesystem=True",
    )

    def both() -> list[Job]:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        return [
            start("train", *arguments, root=root.parent, **job, JAX_PROCESS_ID=str(index))
            for index in range(2)
        ]

    logs = stop(both(), model_dir)
    (stopped,) = {int(re.findall(r"stopping after step (\d+)", log)[0]) for log in logs}
    assert 1 <= stopped < 20 and (model_dir / f"checkpoint_{stopped}").is_dir()
    for log in [child.finish() for child in both()]:
        assert f"Starting main loop over steps {stopped}-20" in log
    learned = prompts(same_source["own"])
    for name, value in prompts(model_dir).items():
        # Sums over the batch have another order; the measured difference was at most 2.6e-5.
        np.testing.assert_allclose(value, learned[name], rtol=0, atol=1e-4, err_msg=name)


def test_t5x_touches_only_recorded_members(root, same_target, read):
    """Another T5X may use more or fewer members. Then check that train_state_adapter supports them,
    and update the list here and in docs/t5x.md."""
    known = json.loads((Path(__file__).parent / "touched.json").read_text())
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted((root.parent / "records").iterdir()):
        script = found.setdefault(path.name.partition("-")[0], {})
        for kind, names in json.loads(path.read_text()).items():
            script.setdefault(kind, set()).update(names)
    listed = {
        script: {kind: sorted(names) for kind, names in kinds.items() if names}
        for script, kinds in sorted(found.items())
    }
    assert listed == known, json.dumps(listed, indent=2)


def test_real_t5x_finds_gin_files_from_an_empty_folder(tmp_path):
    folder, root = tmp_path / "empty", tmp_path / "root"
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        "MPT_JAX_ROOT": str(root),
        "JAX_PLATFORMS": "cpu",
    }
    # T5X itself is imported, not this library's t5x.py, which would add the folder.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(str(trainer_choice.find_real().origin)).parents[1]), environment["PYTHONPATH"]]
    )
    command = [sys.executable, "-m", "t5x.train", "--gin_file=gin/mpt_source.gin"]
    command += ["--gin_file=gin/tiny.gin", "--gin.TRAIN_STEPS=1", *QUICK, *NO_EVALUATION]
    call = functools.partial(
        subprocess.run, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    path = call([sys.executable, "-m", "mpt_jax", "gin-path"]).stdout.strip()
    without = call(command)
    assert without.returncode and "gin/mpt_source.gin" in without.stderr
    ended = call([*command, f"--gin_search_paths={path}"])
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert list((root / "tiny" / "mpt_source").glob("checkpoint_1"))

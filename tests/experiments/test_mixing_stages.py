"""Stages of ATTEMPT and CrossPT on the toy suite, from their gin files to predictions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.runtime import paths
from mpt_jax.serving import export
from tests.fixtures.processes import run_python, run_script
from tests.fixtures.training_runs import assert_same_bits, prompts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TEACHERS = paths.shipped(name="tiny_t5/teachers")
TARGETS = ["toy_boolq", "toy_rte"]
SHORT = {"BATCH_SIZE": 8, "EVALUATOR_NUM_EXAMPLES": 4, "EVAL_STEPS": 1, "TRAIN_STEPS": 4}
SAVED = {"SAVE_PERIOD": 3, "EVAL_PERIOD": 6, "TRAIN_STEPS": 6}
ANNEALED = {"ANNEALING_STEPS": 4}
SHOWN = {"EVAL_TASKS": ["toy_rte"], "EVAL_BATCH_SIZE": 100, "TASK_NAMES": TARGETS}


class Job(NamedTuple):
    """One command line: names of gin files, macros, entry point, and the step after which SIGTERM
    interrupts it (0 for never)."""

    files: list[str]
    macros: dict[str, Any]
    entry: str = "train"
    stop_after: int = 0


# Runs in a separate process, like the command line, without shape checks. Each job prints its
# result or its error.
SCRIPT = """
import json, os, signal, sys
from mpt_jax.config import gin_utils
from mpt_jax.training import trainer
take = trainer.Trainer.train
for files, macros, entry, stop_after in json.loads(sys.argv[1]):
    def train(self, batch, stop_after=stop_after):
        take(self, batch)
        if self.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Trainer.train = train
    bindings = [f"{macro} = {value!r}" for macro, value in macros.items()]
    try:
        found = gin_utils.run_stage([f"gin/{name}.gin" for name in files], bindings, entry)
    except SystemExit as stopped:
        found = stopped.code
    except ValueError as error:
        found = str(error)
    print(json.dumps(found))
"""


def run(root: Path, *jobs: Job) -> list[Any]:
    """Runs jobs one after another below a root; returns their results, errors or exit codes."""
    printed = run_script(SCRIPT, json.dumps(jobs), **{paths.ROOT_VARIABLE: str(root)})
    return [json.loads(line) for line in printed.splitlines()[-len(jobs) :]]


def finished(found: list[Any]) -> bool:
    """Checks that all training stages returned scores."""
    assert all(isinstance(scores, dict) for scores in found), found
    return True


def stage(name: str, label: str, *files: str, stop_after: int = 0, **macros: Any) -> Job:
    """Returns a training stage on two targets, with a label as folder name."""
    macros = {"TARGET_TASKS": TARGETS, **SHORT, **macros, "STAGE": label}
    return Job([f"{name}_target", "tiny", *files], macros, stop_after=stop_after)


def reading(entry: str, label: str, method: str, **macros: Any) -> Job:
    """Returns an evaluation or inference job."""
    files = [entry, f"methods/{method}", "tiny"]
    return Job(files, {**SHOWN, **macros, "STAGE": label}, entry)


def load(root: Path, label: str) -> artifacts.Artifact:
    return artifacts.load_artifact(root / "tiny" / label / "artifact")


# --- Training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Root with a run of each method, and a CrossPT run that was interrupted and resumed."""
    root = tmp_path_factory.mktemp("root")
    drawn = {**SAVED, **ANNEALED}
    found = run(
        root,
        stage("attempt", "attempt", **SAVED),
        stage("crosspt", "crosspt", **drawn),
        stage("crosspt", "stopped", **drawn, stop_after=3),
        stage("crosspt", "stopped", **drawn),
    )
    assert found.pop(2) == 75 and finished(found)
    assert (root / "tiny" / "stopped" / "checkpoint_3").is_dir()
    return root


def test_crosspt_stage_resumed_while_sampling_same_prompts(root):
    whole, stopped = (prompts(root / "tiny" / name) for name in ("crosspt", "stopped"))
    assert_same_bits(whole, stopped)
    assert np.any(whole["router"] != 0) and np.any(whole["router"][0] != whole["router"][1])


def test_mixing_stages_keep_frozen_sources_and_train_prompts(root):
    teachers, found = artifacts.load_artifact(TEACHERS), load(root, "attempt")
    names = list(found.method.sources)
    assert names == list(teachers.runs.run_names)
    np.testing.assert_array_equal(found.params["sources"], teachers.folded())
    first = teachers.folded()[0]
    assert all(np.any(target != first) for target in np.asarray(found.params["target"]))
    assert np.any(found.params["down"][0] != found.params["down"][1]), "separate attention"
    moved = load(root, "crosspt").params
    assert moved["sources"].shape[:2] == (1, 3) and moved["private"].shape[0] == 2
    assert set(moved) == {"sources", "private", "router"}, "the output of the MLPs, without them"


def test_attempt_stage_logs_weights_of_candidates(root):
    lines = (root / "tiny" / "attempt" / "metrics.jsonl").read_text().splitlines()
    last = [x for x in map(json.loads, lines) if x["folder"] == "train" and "loss" in x][-1]
    weights = {name: value for name, value in last.items() if name.startswith("attention/")}
    of_run = [value for name, value in weights.items() if name.endswith("/toy_rte")]
    assert len(of_run) == 7 and sum(of_run) == pytest.approx(1, abs=1e-4)


# --- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "groups"), [("attempt", "independent"), ("crosspt", "joint")]
)  # fmt: skip
def test_mixing_stage_checkpoint_and_artifact_same_predictions(method, groups, root):
    folder = root / "tiny" / method
    artifact = {"INITIAL_ARTIFACT": str(folder / "artifact"), "GROUPS": groups}
    if method == "crosspt":
        artifact |= ANNEALED
    # CrossPT's checkpoint has MLPs, which the artifact beside it lacks.
    checkpoint = {**artifact, "CHECKPOINT_PATH": str(folder / "checkpoint_6")}
    jobs = [
        reading(entry, f"{entry}_{method}_{label}", method, **macros)
        for entry in ("eval", "infer")
        for label, macros in (("artifact", artifact), ("checkpoint", checkpoint))
    ]
    first, second, *files = run(root, *jobs)
    assert list(first) == ["0"] and list(second) == ["6"]
    assert first["0"] == second["6"] and "toy_rte" in first["0"]
    texts = [Path(written).read_text() for (written,) in files]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 200


def test_eval_unusable_checkpoint_or_artifact_raises(root):
    """Checkpoints do not contain frozen sources."""
    folder = root / "tiny" / "attempt"
    known = {"GROUPS": "independent", "CHECKPOINT_PATH": str(folder / "checkpoint_6")}
    others = {"SOURCE_TASKS": ["toy_rte", "toy_sst2"], "START_FROM": "first"}
    said = run(
        root,
        reading("eval", "none", "attempt", **known),
        reading("eval", "start", "attempt", **known, INITIAL_ARTIFACT=TEACHERS),
        reading("eval", "lacking", "attempt", **known, INITIAL_ARTIFACT=TEACHERS, **others),
        stage("crosspt", "long", ANNEALING_STEPS=5),
        stage("attempt", "bare", INITIAL_ARTIFACT=None),
    )
    assert "no artifact provides them" in said[0] and "that its job wrote" in said[0]
    assert "Unknown run 'toy_boolq'" in said[1]
    assert "Unknown run 'toy_rte'" in said[2]
    assert "anneals over 5 steps, but a run has only 4" in said[3] and "ANNEALING_STEPS" in said[3]
    assert "Set INITIAL_ARTIFACT" in said[4]


def test_predict_and_export_accept_mixing_artifacts(root, tmp_path):
    """`mpt-jax predict` reads CrossPT's artifact; `mpt-jax export` of ATTEMPT's loads again."""
    artifact = root / "tiny" / "crosspt" / "artifact"
    requests = [{"task": task, "inputs": f"{task} : a b"} for task in TARGETS]
    answers = []
    for more in ("", "--folded"):
        command = (
            f"-m mpt_jax.serving.predict --prompts {artifact} --input-length 16 --target-length 4"
        )
        child = run_python(
            *shlex.split(f"{command} --batch-size 2 {more}"),
            stdin="".join(json.dumps(x) + "\n" for x in requests),
        )
        answers.append([json.loads(line) for line in child.stdout.splitlines()])
    for one, other in zip(*answers, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    found = []
    for name in ("one", "two"):
        prompts = root / "tiny" / "attempt" / ("artifact" if name == "one" else "artifacts/toy_rte")
        command = (
            f"-m mpt_jax.serving.export --prompts {prompts} --out {tmp_path / name} --platforms cpu"
        )
        run_python(*shlex.split(f"{command} --input-lengths 8 --target-length 4"))
        loaded = export.load(tmp_path / name)
        row = loaded.row("toy_rte")
        found.append([loaded.score([[5, 6, 1]], [[7, 1]], [row]), *loaded.predict([[9, 1]], [row])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found)
    assert np.isfinite(found[0][0]).all()


# --- Other forms ---------------------------------------------------------------------------------


def test_mixing_stages_packed_joint_and_fleet_write_artifacts(tmp_path):
    packed = {"PACKED_ROWS": 3, "PACK_WINDOW": 24}
    lengths = {"COMPOSE_BY": "private_cat", "PRIVATE_LENGTH": {"toy_boolq": 4, "toy_rte": 9}}
    rates = {"SHOTS": [4, 8], "LEARNING_RATES": [0.1, 0.3], "TARGET_TASKS": ["toy_rte"]}
    fleet = {**rates, "BATCH_SIZE": 4}
    found = run(
        tmp_path,
        stage("attempt", "packed_attempt", "runs/packed", **packed, GROUPS="joint"),
        stage("crosspt", "packed_crosspt", "runs/packed", **packed, **lengths, **ANNEALED),
        stage("attempt", "joint", GROUPS="joint"),
        stage("attempt", "attempt_fleet", "runs/fleet", **fleet),
        stage("crosspt", "crosspt_fleet", "runs/fleet", **fleet, **ANNEALED),
        stage(
            "crosspt",
            "own",
            "ablations/crosspt_from_teachers",
            GROUPS="independent",
            **ANNEALED,
        ),
    )
    assert finished(found)
    assert load(tmp_path, "joint").params["down"].shape[0] == 1
    assert [len(x) for x in load(tmp_path, "packed_crosspt").plain()] == [20 + 4, 20 + 9]
    own = load(tmp_path, "own").params["sources"]
    teachers = artifacts.load_artifact(TEACHERS).folded()
    assert own.shape == (2, *teachers.shape)
    for sources in own:
        near, far = (np.abs(sources - rows).mean() for rows in (teachers, teachers[::-1]))
        assert 0 < near < far / 5, "each source starts from its task's teacher"
    assert set(load(tmp_path, "own").params) == {"sources", "private", "router"}
    names = [f"toy_rte_k{k}_s0_lr{rate}" for k in (4, 8) for rate in (0.1, 0.3)]
    for method, learns in (("attempt", "target"), ("crosspt", "private")):
        folder = tmp_path / "tiny" / f"{method}_fleet"
        whole = load(tmp_path, f"{method}_fleet")
        assert sorted(path.name for path in (folder / "artifacts").iterdir()) == sorted(names)
        assert len({np.asarray(x).tobytes() for x in whole.params[learns]}) == 4
        for row, name in enumerate(whole.runs.run_names):
            one = artifacts.load_artifact(folder / "artifacts" / name)
            np.testing.assert_array_equal(one.params[learns][0], whole.params[learns][row])

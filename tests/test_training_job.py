"""Whole runs of `train()` on files: tasks without a validation split, and data that changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import seqio
import tensorflow as tf

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.tasks import files
from mpt_jax.training.selection import EarlyStoppingAction, SelectBest
from tests.fixtures import memory_tasks
from tests.fixtures.training_runs import BATCH, assert_same_bits, build, dataset, prompts, run

LENGTHS = {"inputs": 12, "targets": 4}
TEXTS = {"inputs": "{q}", "targets": "{a}"}
pytestmark = pytest.mark.usefixtures("byte_vocabulary")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory. Removes the tasks of each test, and restores mixtures."""
    monkeypatch.chdir(tmp_path)
    tasks = seqio.TaskRegistry.names()
    mixtures = {name: seqio.MixtureRegistry.get(name) for name in seqio.MixtureRegistry.names()}
    yield tmp_path
    for name in seqio.TaskRegistry.names() - tasks:
        seqio.TaskRegistry.remove(name)
    for name in list(seqio.MixtureRegistry.names()):
        seqio.MixtureRegistry.remove(name)
    for name, mixture in mixtures.items():
        seqio.MixtureRegistry.add_provider(name, mixture)


def write(name: str, numbers: range, parity: int = 0) -> str:
    rows = [{"q": f"number {i}", "a": str((i + parity) % 2)} for i in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def register(name: str, **given: str) -> None:
    """Registers a task of files, again if a test has changed them."""
    seqio.TaskRegistry.remove(name)
    for mixture in list(seqio.MixtureRegistry.names()):
        seqio.MixtureRegistry.remove(mixture)
    files.register(name, **{**TEXTS, **given})


def job(runs: Runs, model_dir: str, split: str = "validation", **overrides):
    """The arguments of a run that evaluates losses and scores, and selects the best step."""
    model = build(runs=runs)
    data = dataset(runs, EqualQuotas(BATCH, 1), task_feature_lengths=LENGTHS)
    held_out = dataclasses.replace(data, split=split)
    return {
        "model_dir": model_dir,
        "model": model,
        "data": data,
        "train_eval_dataset_cfg": held_out,
        "infer_eval_dataset_cfg": dataclasses.replace(held_out, shuffle=False),
        "actions": {"INFER_EVAL": [SelectBest(model, model_dir)]},
        **overrides,
    }


def messages(caplog, part: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if part in r.getMessage()]


# --- Tasks without a validation split --------------------------------------------------------


def test_train_task_of_train_alone_keeps_last_step(backbone, caplog):
    register("trj_alone", train=write("train.jsonl", range(9)))
    with caplog.at_level("INFO", logger="absl"):
        assert run(backbone, **job(Runs(["trj_alone"]), "run")) == {}
    (warning,) = messages(caplog, "no 'validation' split")
    assert warning == (
        "These runs are not evaluated, because their tasks have no 'validation' split: trj_alone. "
        "Their prompts are those of the last step. To evaluate them and select the best step, add "
        "this split to the tasks."
    )
    assert messages(caplog, "their scores did not select a best step: trj_alone")
    assert not messages(caplog, "fewer than 100 examples")  # nothing is selected
    config = artifacts.load_artifact("run/artifact").config
    assert config["step"] == 8 and config["metrics"] == {"scores": {}}
    card = Path("run/artifact/README.md").read_text()
    assert "`trj_alone` was not evaluated, because its task has no validation split" in card


def falling():
    """A metric that is lower at every evaluation."""
    calls = itertools.count()
    return lambda targets, predictions: {"score": -float(next(calls))}


def test_train_run_without_validation_beside_others_keeps_last_step(backbone, caplog):
    register("trj_beside", train=write("train.jsonl", range(9)))
    parity = lambda i: tf.strings.as_string(i % 2)  # noqa: E731
    sizes = {"train": 10, "validation": 4}
    memory_tasks.register_numbers("trj_falling", parity, sizes, [falling()])
    runs = Runs(["trj_falling", "trj_beside"], groups="independent")
    with caplog.at_level("WARNING", logger="absl"):
        run(backbone, **job(runs, "run"))
    assert len(messages(caplog, "split: trj_beside. Their prompts are those of the la")) == 1
    (small,) = messages(caplog, "best step is selected on fewer than 100 examples")
    assert "of the 'validation' split" in small and "percent: trj_falling (4). To keep" in small
    config = json.loads(Path("run/artifact/config.json").read_text())
    assert config["metrics"]["best_step"] == [4, 8]
    assert config["metrics"]["best_score"] == [0.0, None]
    assert list(config["metrics"]["scores"]) == ["trj_falling"]
    # The same job without evaluations ends with the parameters of its last step.
    nothing = dict.fromkeys(["train_eval_dataset_cfg", "infer_eval_dataset_cfg", "actions"])
    run(backbone, **job(runs, "last", **nothing))
    run(backbone, **job(runs, "best", **nothing), steps=4)
    found, last, best = prompts(Path("run")), prompts(Path("last")), prompts(Path("best"))
    for row, expected in enumerate((best, last)):
        assert_same_bits(*({n: x[row] for n, x in tree.items()} for tree in (found, expected)))


def test_train_run_without_validation_in_joint_group_warning_names_it(backbone, caplog):
    register("trj_joint", train=write("train.jsonl", range(9)))
    memory_tasks.register_numbers(
        "trj_scored",
        lambda i: tf.strings.as_string(i % 2),
        {"train": 10, "validation": 4},
        [falling()],
    )
    with caplog.at_level("WARNING", logger="absl"):
        run(backbone, **job(Runs(["trj_scored", "trj_joint"]), "run"))
    assert messages(caplog, "trj_joint. The other runs of their group select its best step")
    assert artifacts.load_artifact("run/artifact").config["metrics"]["best_step"] == [4]


def test_train_misspelled_split_raises(backbone):
    register("trj_typo", train=write("train.jsonl", range(9)))
    with pytest.raises(ValueError, match="has a 'validaton' split"):
        run(backbone, **job(Runs(["trj_typo"]), "run", split="validaton"))


def test_train_action_without_data_raises(backbone):
    register("trj_action", train=write("train.jsonl", range(9)))
    stop = EarlyStoppingAction(("trj_action", "loss"), mode="min", patience=1)
    given = job(Runs(["trj_action"]), "run", actions={"TRAIN_EVAL": [stop]})
    message = r"TRAIN_EVAL'\] \(EarlyStoppingAction\) would never run, because no task has a 'val"
    with pytest.raises(ValueError, match=message):
        run(backbone, **given)


# --- Data that changes -----------------------------------------------------------------------


def test_train_resume_with_changed_file_raises_and_with_restored_file_resumes(backbone):
    def start(**given):
        register("trj_file", **{"data": "data.jsonl", **given})
        run(backbone, **job(Runs(["trj_file"]), "run", **({"steps": 4} if first else {})))

    first = True
    write("data.jsonl", range(40))
    start()
    first = False
    record = json.loads(Path("run/best/history.json").read_text())["data"]["trj_file"]
    size = json.loads(Path("run/run.jsonl").read_text())["data"]["trj_file"]["splits"]
    assert record["splits"] == {"validation": size["validation"]}
    write("data.jsonl", range(60))
    rows = size["train"]["rows"]
    message = (
        rf"The data of the job in run has changed .*train split of task 'trj_file': saved {rows} "
        r"rows \(sha256 \w{12}\), current \d+ rows \(sha256 \w{12}\)(.|\n)*another MODEL_DIR"
    )
    with pytest.raises(ValueError, match=message):
        start()
    write("data.jsonl", range(40), parity=1)  # other labels, as many rows
    with pytest.raises(ValueError, match="validation split of task 'trj_file': saved"):
        start()
    write("data.jsonl", range(40))
    with pytest.raises(ValueError, match=r"inputs of task 'trj_file': saved '\{q\}', current 'x "):
        start(inputs="x {q}")
    Path("data.jsonl").rename("moved.jsonl")
    start(data="moved.jsonl")
    config = json.loads(Path("run/artifact/config.json").read_text())
    assert config["data"]["trj_file"]["splits"] == size
    card = Path("run/artifact/README.md").read_text()
    assert f"| train |  | {rows} | `{size['train']['sha256']}` |" in card


@pytest.mark.slow
def test_train_resume_with_changed_validation_file_raises(backbone):
    given = {"train": write("train.jsonl", range(9)), "validation": write("dev.jsonl", range(4))}
    register("trj_dev", **given)
    run(backbone, **job(Runs(["trj_dev"]), "run"), steps=4)
    write("dev.jsonl", range(5))
    register("trj_dev", **given)
    with pytest.raises(ValueError, match="validation split of task 'trj_dev': saved 4 rows .* 5 r"):
        run(backbone, **job(Runs(["trj_dev"]), "run"))

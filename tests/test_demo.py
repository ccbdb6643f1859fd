"""The demo's bookkeeping and its report, on figures made up for the purpose."""

import json
import re

import numpy as np
import pytest

from mpt_jax import artefacts, demo, demo_report, experiment, results
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.results import Result
from mpt_jax.runs import Runs

SOURCES = ("toy_sst2", "toy_squad")
P, H = 2, 4


def test_a_finished_demo_is_kept_and_an_interrupted_one_goes_on(tmp_path):
    root = tmp_path / "demo"
    for number in (1, 2):
        root.mkdir()
        demo.set_aside_finished(root)
        assert root.is_dir(), "nothing was finished"
        (root / results.FILE).write_text(str(number))
        demo.set_aside_finished(root)
        assert not root.exists()
        assert (tmp_path / f"demo.{number}" / results.FILE).read_text() == str(number)


@pytest.mark.parametrize("grouped", [True, False])
def test_every_target_and_seed_is_one_run(grouped, tmp_path, monkeypatch):
    """Scores come back under the right task and seed, whatever the jobs are."""
    jobs = []

    def run(job, root):
        given = dict(binding.split(" = ", 1) for binding in job.arguments(root))
        names = json.loads(given["RUN_NAMES"])
        jobs.append(given)
        folder = root / job.name
        (folder / "inference_eval").mkdir(parents=True)
        record = {"trainable_parameters": 10 * len(names), "parameters": 1000}
        record["method_config"] = {"prompt_length": 20}
        (folder / "run.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "metrics.jsonl").write_text("")
        for name in names:
            accuracy = float(name[-1]) + 10 * ("rte" in name)
            line = json.dumps({"step": 1, "accuracy": accuracy})
            (folder / "inference_eval" / f"{name}-metrics.jsonl").write_text(line + "\n")

    monkeypatch.setattr(experiment.Stage, "run", run)
    method = demo.Method("PT", ("gin/pt_target.gin",), 0.5, seeds=(1, 2), grouped=grouped)
    result = demo.adapt(tmp_path, method, ("toy_rte", "toy_cb"), 32)
    assert result.scores == {
        "toy_rte": {"accuracy": [11.0, 12.0]},
        "toy_cb": {"accuracy": [1.0, 2.0]},
    }
    assert result.parameters == 10 and len(jobs) == (1 if grouped else 4)
    assert (result.seeds, result.prompt_length) == ((1, 2), 20)
    given = jobs[0]
    runs = ["toy_rte_k32_s1", "toy_rte_k32_s2", "toy_cb_k32_s1", "toy_cb_k32_s2"]
    assert json.loads(given["RUN_NAMES"]) == (runs if grouped else runs[:1])
    steps, rows = demo.FEW
    assert (given["TRAIN_STEPS"], given["WARMUP_STEPS"]) == (str(steps), str(steps // 10))
    assert given["BATCH_SIZE"] == str(rows * (4 if grouped else 1))
    assert (given["LEARNING_RATE"], json.loads(given["ROOT"])) == ("0.5", str(tmp_path))


def test_mpt_keeps_the_papers_ratio_of_learning_rates(tmp_path):
    found = {method.name: method for method in demo.methods(tmp_path)}
    mpt, pt = found["MPT"], found["PT"]
    assert mpt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "TASK_LEARNING_RATE = 0.4")
    assert pt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "WARMUP_STEPS = 20")


def test_majority_is_counted_on_the_test_split():
    assert demo.majority_shares(["toy_boolq", "toy_cb"]) == {"toy_boolq": 50.0, "toy_cb": 33.5}


def result(name: str, rte: list[float], d2t: list[float], folder: str) -> Result:
    scores = {
        "toy_rte": {"f1": [0.0] * len(rte), "accuracy": rte, "rank_accuracy": [v + 1 for v in rte]},
        "toy_d2t": {"exact_match": d2t, "f1": [v + 5 for v in d2t]},
    }
    return Result(name, 32, scores, 2560.0, 12.4, (folder,), tuple(range(len(rte))))


@pytest.fixture
def root(tmp_path):
    """What the stages of a demo leave, as far as the report reads it."""
    rng = np.random.default_rng(0)
    runs = Runs(SOURCES)
    digests = {"embedding_sha256": "0", "vocabulary_sha256": None, "backbone": "tiny", "step": 3}
    table = rng.normal(size=(2, P, H))
    factors = {
        "shared": rng.normal(size=(1, P, H)),
        "task_left": np.ones((2, P, 1)),
        "task_right": np.ones((2, 1, H)),
    }
    scores = {"toy_sst2": {"accuracy": 91.25}, "toy_squad": {"exact_match": 80.0, "f1": 85.0}}
    for stage, method, params, group in (
        ("pt_source", PromptTuning(P), {"table": table}, Runs(SOURCES, groups="independent")),
        ("mpt_source", MPT(P), factors, runs),
    ):
        artefacts.save_artefact(
            tmp_path / stage / "artefact", method, params, group, metrics={"scores": scores},
            **digests,
        )  # fmt: skip
    for folder in ("pt_source", "mpt_source", "a", "b", "c"):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = [{"folder": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
        lines.append({"folder": "inference_eval/x", "step": 3, "eval/accuracy": 1.0})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / folder / "metrics.jsonl").write_text(text)
    return tmp_path


def test_the_report_says_what_was_measured(root):
    results = [
        result("PT", [50.0, 52.0, 54.0], [1.0, 2.0, 3.0], str(root / "a")),
        result("MPT", [60.0, 61.0, 62.0], [0.0, 2.0, 4.0], str(root / "b")),
        result("Full fine-tuning", [70.0], [9.0], str(root / "c")),
    ]
    majority = {"toy_rte": 50.0, "toy_d2t": 0.5}
    text = demo_report.write_report(root, results, SOURCES, majority, 123.4)
    text, differences = text.split("MPT minus each, paired by task and seed")
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    # Mean and standard deviation (n - 1), F1 of free text, and their mean over tasks.
    assert re.search(r"52\.0 ± 2\.0 +7\.0 ± 1\.0 +29\.5 +53\.0 +2,560 +12$", rows["PT"])
    assert re.search(r"70\.0 +14\.0 +42\.0", rows["Full fine-tuning"])
    assert re.search(r"50\.0 +0\.5", rows["always the most frequent"])
    assert re.search(r"91\.2 +85\.0", rows["Teachers (PT)"])
    # Six differences 10, 9, 8, -1, 0, 1: mean 4.5, t(5) = 2.5706, standard error 2.0616.
    assert re.search(r"PT +\+4\.5 +-0\.8 \.\. \+9\.8 +6", differences)
    assert "Full fine-tuning" not in differences, "one seed has nothing to pair with"
    page = (root / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "52.0 ± 2.0" in page and not re.search(r"(src|href)=.?https?:", page)


def test_curves_are_those_of_training(root):
    assert demo_report._curve(root / "a") == ([1, 2, 3], [1, 1 / 2, 1 / 3])

"""Bookkeeping of the demo, with synthetic scores."""

import json
from pathlib import Path

import pytest

from mpt_jax.experiments import demo, results, stages
from tests.fixtures import gin_files


def test_set_aside_finished_renames_only_finished_demo(tmp_path):
    root = tmp_path / "demo"
    for number in (1, 2):
        root.mkdir()
        demo.set_aside_finished(root)
        assert root.is_dir(), "an unfinished demo stays"
        (root / results.FILE).write_text(str(number))
        demo.set_aside_finished(root)
        assert not root.exists()
        assert (tmp_path / f"demo.{number}" / results.FILE).read_text() == str(number)


@pytest.mark.parametrize("grouped", [True, False])
def test_demo_adapt_scores_every_target_and_seed(grouped, tmp_path, monkeypatch):
    """Scores are assigned to the right task and seed, for one job and for separate jobs."""
    jobs = []

    def run(job, root):
        bound = dict(binding.split(" = ", 1) for binding in job.arguments(root))
        names = json.loads(bound["RUN_NAMES"])
        jobs.append(bound)
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

    monkeypatch.setattr(stages.Stage, "run", run)
    method = demo.Method(
        "PT", ("gin/pt_target.gin",), 0.5, seeds=(1, 2), grouped=grouped, start="toy_mnli"
    )
    result = demo.adapt(tmp_path, method, ("toy_rte", "toy_cb"), 32)
    assert result.scores == {
        "toy_rte": {"accuracy": [11.0, 12.0]},
        "toy_cb": {"accuracy": [1.0, 2.0]},
    }
    assert result.parameters == 10 and len(jobs) == (1 if grouped else 4)
    assert (result.seeds, result.prompt_length, result.start) == ((1, 2), 20, "toy_mnli")
    bound = jobs[0]
    runs = ["toy_rte_k32_s1", "toy_rte_k32_s2", "toy_cb_k32_s1", "toy_cb_k32_s2"]
    assert json.loads(bound["RUN_NAMES"]) == (runs if grouped else runs[:1])
    steps, rows = demo.FEW
    assert (bound["TRAIN_STEPS"], bound["WARMUP_STEPS"]) == (str(steps), str(steps // 10))
    assert bound["BATCH_SIZE"] == str(rows), "rows of each run"
    assert (bound["LEARNING_RATE"], json.loads(bound["ROOT"])) == ("0.5", str(tmp_path))


def test_demo_stages_bind_only_what_their_gin_files_read(tmp_path, monkeypatch, own_trainer):
    parsed = []

    class Stopped(Exception):
        pass

    def parse(job, root):
        gin_files.parse(job.files, job.arguments(root))
        assert Path(gin_files.value("MODEL_DIR")) == root / job.name
        parsed.append(job.name)
        if job.runs:
            raise Stopped

    monkeypatch.setattr(stages.Stage, "run", parse)
    demo.train_sources(tmp_path)
    for method in demo.methods(tmp_path):
        with pytest.raises(Stopped):
            demo.adapt(tmp_path, method, ("toy_rte",), 32)
    assert len(parsed) == 2 + len(demo.methods(tmp_path))


def test_demo_methods_mpt_keeps_paper_ratio_of_learning_rates(tmp_path):
    by_name = {method.name: method for method in demo.methods(tmp_path)}
    mpt, pt = by_name["MPT"], by_name["PT"]
    assert mpt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "TASK_LEARNING_RATE = 0.4")
    assert pt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "WARMUP_STEPS = 20")


def test_demo_majority_shares_count_test_split():
    assert demo.majority_shares(["toy_boolq", "toy_cb"]) == {"toy_boolq": 50.0, "toy_cb": 33.5}

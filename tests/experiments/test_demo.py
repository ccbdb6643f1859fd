"""The demo's bookkeeping, on figures made up for the purpose."""

import json

import pytest

from mpt_jax.experiments import demo, results, stages


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
    given = jobs[0]
    runs = ["toy_rte_k32_s1", "toy_rte_k32_s2", "toy_cb_k32_s1", "toy_cb_k32_s2"]
    assert json.loads(given["RUN_NAMES"]) == (runs if grouped else runs[:1])
    steps, rows = demo.FEW
    assert (given["TRAIN_STEPS"], given["WARMUP_STEPS"]) == (str(steps), str(steps // 10))
    assert given["BATCH_SIZE"] == str(rows), "of each run"
    assert (given["LEARNING_RATE"], json.loads(given["ROOT"])) == ("0.5", str(tmp_path))


def test_mpt_keeps_the_papers_ratio_of_learning_rates(tmp_path):
    found = {method.name: method for method in demo.methods(tmp_path)}
    mpt, pt = found["MPT"], found["PT"]
    assert mpt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "TASK_LEARNING_RATE = 0.4")
    assert pt.schedule(0.3, 200) == ("LEARNING_RATE = 0.3", "WARMUP_STEPS = 20")


def test_majority_is_counted_on_the_test_split():
    assert demo.majority_shares(["toy_boolq", "toy_cb"]) == {"toy_boolq": 50.0, "toy_cb": 33.5}

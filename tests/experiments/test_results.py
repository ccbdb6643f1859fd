"""Statistics of results, and results on disk."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from mpt_jax.experiments import results
from mpt_jax.experiments.results import Result
from tests.fixtures.processes import ROOT


def result(**scores: list[float]) -> Result:
    seeds = tuple(range(len(next(iter(scores.values())))))
    made = {task: {"accuracy": v, "f1": [0.0] * len(v)} for task, v in scores.items()}
    return Result("PT", 4, made, 10.0, 1.5, (), seeds)


def test_estimate_matches_scipy():
    values = [3.0, 5.0, 4.0, 8.0]
    found = results.estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(found[:4], (5.0, np.std(values, ddof=1), low, high))
    assert found.n == 4
    alone = results.estimate([2.0])
    assert (alone.mean, alone.n) == (2.0, 1) and math.isnan(alone.low)
    with pytest.raises(ValueError, match="mean of an empty list"):
        results.estimate([])


def test_paired_uses_common_tasks_and_seeds():
    new, old = result(a=[1.0, 2.0, 3.0], b=[5.0, 5.0, 5.0]), result(b=[1.0, 2.0], c=[0.0, 0.0])
    old = dataclasses.replace(old, seeds=(2, 0))
    assert results.paired(new, old) == [5.0 - 2.0, 5.0 - 1.0]
    assert results.paired_by_task(new, old) == [3.5]
    more = dataclasses.replace(old, scores={**old.scores, "a": {"accuracy": [2.0, 0.0]}})
    # Pairs are seeds, each the mean of two tasks; tasks as units are means of two seeds.
    assert results.paired(new, more) == [(3.0 + 1.0) / 2, (4.0 + 1.0) / 2]
    assert results.paired_by_task(new, more) == [1.0, 3.5]
    assert new.means() == [3.0, 3.5, 4.0] and new.means(["a"]) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="'PT' and 'PT' have no task and seed in common"):
        results.paired(result(a=[1.0]), result(c=[1.0]))


def test_results_moved_folder_loads_with_new_paths(tmp_path):
    """Stored paths are relative to the folder."""
    root = tmp_path / "demo"
    (root / "targets" / "pt").mkdir(parents=True)
    first = dataclasses.replace(result(a=[1.0, 2.0]), model_dirs=(str(root / "targets" / "pt"),))
    results.save(root, [first], {"toy_cb": 33.5})
    assert results.load(root) == [first]
    assert results.load_majority(root) == {"toy_cb": 33.5}
    moved = root.rename(tmp_path / "demo.1")
    (again,) = results.load(moved)
    assert again.model_dirs == (str(moved / "targets" / "pt"),)
    with pytest.raises(FileNotFoundError, match=r"contains no results.json"):
        results.load(tmp_path)


def test_training_seconds_count_only_training_steps(tmp_path):
    lines = [
        {"folder": "train", "step": 0, "timing/compilation_seconds": 9.0},
        {"folder": "train", "step": 10, "timing/seconds_per_step": 0.5},
        {"folder": "inference_eval/x", "step": 10, "accuracy": 1.0},
        {"folder": "train", "step": 30, "timing/seconds_per_step": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert results.training_seconds(tmp_path) == 10 * 0.5 + 20 * 0.25


def test_read_scores_uses_last_evaluation(tmp_path):
    (tmp_path / "inference_eval").mkdir()
    path = tmp_path / "inference_eval" / "a-metrics.jsonl"
    path.write_text('{"step": 5, "accuracy": 1.0}\n{"step": 9, "accuracy": 2}\n')
    assert results.read_scores(tmp_path, ["a"]) == {"a": {"accuracy": 2.0}}
    with pytest.raises(FileNotFoundError, match="no evaluation of run 'b'"):
        results.read_scores(tmp_path, ["a", "b"])


def test_holm_corrects_p_values_for_their_number():
    found = results.holm([0.01, 0.04, 0.03, float("nan"), 0.005])
    assert found[:3] == pytest.approx([0.03, 0.06, 0.06]) and found[4] == pytest.approx(0.02)
    assert np.isnan(found[3]), "an unknown p-value does not count"
    assert results.holm([0.9, 0.8]) == [1.0, 1.0] and results.holm([]) == []


def test_p_value_is_that_of_a_paired_t_test():
    differences = [1.0, 2.0, 0.5, 1.5]
    t = np.mean(differences) / (np.std(differences, ddof=1) / 2)
    # The t-distribution with 3 degrees of freedom in closed form.
    x = t / np.sqrt(3)
    above = 0.5 - (np.arctan(x) + x / (1 + x**2)) / np.pi
    assert results.p_value(differences) == pytest.approx(2 * above)
    assert np.isnan(results.p_value([1.0]))
    assert np.isnan(results.p_value([2.0, 2.0])), "two equal differences prove nothing"
    assert np.isnan(results.p_value([0.1 + 0.2, 0.3])), "nor do two that differ by rounding"


def test_corrected_verdicts_of_the_method_study():
    """18 of its 40 contrasts survive, none of them MPT minus PT (docs/study/results-crosspt.md)."""
    scores = json.loads((ROOT / "docs" / "benchmarks" / "crosspt.json").read_text())
    methods, cells = ("PT", "SPoT", "ATTEMPT", "MPT", "CrossPT"), ("k=4", "k=16", "k=32", "all")
    mean = {
        (method, cell): np.mean(list(scores[f"{method}, {cell}"]["accuracy"].values()), axis=0)
        for method in methods
        for cell in cells
    }
    pairs = [(c, a, b) for c in cells for a, b in itertools.combinations(methods, 2)]
    corrected = results.holm(
        [results.p_value((mean[b, c] - mean[a, c]).tolist()) for c, a, b in pairs]
    )
    survive = [pair for pair, p in zip(pairs, corrected, strict=True) if p < 0.05]
    assert len(pairs) == 40 and len(survive) == 18
    assert not any((a, b) == ("PT", "MPT") for _, a, b in survive)
    primary = results.holm(
        [results.p_value((mean[b, c] - mean[a, c]).tolist()) for c, a, b in pairs if c == "k=32"]
    )
    assert sum(p < 0.05 for p in primary) == 3


def test_corrected_verdicts_of_the_repetition():
    """Only CrossPT minus PT survives in the primary family of docs/study/results-repeated.md."""
    scores = json.loads((ROOT / "docs" / "benchmarks" / "repeated.json").read_text())
    mean = {
        name: np.mean(list(found["accuracy"].values()), axis=0) for name, found in scores.items()
    }
    pairs = [
        ("starts: MPT", "starts: PT, rate 0.3"),
        ("starts: MPT from mean of products", "starts: MPT"),
        ("starts: MPT from MNLI", "starts: MPT"),
        ("starts: MPT, slow source factors", "starts: MPT"),
        ("crosspt: CrossPT", "crosspt: PT"),
        ("crosspt: CrossPT", "crosspt: MPT"),
    ]
    differences = [(mean[f"{a}, k=32"] - mean[f"{b}, k=32"]).tolist() for a, b in pairs]
    shown = [round(float(np.mean(values)), 1) for values in differences]
    assert shown == [4.4, 0.0, 2.3, 2.4, 7.9, 3.1]
    corrected = results.holm([results.p_value(values) for values in differences])
    assert [p < 0.05 for p in corrected] == [False, False, False, False, True, False]
    assert corrected[0] == pytest.approx(0.085, abs=5e-4)

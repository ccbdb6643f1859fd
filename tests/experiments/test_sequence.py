"""Stages of sequences, and their metrics, compared with loops over published definitions."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_jax.batching.samplers import LastOfEach
from mpt_jax.experiments import sequence
from mpt_jax.experiments.sequence_metrics import of_stages, sequence_scores

PAIR = (("a", "b", "c"), ("x_lr0.1", "y_lr0.1", "z_lr0.1"))


def test_runs_of_a_stage():
    assert sequence.run_names(PAIR, 2) == ["a", "b", "x_lr0.1", "y_lr0.1"]
    assert sequence.task_names(PAIR, 2) == ["a", "b", "x", "y"]
    assert sequence.groups(PAIR, 2) == [0, 0, 1, 1] and sequence.count(PAIR) == 2
    assert sequence.start_from(PAIR, 2) == {
        "a": "a", "b": "a", "x_lr0.1": "x_lr0.1", "y_lr0.1": "x_lr0.1",
    }  # fmt: skip
    table = sequence.start_from(PAIR, 3)
    assert isinstance(table, dict) and table["c"] == "b"
    assert sequence.start_from(PAIR, 1) == "average"
    assert sequence.previous_artifact("runs", "lanes", 1) is None
    assert sequence.previous_artifact("runs", "lanes", 3) == "runs/lanes_2/artifact"
    assert (sequence.stage("lanes", 3), sequence.seen_split(3)) == ("lanes_3", "seen_3")


@pytest.mark.parametrize(
    ("sequences", "step", "message"),
    [
        (PAIR, 4, "STEP is 4, but each sequence has 3"),
        (PAIR, 0, "STEP is 0"),
        ((("a",), ("b", "c")), 1, "equally long"),
        (("a", "b"), 1, "equally long"),
        ((), 1, "equally long"),
    ],
)
def test_impossible_stages(sequences, step, message):
    with pytest.raises(ValueError, match=message):
        sequence.run_names(sequences, step)


def test_sampler_draws_the_newest_task_of_each_sequence():
    sampler = LastOfEach(6, seed=0, sequences=2)
    weights = np.array([5.0, 1.0, 2.0, 1.0])
    assert sampler.draw(np.array([3]), weights).tolist() == [[1, 1, 1, 3, 3, 3]]
    np.testing.assert_array_equal(sampler.expected_shares(weights), [0, 0.5, 0, 0.5])
    for tasks, batch in ((3, 6), (4, 5)):
        with pytest.raises(ValueError, match="must divide the number of tasks"):
            LastOfEach(batch, seed=0, sequences=2).check(tasks)


def test_metrics_equal_loops():
    rng = np.random.default_rng(0)
    scores, counts = rng.random((4, 4)) * 100, rng.integers(1, 9, (4, 4)).astype(float)
    scores[np.triu_indices(4, 1)] = np.nan
    found = sequence_scores(scores, counts)
    steps = []
    for step in range(4):
        total = sum(scores[step, k] * counts[step, k] for k in range(step + 1))
        steps.append(total / sum(counts[step, k] for k in range(step + 1)))
    np.testing.assert_allclose(found.of_steps, steps)
    np.testing.assert_allclose([found.average, found.last], [sum(steps) / 4, steps[3]])
    lost = [max(scores[t, k] for t in range(k, 3)) - scores[3, k] for k in range(3)]
    np.testing.assert_allclose(found.forgetting, sum(lost) / 3)
    gained = [scores[3, k] - scores[k, k] for k in range(3)]
    np.testing.assert_allclose(found.backward_transfer, sum(gained) / 3)


def test_published_log_is_of_all_classes():
    """A user's log for VOC B0-C4, whose classes without positives counted as 0."""
    logged = np.array([19.95, 37.93, 52.40, 67.13, 80.67])
    seen = np.array([99.7, 94.8, 87.3, 83.9, 80.7])
    scores = np.full((5, 5), np.nan)
    for step in range(5):
        scores[step, : step + 1] = logged[step] * 5 / (step + 1)
    found = sequence_scores(scores, np.full((5, 5), 4.0))
    np.testing.assert_allclose(found.of_steps, seen, atol=0.06)
    np.testing.assert_allclose([found.average, found.last], [89.3, 80.7], atol=0.06)


def test_one_task_forgets_nothing():
    found = sequence_scores(np.array([[70.0]]))
    assert found.of_steps == (70.0,) and (found.average, found.last) == (70.0, 70.0)
    assert (found.forgetting, found.backward_transfer) == (0.0, 0.0)


def test_classes_without_positives_have_no_weight():
    stages = [
        {"a": {"map": 80.0, "map_classes": 2}},
        {"a": {"map": 60.0, "map_classes": 1}, "b": {"map": 30.0, "map_classes": 2}},
    ]
    metric, found, classes = of_stages(stages)
    assert metric == "map" and classes is not None and classes.tolist() == [2, 3]
    assert found.of_steps == (80.0, 40.0) and found.forgetting == 20
    metric, found, classes = of_stages([{"a": {"accuracy": 50.0}}])
    assert (metric, found.last, classes) == ("accuracy", 50.0, None)


@pytest.mark.parametrize(
    ("stages", "metric", "message"),
    [
        ([{"a": {"map": 1.0}}, {"b": {"map": 1.0}}], None, "not the stages of one sequence"),
        ([], None, "not the stages of one sequence"),
        ([{"a": {"map": 1.0}}], "f1", "Stage 1 has no f1 of a, only map"),
        ([{"a": {"map": float("nan")}}], None, "not finite"),
    ],
)
def test_stages_that_do_not_fit(stages, metric, message):
    with pytest.raises(ValueError, match=message):
        of_stages(stages, metric)

"""Tests of step metrics: counts by token, merging, and names by run and group."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.models import metrics, token_losses
from mpt_jax.models.metrics import Metric
from tests.fixtures import tiny

RUNS = Runs(["rte", "rte", "cb"], ["rte_s1", "rte_s2", "cb_s1"], groups=[0, 1, 1])


def test_task_metrics_count_loss_and_accuracy_by_token():
    batch = tiny.batch([0, 2, None, 0, 2])
    logits = 2 * np.random.default_rng(0).normal(size=(5, tiny.TARGET, tiny.VOCABULARY))
    hits = batch["decoder_target_tokens"][:, 0]
    logits[np.arange(5), 0, hits] += 9  # so that some tokens are right
    found = metrics.task_metrics(
        tiny.arrays(batch),
        token_losses.values_of_logits(
            jnp.asarray(logits, jnp.float32), jnp.asarray(batch["decoder_target_tokens"])
        ),
        jnp.asarray(batch["decoder_task_ids"]),
        3,
    )
    loss, right, tokens = np.zeros(3), np.zeros(3), np.zeros(3)
    for i, position in zip(*np.nonzero(batch["decoder_loss_weights"]), strict=True):
        row, target = (
            batch["decoder_task_ids"][i, position],
            batch["decoder_target_tokens"][i, position],
        )
        scores = logits[i, position]
        loss[row] += np.log(np.exp(scores).sum()) - scores[target]
        right[row] += scores.argmax() == target
        tokens[row] += 1
    assert right[0] >= 2 and tokens[1] == 0
    np.testing.assert_allclose(found["loss"].sum, loss, rtol=1e-5)
    np.testing.assert_array_equal(found["token_accuracy"].sum, right)
    for metric in found.values():
        np.testing.assert_array_equal(metric.weight, tokens)


def metric(total, weight) -> Metric:
    return Metric(jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32))


def test_merged_metrics_give_mean_over_all_tokens():
    first = {"loss": metric([10, 0, 1], [2, 0, 1])}
    second = {"loss": metric([2, 0, 9], [6, 0, 1])}
    found = metrics.scalars(metrics.merge(first, second), RUNS)
    assert found == {
        "loss": pytest.approx(22 / 10),
        "loss/rte_s1": pytest.approx(12 / 8),
        "loss/cb_s1": pytest.approx(10 / 2),
    }, "a run without examples has no entry"


def test_scalars_several_groups_name_terms_by_group():
    step = {"term/kl": metric([1, 4], [1, 2]), "gradient_norm": metric([3, 5], [1, 1])}
    found = metrics.scalars(step, RUNS)
    assert found["term/kl"] == pytest.approx(5 / 3)
    assert found["term/kl/rte_s1"] == 1 and found["term/kl/group_1"] == 2
    assert found["gradient_norm"] == 4 and found["gradient_norm/group_1"] == 5
    one = metrics.scalars({"term/kl": metric([3], [2])}, Runs(["a", "b"]))
    assert one == {"term/kl": 1.5}


def test_scalars_ten_thousand_groups_labels_in_one_pass(monkeypatch):
    count = 10_000
    runs = Runs([f"run_{i}" for i in range(count)], groups="independent")
    read, table = [], runs.group_of_row
    monkeypatch.setattr(Runs, "group_of_row", property(lambda _: read.append(1) or table))
    norms = {"gradient_norm": Metric(np.arange(count), np.ones(count))}
    found = metrics.scalars(norms, runs)
    assert found["gradient_norm/run_9999"] == 9999 and len(found) == count + 1
    assert len(read) < 10, "group_of_row must not be read once per group"


def test_scalars_step_without_examples_is_empty():
    assert metrics.scalars({"loss": metric([0, 0, 0], [0, 0, 0])}, RUNS) == {}


def test_to_clu_matches_scalars():
    steps = [
        {"loss": metric([10, 3, 1], [2, 1, 1]), "term/kl": metric([1, 4], [1, 2])},
        {"loss": metric([2, 3, 9], [6, 1, 1]), "term/kl": metric([2, 2], [1, 1])},
    ]
    expected = metrics.scalars(metrics.merge(*steps), RUNS)
    first, second = (metrics.to_clu(step, RUNS) for step in steps)
    found = {name: first[name].merge(second[name]).compute() for name in first}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)

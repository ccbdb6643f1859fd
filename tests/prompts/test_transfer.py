"""Tests of transfer from a trained artifact to new tasks."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts import get_method, materialize
from mpt_jax.prompts.factors import aligned
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning

P, H = 4, 6
SOURCES = Runs(["mnli", "qqp", "sst2"])
TARGETS = Runs(["rte", "rte"], ["rte_s1", "rte_s2"], "independent")


def trained(rank: int = 2, runs: Runs = SOURCES) -> dict[str, jax.Array]:
    """Factors whose average of products is far from their product of averages."""
    rng = np.random.default_rng(rank)
    shapes = {
        "shared": (runs.num_groups, P, H),
        "task_left": (runs.num_rows, P, rank),
        "task_right": (runs.num_rows, rank, H),
    }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {name: jax.numpy.asarray(value, jax.numpy.float32) for name, value in arrays.items()}


def equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("groups", ["joint", "independent"])
def test_mpt_transfer_copies_shared_and_averages_factors(rank, groups):
    source = trained(rank)
    runs = Runs(["rte", "cb"], groups=groups)
    started = MPT(P, rank=rank).transfer(source, MPT(P, rank=rank), SOURCES, runs)
    assert started["shared"].shape == (runs.num_groups, P, H)
    for group in range(runs.num_groups):
        np.testing.assert_array_equal(started["shared"][group], source["shared"][0])
    left, right = (np.array(source[f"task_{side}"]) for side in ("left", "right"))
    for task, column in itertools.product(range(3), range(rank)):  # of norm sqrt(P), sum >= 0
        scale = np.linalg.norm(left[task, :, column]) / P**0.5
        scale = -scale if left[task, :, column].sum() < 0 else scale
        left[task, :, column] /= scale
        right[task, column] *= scale
    for row in range(2):
        equal(started["task_left"][row], left.mean(0))
        equal(started["task_right"][row], right.mean(0))
    folded = np.asarray(materialize.materialize(MPT(P, rank=rank), started, runs))
    of_products = np.asarray(materialize.materialize(MPT(P, rank=rank), source, SOURCES)).mean(0)
    assert np.abs(folded[0] - of_products).max() > 0.1, "not the average of the products"


@pytest.mark.parametrize("average_of", ["factors", "products"])
@pytest.mark.parametrize("rank", [1, 3])
def test_mpt_transfer_does_not_depend_on_signs_and_scales_of_factors(rank, average_of):
    """A pair (U, V) is as good as (-U, -V) or (c U, V / c): it gives the same prompts."""
    source, method = trained(rank), MPT(P, rank=rank, average_of=average_of)
    factors = np.array([[-1, 2, 0.5], [3, -1, 1], [1, 1, -0.25]])[:, None, :rank]
    changed = source | {
        "task_left": source["task_left"] * factors,
        "task_right": source["task_right"] / factors.swapaxes(1, 2),
    }
    for weights in ("average", {"rte_s1": {"mnli": 2.0, "sst2": 1.0}, "rte_s2": "average"}):
        method = dataclasses.replace(method, start_from=weights)
        prompts = [
            materialize.materialize(
                method, method.transfer(params, MPT(P, rank=rank), SOURCES, TARGETS), TARGETS
            )
            for params in (source, changed)
        ]
        np.testing.assert_allclose(prompts[0], prompts[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_mpt_transfer_average_of_products_is_closest_of_its_rank(rank):
    source = trained(rank)
    method = MPT(P, rank=rank, average_of="products")
    started = method.transfer(source, MPT(P, rank=rank), SOURCES, Runs(["rte"]))
    left, right = (np.asarray(source[f"task_{side}"], np.float64) for side in ("left", "right"))
    mean = (left @ right).mean(0)
    found = np.asarray(started["task_left"][0]) @ np.asarray(started["task_right"][0])
    # Eckart and Young: what is left are the other singular values.
    rest = np.linalg.svd(mean, compute_uv=False)[rank:]
    np.testing.assert_allclose(np.square(found - mean).sum(), np.square(rest).sum(), rtol=1e-4)
    assert np.linalg.matrix_rank(found, tol=1e-4) == rank


@pytest.mark.parametrize("average_of", ["factors", "products"])
def test_mpt_transfer_of_one_source_copies_its_bits(average_of):
    source = trained(1)
    method = MPT(P, start_from="qqp", average_of=average_of)
    started = method.transfer(source, MPT(P), SOURCES, TARGETS)
    for name in ("task_left", "task_right"):
        np.testing.assert_array_equal(started[name][1], source[name][1])


@pytest.mark.parametrize("start_from", ["qqp", "average"])
def test_mpt_transfer_average_of_products_changes_the_rank(start_from):
    source = trained(1)
    method = MPT(P, rank=2, start_from=start_from, average_of="products")
    started = method.transfer(source, MPT(P, rank=1), SOURCES, Runs(["rte"]))
    assert started["task_left"].shape == (1, P, 2) and started["task_right"].shape == (1, 2, H)
    left, right = (np.asarray(source[f"task_{side}"], np.float64) for side in ("left", "right"))
    products = left @ right
    mean = products[1] if start_from == "qqp" else products.mean(0)
    found = np.asarray(started["task_left"][0]) @ np.asarray(started["task_right"][0])
    rest = np.linalg.svd(mean, compute_uv=False)[2:]
    np.testing.assert_allclose(np.square(found - mean).sum(), np.square(rest).sum(), atol=1e-4)


def test_mpt_statistics_match_prompts_and_pairs():
    runs = Runs([f"t{k}" for k in range(7)], groups=[0, 1, 0, 0, 1, 1, 2])
    rng = np.random.default_rng(3)
    params = {
        "shared": rng.normal(size=(3, P, H)),
        "task_left": rng.normal(size=(7, P, 2)),
        "task_right": rng.normal(size=(7, 2, H)),
    }
    params["task_left"][0, 0] = 0  # signs of zero
    found = MPT(P, rank=2).statistics(params, runs)
    same, along, total = [], 0, 0
    for group, rows in ((0, [0, 2, 3]), (1, [1, 4, 5])):
        sides = aligned(params["task_left"][rows], params["task_right"][rows])
        for a, b in itertools.combinations(range(3), 2):
            same.append(np.mean([np.mean(np.sign(x[a]) == np.sign(x[b])) for x in sides]))
        shared = params["shared"][group]
        for row in rows:
            prompt = shared * (params["task_left"][row] @ params["task_right"][row])
            along += (prompt * shared).sum() ** 2 / (shared**2).sum()
            total += (prompt**2).sum()
    assert found["sign_agreement"] == pytest.approx(np.mean(same))
    assert found["shared_variance"] == pytest.approx(along / total)


def test_mpt_unknown_average_raises():
    with pytest.raises(ValueError, match="AVERAGE_OF.*'vectors'.*factors"):
        MPT(P, average_of="vectors")


def test_mpt_statistics_of_equal_tasks_and_of_random_ones():
    runs, rng = Runs([f"t{k}" for k in range(6)]), np.random.default_rng(0)
    one = {name: np.asarray(x)[:1] for name, x in trained(1).items()}
    same = {k: np.repeat(x, 6, 0) if k != "shared" else np.ones((1, P, H)) for k, x in one.items()}
    flipped = {**same, "task_left": same["task_left"] * -1.0, "task_right": same["task_right"] * -1}
    for params in (same, flipped):
        found = MPT(P).statistics(params, runs)
        assert found["sign_agreement"] == 1
        rms = np.sqrt(np.square(params["task_left"]).mean())
        assert found["left_norm"] == pytest.approx(rms)
    ones = {
        "shared": one["shared"],
        "task_left": np.ones((6, P, 1)),
        "task_right": np.ones((6, 1, H)),
    }
    assert MPT(P).statistics(ones, runs)["shared_variance"] == pytest.approx(1)
    random = {
        "shared": rng.normal(size=(1, 50, 80)),
        "task_left": rng.normal(size=(6, 50, 1)),
        "task_right": rng.normal(size=(6, 1, 80)),
    }
    found = MPT(50).statistics(random, runs)
    assert abs(found["sign_agreement"] - 0.5) < 0.06 and found["shared_variance"] < 0.05
    assert MPT(P).statistics(same, Runs([f"t{k}" for k in range(6)], groups="independent")) == {}


def test_mpt_transfer_named_source_copies_its_factors():
    source = trained()
    method = MPT(P, rank=2, start_from="qqp")
    started = method.transfer(source, MPT(P, rank=2), SOURCES, TARGETS)
    folded = materialize.materialize(MPT(P, rank=2), source, SOURCES)
    for row in range(2):
        equal(materialize.materialize(method, started, TARGETS)[row], folded[1])


def test_mpt_transfer_same_keeps_rows_by_name():
    runs = Runs(["a", "b", "c"], groups=[0, 1, 0])
    source = trained(runs=runs)
    fewer = Runs(["c", "a"])
    method = MPT(P, rank=2, start_from="same")
    started = method.transfer(source, MPT(P, rank=2), runs, fewer)
    folded = materialize.materialize(MPT(P, rank=2), source, runs)
    found = materialize.materialize(method, started, fewer)
    equal(found[0], folded[2])
    equal(found[1], folded[0])


def test_mpt_transfer_rows_of_two_groups_into_one_raises():
    runs = Runs(["a", "b"], groups="independent")
    method = MPT(P, rank=2, start_from="same")
    with pytest.raises(ValueError, match="b.*group"):
        method.transfer(trained(runs=runs), MPT(P, rank=2), runs, Runs(["a", "b"]))


def test_mpt_transfer_average_over_groups_raises():
    runs = Runs(["a", "b", "c"], groups=[0, 1, 0])
    with pytest.raises(ValueError, match="2 groups"):
        MPT(P).transfer(trained(1, runs), MPT(P), runs, TARGETS)


def test_mpt_transfer_other_method_raises():
    with pytest.raises(ValueError, match=r"'prompt_tuning'.*gin/mpt_source\.gin"):
        MPT(P).transfer({}, PromptTuning(P), SOURCES, TARGETS)


@pytest.mark.parametrize("rank", [1, 3])
def test_prompt_tuning_transfer_starts_from_materialized_prompt(rank):
    source = trained(rank)
    method = PromptTuning(P, start_from="sst2")
    table = method.transfer(source, MPT(P, rank=rank), SOURCES, TARGETS)["table"]
    expected = np.asarray(source["shared"][0]) * (
        np.asarray(source["task_left"][2]) @ np.asarray(source["task_right"][2])
    )
    assert table.shape == (2, P, H)
    for row in range(2):
        equal(table[row], expected)


def test_prompt_tuning_transfer_own_artifact_copies_rows():
    source = {"table": jax.random.normal(jax.random.PRNGKey(0), (3, P, H))}
    method = PromptTuning(P, start_from="qqp")
    table = method.transfer(source, PromptTuning(P), SOURCES, TARGETS)["table"]
    np.testing.assert_array_equal(table[1], source["table"][1])
    same = PromptTuning(P, start_from="same")
    table = same.transfer(source, PromptTuning(P), SOURCES, Runs(["sst2", "mnli"]))["table"]
    np.testing.assert_array_equal(table, source["table"][np.array([2, 0])])


def test_prompt_tuning_transfer_several_sources_unnamed_raises():
    source = {"table": jax.random.normal(jax.random.PRNGKey(0), (3, P, H))}
    with pytest.raises(ValueError, match="holds 3 prompts: mnli, qqp, sst2"):
        PromptTuning(P).transfer(source, PromptTuning(P), SOURCES, TARGETS)
    one = {"table": source["table"][:1]}
    table = PromptTuning(P).transfer(one, PromptTuning(P), Runs(["mnli"]), TARGETS)["table"]
    np.testing.assert_array_equal(table[1], one["table"][0])


@pytest.mark.parametrize(
    "method", [MPT(P, rank=2, start_from="qqq"), PromptTuning(P, start_from="qqq")]
)
def test_transfer_unknown_source_raises_with_known_names(method):
    with pytest.raises(ValueError, match="Unknown run 'qqq'.*'qqp'.*mnli"):
        method.transfer(trained(), MPT(P, rank=2), SOURCES, TARGETS)


def test_no_prompt_transfer_raises():
    with pytest.raises(ValueError, match="no prompt"):
        get_method("none")().transfer({}, MPT(P), SOURCES, TARGETS)

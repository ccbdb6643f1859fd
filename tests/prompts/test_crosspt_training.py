"""Tests of CrossPT in training: random draws, their temperature, and independence of runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.base import PromptContext
from mpt_jax.prompts.crosspt import mixing
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.prompts.row_ops import numbers_within_rows
from tests.fixtures import reference_mixing as by_hand
from tests.fixtures.prompt_methods import (
    BANKS,
    KEY,
    NAMES,
    K,
    compose,
    crosspt,
    mixture,
    random_arrays,
)

COLD = Annealing(0.001, 0.001, 1)
DRAWS = 4000


def draws(method, params, runs, row: int, count: int = DRAWS) -> np.ndarray:
    """Returns the weights [count, S] of a run in `count` steps."""
    ids = jnp.array([row])

    @jax.jit
    @jax.vmap
    def weights(key):
        return method.mixture(params, runs, ids, PromptContext(key=key))[0]

    return np.asarray(weights(jax.random.split(jax.random.PRNGKey(3), count)))


@pytest.mark.parametrize(
    ("clock", "temperature"),
    # From 4 to 0.5 in ten steps: linear, then constant.
    [(0, 4.0), (5, 2.25), (8, 1.2), (10, 0.5), (1000, 0.5)],
)
def test_relaxed_bernoulli_draws_follow_clock_temperature(clock, temperature):
    """Compares the weight of the first of two sources with draws from the formula."""
    annealing = Annealing(4.0, 0.5, 10)
    method = crosspt(sources=("a", "b"), compose_by="sum", annealing=annealing)
    runs = BANKS["groups"]
    params = random_arrays(method, runs) | {"router": jnp.tile(jnp.array([1.5, -0.5]), (K, 1))}
    params["clock"] = jnp.full_like(params["clock"], clock + 7).at[1].set(clock)
    found = draws(method, params, runs, row=0)[:, 0]  # a run of group 1
    uniform = np.random.default_rng(0).uniform(size=(DRAWS, 2))
    scores = by_hand.relaxed_bernoulli(np.array([1.5, -0.5]), uniform, temperature)
    expected = [by_hand.softmax(row / row.sum())[0] for row in scores]
    assert largest_gap(found, np.array(expected)) < 0.05


def largest_gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest distance between the distribution functions of two samples.

    For samples of 4000 from one distribution it exceeds 0.05 once in 10,000 pairs.
    """
    at = np.sort(np.concatenate([found, expected]))
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (found, expected)]
    return float(np.abs(below[0] - below[1]).max())


def test_largest_gap_different_temperatures_above_threshold():
    uniform = np.random.default_rng(0).uniform(size=(2, DRAWS, 2))
    made = []
    for temperature, u in zip((2.25, 1.6), uniform, strict=True):
        scores = by_hand.relaxed_bernoulli(np.array([1.5, -0.5]), u, temperature)
        made.append(scores[:, 0] / scores.sum(1))
    assert largest_gap(*made) > 0.05


def test_router_zero_logits_high_temperature_equal_weights():
    method = crosspt(compose_by="sum", annealing=Annealing(50.0, 50.0, 1), normalize="sum")
    params = random_arrays(method, BANKS["joint"]) | {"router": jnp.zeros((K, 4))}
    found = draws(method, params, BANKS["joint"], 2, 500)
    np.testing.assert_allclose(found, 0.25, atol=0.03)
    assert found.std(0).min() > 1e-3, "weights are random"


def test_router_low_temperature_takes_or_drops_each_source():
    """Each source is taken with probability sigmoid(r), independently of the others."""
    method, runs = crosspt(compose_by="sum", annealing=COLD, normalize="sum"), BANKS["joint"]
    logits = np.array([2.0, 0.0, -1.0, 0.5])
    params = random_arrays(method, runs) | {"router": jnp.tile(jnp.asarray(logits, "f4"), (K, 1))}
    found = draws(method, params, runs, row=3)
    taken = found > 0.05
    np.testing.assert_allclose(taken.mean(0), by_hand.sigmoid(logits), atol=0.03)
    alike = np.isclose(found, taken / by_hand.sigmoid(logits).sum(), rtol=0.02).all(1)
    assert alike.mean() > 0.97, "sources taken have equal weights, except in few draws"
    independent = np.prod([by_hand.sigmoid(logits[0]), by_hand.sigmoid(logits[1])])
    np.testing.assert_allclose((taken[:, 0] & taken[:, 1]).mean(), independent, atol=0.03)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("logit", [0.0, 1.2])
def test_learned_share_draws_are_relaxed_bernoulli(logit, temperature):
    """The prompt reveals the share, so the uniform draw can be recovered from it."""
    method = crosspt(router="softmax", share="learned", share_temperature=temperature)
    runs = BANKS["independent"]
    params = random_arrays(method, runs) | {"share": jnp.full(K, logit)}
    only = {name: jnp.zeros_like(params[name]) for name in ("sources", "private")}
    only["private"] = only["private"].at[1, 0, 0].set(1.0)
    ids = jnp.array([1])
    share = jax.jit(
        jax.vmap(
            lambda key: method.compose(params | only, runs, ids, PromptContext(key=key))[0, 0, 0]
        )
    )(jax.random.split(jax.random.PRNGKey(5), DRAWS))
    share = np.clip(np.asarray(share, np.float64), 1e-7, 1 - 1e-7)  # rounded to 1 now and then
    uniform = by_hand.sigmoid(temperature * np.log(share / (1 - share)) - logit)
    assert largest_gap(uniform, np.linspace(0, 1, DRAWS)) < 0.05


def test_learned_share_draws_independent_of_router():
    method = crosspt(sources=("a", "b"), share="learned")
    runs, ids = BANKS["joint"], jnp.array([0])
    params = random_arrays(method, runs)
    params |= {name: jnp.zeros_like(params[name]) for name in ("sources", "router", "share")}
    params["private"] = jnp.ones_like(params["private"])

    @jax.jit
    @jax.vmap
    def both(key):
        given = PromptContext(key=key)
        return (
            method.compose(params, runs, ids, given)[0, 0, 0],
            method.mixture(params, runs, ids, given)[0],
        )

    share, weights = map(np.asarray, both(jax.random.split(jax.random.PRNGKey(5), DRAWS)))
    for weight in weights.T:
        assert abs(np.corrcoef(share, weight)[0, 1]) < 0.06


@pytest.mark.parametrize("top_k", [None, 2])
def test_softmax_normalize_training_softmax_of_normalized_scores(top_k):
    """softmax(s / sum s + 1e-8) of the scores that are kept, which "sum" divides by sum(p)."""
    runs, ids, key = BANKS["groups"], np.arange(K), jax.random.PRNGKey(2)
    plain, released = (crosspt(normalize=by, top_k=top_k) for by in ("sum", "softmax"))
    params = random_arrays(plain, runs) | {"router": jnp.zeros((K, 4))}  # so that means are p
    scores = mixture(plain, params, runs, ids, key=key)
    found = mixture(released, params, runs, ids, key=key)
    for row in range(K):
        chosen = np.flatnonzero(scores[row])
        assert len(chosen) == (top_k or 4)
        normalized = scores[row, chosen] / scores[row, chosen].sum()
        expected = np.zeros(4)
        expected[chosen] = by_hand.softmax(normalized + 1e-8)
        np.testing.assert_allclose(found[row], expected, 1e-5, 1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.001, 0.5, 5.0])
@pytest.mark.parametrize("sources", [("a",), ("a", "b"), ("a", "b", "c")])
def test_sum_normalize_mean_of_training_weights_is_that_of_inference(sources, temperature):
    """With one undecided source, half the steps take none, at twice the weight of inference."""
    annealing = Annealing(temperature, temperature, 1)
    method = crosspt(sources=sources, compose_by="sum", normalize="sum", annealing=annealing)
    logits = jnp.asarray([0.0, 1.5, -1.0][: len(sources)])
    params = random_arrays(method, BANKS["joint"]) | {"router": jnp.tile(logits, (K, 1))}
    found = draws(method, params, BANKS["joint"], row=0)
    at_inference = mixture(method, params, BANKS["joint"], np.array([0]))[0]
    assert at_inference.sum() == pytest.approx(1)
    error = found.std(0) / DRAWS**0.5
    assert (np.abs(found.mean(0) - at_inference) < 4 * error + 0.01).all()
    if sources == ("a",) and temperature == 0.001:
        assert np.isin(np.round(found, 1), [0, 2]).mean() > 0.97


def test_joint_share_scores_private_prompt_with_the_sources():
    method, runs = crosspt(router="softmax", share="joint"), BANKS["joint"]
    params = random_arrays(method, runs)
    assert params["router"].shape == (K, 5)
    found = compose(method, params, runs, np.arange(K))
    for row in range(K):
        weights = by_hand.softmax(np.asarray(params["router"][row], np.float64))
        expected = weights[4] * np.asarray(params["private"][row], np.float64)
        for weight, source in zip(weights, np.asarray(params["sources"][0]), strict=False):
            expected = expected + weight * source
        np.testing.assert_allclose(found[row], expected, 1e-5, 1e-5)
    assert mixture(method, params, runs, np.arange(K)).shape == (K, 4)


def test_learned_share_draws_at_its_own_temperature_or_the_annealed_one():
    runs = BANKS["independent"]
    for share_temperature, clock, temperature in ((5.0, 0, 5.0), (5.0, 10, 5.0), (None, 10, 0.5)):
        method = crosspt(
            router="softmax",
            share="learned",
            share_temperature=share_temperature,
            annealing=Annealing(4.0, 0.5, 10),
        )
        params = random_arrays(method, runs, clock=clock)
        given = PromptContext(key=KEY)
        drawn, found = mixing.add_noise(
            method, params["share"][:, None], params, runs, jnp.arange(K), given, "share"
        )
        assert np.asarray(found).ravel().tolist() == pytest.approx([temperature] * found.size)
        assert drawn.shape == (K, 1)


@pytest.mark.parametrize("compose_by", ["sum", "cat", "private_sum", "private_cat"])
def test_crosspt_training_prompts_use_drawn_weights(compose_by):
    method, runs = crosspt(compose_by=compose_by, top_k=3), BANKS["groups"]
    params, key = random_arrays(method, runs), jax.random.PRNGKey(8)
    weights = mixture(method, params, runs, np.arange(K), key=key)
    found = compose(method, params, runs, np.arange(K), key=key)
    for row in range(K):
        group = runs.group_of_row[row]
        expected = by_hand.crosspt(method, params, group, row, weights[row].astype(np.float64))
        np.testing.assert_allclose(found[row], expected, 1e-5, 1e-5)


def test_top_k_low_temperature_ties_keep_k_sources():
    """Low-temperature draws are exactly 0 or 1 in float32, so most of them are ties."""
    method = crosspt(compose_by="cat", top_k=2, annealing=COLD)
    runs = BANKS["joint"]
    params = random_arrays(method, runs)
    ones = params | {"router": jnp.full((K, 4), 30.0)}
    found = draws(method, ones, runs, 1, 200)
    np.testing.assert_allclose(np.sort(found, -1), [[0, 0, 0.5, 0.5]] * 200, atol=1e-6)
    assert np.isfinite(compose(method, params, runs, np.arange(K), key=KEY)).all()


def test_top_k_low_temperature_equal_logits_chosen_evenly():
    """Each of four sources is chosen with a score above 1/2 in 1/4 of 15/16 of the draws.

    In float32 most of these scores round to 1, so sources must be ranked before the rounding.
    """
    method = crosspt(compose_by="sum", top_k=1, annealing=COLD)
    params = random_arrays(method, BANKS["joint"]) | {"router": jnp.zeros((K, 4))}
    chosen = (draws(method, params, BANKS["joint"], row=1) > 0.5).mean(0)
    np.testing.assert_allclose(chosen, 15 / 64, atol=0.03)


@pytest.mark.parametrize("logit", [-60.0, 60.0])
@pytest.mark.parametrize("normalize", ["sum", "softmax"])
def test_crosspt_gradients_low_temperature_finite(normalize, logit):
    """No source is taken, or all are: 0 / 0 without the 1e-8."""
    method, runs = crosspt(normalize=normalize, annealing=COLD), BANKS["joint"]
    params = random_arrays(method, runs) | {"router": jnp.full((K, 4), logit)}

    def total(params):
        return (method.compose(params, runs, jnp.arange(K), PromptContext(key=KEY)) ** 2).sum()

    found, grads = jax.value_and_grad(total)(params)
    assert np.isfinite(found) and all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("by", ["example", "run"])
def test_draws_depend_on_key_run_and_example(by):
    method, runs = crosspt(draws=by), BANKS["joint"]
    params = random_arrays(method, runs) | {"router": jnp.zeros((K, 4))}
    ids = np.array([2, 0, 2, 1])
    first = mixture(method, params, runs, ids, key=KEY)
    np.testing.assert_array_equal(mixture(method, params, runs, ids, key=KEY), first)
    assert np.array_equal(first[0], first[2]) == (by == "run")
    assert len({row.tobytes() for row in first}) == (3 if by == "run" else 4)
    other = mixture(method, params, runs, ids, key=jax.random.PRNGKey(1))
    assert np.abs(other - first).max(-1).min() > 1e-3
    without = mixture(method, params, runs, ids)
    np.testing.assert_allclose(without, 0.25, atol=1e-6)


def test_draws_of_examples_do_not_depend_on_other_runs_of_a_batch():
    """An example draws the same beside other runs, and however the batch is laid out."""
    method, runs = crosspt(), BANKS["independent"]
    params = random_arrays(method, runs)
    ids = np.array([3, 1, 1, 0, 3, 1])
    together = compose(method, params, runs, ids, key=KEY)
    own = compose(method, params, runs, ids[ids == 1], key=KEY)
    np.testing.assert_allclose(together[ids == 1], own, 1e-6, 1e-6)
    packed = compose(method, params, runs, ids.reshape(2, 3), key=KEY)
    np.testing.assert_allclose(packed.reshape(together.shape), together, 1e-6, 1e-6)


def test_numbers_within_rows_count_examples_of_a_row():
    ids = jnp.array([[2, 0, 2], [1, 2, 0]])
    np.testing.assert_array_equal(numbers_within_rows(ids), [[0, 0, 1], [0, 2, 1]])


def test_draws_alone_and_in_fleet_same():
    method, fleet = crosspt(share="learned"), BANKS["independent"]
    params = random_arrays(method, fleet)
    together = compose(method, params, fleet, np.arange(K), key=KEY)
    turned = {name: value[::-1] for name, value in params.items()}
    back = compose(method, turned, Runs(NAMES[::-1], groups="independent"), np.arange(K), key=KEY)
    np.testing.assert_allclose(back[::-1], together, 1e-6, 1e-6)
    for row, name in enumerate(NAMES):
        own = {leaf: value[row : row + 1] for leaf, value in params.items()}
        alone = compose(method, own, Runs([name]), np.array([0]), key=KEY)
        np.testing.assert_allclose(alone[0], together[row], 1e-6, 1e-6)


def test_draws_run_names_differing_in_settings_same():
    runs = Runs(["cb"] * 3, ["cb_s1", "cb_s1_lr0.3", "cb_s2"], "independent")
    method = crosspt()
    params = random_arrays(method, runs) | {"router": jnp.zeros((3, 4))}
    found = mixture(method, params, runs, np.arange(3), key=KEY)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "uniform"])
def test_deterministic_routers_ignore_key(router):
    method, runs = crosspt(router=router), BANKS["groups"]
    params = random_arrays(method, runs)
    found = [compose(method, params, runs, np.arange(K), key=key) for key in (None, KEY)]
    np.testing.assert_array_equal(*found)


def test_schedule_steps_equal_annealing_steps():
    assert crosspt(annealing=Annealing(2.0, 0.1, 77)).schedule_steps == 77
    assert crosspt(router="softmax").schedule_steps == 0

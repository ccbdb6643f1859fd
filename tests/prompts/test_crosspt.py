"""Tests of CrossPT: composition, parameters, artifacts, transfer and invalid settings."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.config import t5_config
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, label_tree, split
from mpt_jax.prompts.base import PromptContext, method_from_config
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.state import num_params, param_shapes, trainable_labels
from tests.fixtures import reference_mixing as by_hand
from tests.fixtures import tiny
from tests.fixtures.prompt_methods import (
    BANKS,
    BY_GROUP,
    CONTEXT,
    CROSSPT_SOURCES,
    KEY,
    NAMES,
    WIDTH,
    H,
    K,
    P,
    compose,
    crosspt,
    mixture,
    random_arrays,
    texts,
)

ROUTERS = ("relaxed_bernoulli", "softmax", "sigmoid", "uniform", "attention")
COMPOSITIONS = ("sum", "cat", "private_sum", "private_product", "private_cat", "private")
BY_ROUTER = pytest.mark.parametrize("router", ROUTERS)
# compose_by = 'private' has no router, so choosing one is an error.
BY_COMPOSITION_AND_ROUTER = pytest.mark.parametrize(
    ("compose_by", "router"),
    [
        *itertools.product(COMPOSITIONS[:-1], ROUTERS),
        ("private", "relaxed_bernoulli"),
    ],
)
NET = {"down", "up", "norm_scale", "norm_bias"}


# --- Without a draw ------------------------------------------------------------------------------


@BY_GROUP
@BY_COMPOSITION_AND_ROUTER
def test_crosspt_prompts_and_weights_match_definition(compose_by, router, bank):
    method, runs = crosspt(compose_by=compose_by, router=router), BANKS[bank]
    params = random_arrays(method, runs)
    check(method, params, runs)


@pytest.mark.parametrize(
    "k", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "uniform"])
@pytest.mark.parametrize("compose_by", ["cat", "private_sum"])
def test_crosspt_top_k_keeps_k_best_sources(compose_by, router, k):
    method, runs = crosspt(compose_by=compose_by, router=router, top_k=k), BANKS["groups"]
    params = random_arrays(method, runs)
    weights = check(method, params, runs)
    assert ((weights > 0).sum(-1) == k).all()
    chosen = {tuple(np.flatnonzero(row)) for row in weights.reshape(-1, len(CROSSPT_SOURCES))}
    assert len(chosen) > 1, "runs keep different sources"


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("compose_by", ["sum", "cat", "private_product"])
def test_crosspt_softmax_normalize_inference_matches_definition(compose_by, top_k):
    method = crosspt(compose_by=compose_by, normalize="softmax", top_k=top_k)
    params = random_arrays(method, BANKS["groups"])
    weights = check(method, params, BANKS["groups"])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("share", ["add", 0.0, 0.3, "learned"])
@BY_ROUTER
def test_crosspt_share_weighs_private_prompt(router, share):
    method, runs = crosspt(router=router, share=share), BANKS["groups"]
    params = random_arrays(method, runs)
    assert ("share" in params) == (share == "learned")
    check(method, params, runs)


@BY_GROUP
@pytest.mark.parametrize(
    "names", [("sources",), ("private",), ("sources", "private")], ids="+".join
)
@pytest.mark.parametrize(
    ("compose_by", "router"), [("private_sum", "relaxed_bernoulli"), ("private_cat", "attention")]
)
def test_crosspt_reparameterized_prompts_match_mlp_output(compose_by, router, names, bank):
    method = crosspt(compose_by=compose_by, router=router, reparameterize=names)
    check(method, random_arrays(method, BANKS[bank]), BANKS[bank])


def check(method, params, runs) -> np.ndarray:
    """Compares a method with the reference formulas for examples of several bank rows.

    Returns the weights.
    """
    ids = np.array([[3, 0, 0], [4, 1, 2]])
    x = texts(ids) if method.router == "attention" else None
    found = compose(method, params, runs, ids, x)
    assert found.shape == (2, 3, method.prompt_length, H)
    if method.compose_by == "private":
        assert method.candidates == ()
        np.testing.assert_allclose(found, by_hand.reparameterized(params, "private")[ids], 1e-6)
        return np.zeros((2, 3, 0))
    weights = mixture(method, params, runs, ids, x)
    assert method.candidates == CROSSPT_SOURCES and weights.shape == (2, 3, len(CROSSPT_SOURCES))
    numbers = {name: np.asarray(value) for name, value in params.items()}
    for at in np.ndindex(ids.shape):
        group, row = runs.group_of_row[ids[at]], ids[at]
        text = None if x is None else x[at].astype(np.float64)
        expected = by_hand.crosspt_weights(method, numbers, group, row, text)
        np.testing.assert_allclose(weights[at], expected, 1e-5, 1e-5)
        prompt = by_hand.crosspt(method, numbers, group, row, expected)
        np.testing.assert_allclose(found[at], prompt, 1e-5, 1e-5)
    return weights


def test_crosspt_top_k_ties_keep_first_sources():
    """All routers start at zero, so every run's first step has these ties."""
    method, runs = crosspt(top_k=2), BANKS["joint"]
    params = random_arrays(method, runs) | {"router": jnp.zeros((K, 4))}
    assert (mixture(method, params, runs, np.arange(K)) > 0).tolist() == [[1, 1, 0, 0]] * K
    params["router"] = jnp.tile(jnp.array([0.0, 1.0, 0.0, 0.0]), (K, 1))
    assert (mixture(method, params, runs, np.arange(K)) > 0).tolist() == [[1, 1, 0, 0]] * K
    params["router"] = jnp.tile(jnp.array([0.0, -1.0, 0.0, 0.0]), (K, 1))
    assert (mixture(method, params, runs, np.arange(K)) > 0).tolist() == [[1, 0, 1, 0]] * K


@pytest.mark.parametrize(
    ("compose_by", "settings", "length"),
    [
        ("sum", {}, P),
        ("private", {}, P),
        ("private_product", {}, P),
        ("cat", {}, 4 * P),
        ("cat", {"top_k": 3}, 3 * P),
        ("private_cat", {}, 2 * P),
        ("private_cat", {"private_length": 7}, P + 7),
    ],
)
def test_crosspt_prompt_length_by_composition(compose_by, settings, length):
    method, runs = crosspt(compose_by=compose_by, **settings), BANKS["groups"]
    params = random_arrays(method, runs)
    assert method.prompt_length == length and method.prompt_lengths(runs) == (length,) * K
    assert compose(method, params, runs, np.arange(K)).shape == (K, length, H)


LENGTHS = {"task0": 2, "task1": 5, "task2": 1, "task3": 3, "task4": 5}


def test_crosspt_private_length_by_run_sets_prompt_lengths():
    method, runs = crosspt(compose_by="private_cat", private_length=LENGTHS), BANKS["groups"]
    params = random_arrays(method, runs)
    assert params["private"].shape == (K, 5, H)
    assert method.prompt_length == P + 5
    assert method.prompt_lengths(runs) == tuple(P + LENGTHS[name] for name in NAMES)
    found = compose(method, params, runs, np.arange(K))
    assert found.shape == (K, P + 5, H)
    for row, own in enumerate(LENGTHS.values()):
        weights = by_hand.crosspt_weights(method, params, runs.group_of_row[row], row)
        expected = by_hand.crosspt(method, params, runs.group_of_row[row], row, weights, own)
        np.testing.assert_allclose(found[row, : P + own], expected, 1e-5, 1e-5)
    turned = Runs(NAMES[::-1])
    assert method.prompt_lengths(turned) == method.prompt_lengths(runs)[::-1], "by name"


@BY_GROUP
@BY_COMPOSITION_AND_ROUTER
def test_crosspt_init_has_only_used_parameters(compose_by, router, bank):
    method, runs = crosspt(compose_by=compose_by, router=router), BANKS[bank]
    made = method.init(KEY, runs, CONTEXT)
    private, groups = {"private": (K, P, H)}, runs.num_groups
    expected = {} if compose_by in ("sum", "cat") else dict(private)
    if compose_by != "private":
        expected |= {"sources": (groups, 4, P, H)}
        if router == "attention":
            expected |= {"down": (groups, H, WIDTH), "up": (groups, WIDTH, H)}
            expected |= {"norm_scale": (groups, H), "norm_bias": (groups, H)}
        elif router != "uniform":
            expected |= {"router": (K, 4)}
            assert not np.any(made["router"]), "sources have equal weights at the start"
        if router == "relaxed_bernoulli":
            expected |= {"clock": (groups,)}
            assert not np.any(made["clock"])
    assert {name: leaf.shape for name, leaf in made.items()} == expected
    meaning = {"sources": "source", "private": "private", "clock": "clock"}
    for name, label in label_tree(made, method.labels).items():
        assert label == meaning.get(name, "router"), name
    assert method.reads_text == (router == "attention" and compose_by != "private")
    assert method.is_random == (router == "relaxed_bernoulli" and compose_by != "private")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "attention", "compose_by": "private_cat", "private_length": 3},
        {"share": "learned", "reparameterize": ("sources", "private")},
    ],
    ids=str,
)
def test_crosspt_init_alone_and_in_fleet_same_values(settings):
    method, fleet = crosspt(**settings), BANKS["independent"]
    together = method.init(KEY, fleet, CONTEXT)
    for row in (0, 3):
        alone = method.init(KEY, Runs([NAMES[row]]), CONTEXT)
        for name, leaf in alone.items():
            np.testing.assert_array_equal(leaf[0], together[name][row], err_msg=name)
    for name in {"sources", "private"} & set(together):
        assert not np.array_equal(together[name][0], together[name][1]), (
            "initial values differ by run"
        )


def test_crosspt_gradients_match_finite_differences():
    """Central differences in float64 of the formula written by hand."""
    runs, ids = BANKS["groups"], np.array([3, 0, 2, 4])
    x = texts(ids)
    along = np.random.default_rng(2).normal(size=(len(ids), P, H)).astype(np.float32)
    rng = np.random.default_rng(3)
    for router in ROUTERS:
        top_k = None if router == "uniform" else 3
        method = crosspt(router=router, share="learned", top_k=top_k)
        given = PromptContext(pooled=jnp.asarray(x) if router == "attention" else None)
        params = random_arrays(method, runs)

        def ours(params, method=method, given=given):
            return (method.compose(params, runs, jnp.asarray(ids), given) * along).sum()

        def theirs(params, method=method) -> float:
            total = 0.0
            for i, text, direction in zip(ids, x.astype(np.float64), along, strict=True):
                group = runs.group_of_row[i]
                weights = by_hand.crosspt_weights(method, params, group, i, text)
                total += (by_hand.crosspt(method, params, group, i, weights) * direction).sum()
            return total

        grads = jax.grad(ours)(params)
        wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
        for name in set(params) - {"clock"}:
            for entry in rng.choice(params[name].size, min(params[name].size, 6), replace=False):
                sides = []
                for step in (1e-5, -1e-5):
                    moved = {**wide, name: wide[name].copy()}
                    moved[name].flat[entry] += step
                    sides.append(theirs(moved))
                slope, found = (sides[0] - sides[1]) / 2e-5, np.asarray(grads[name]).flat[entry]
                np.testing.assert_allclose(found, slope, 2e-4, 2e-4, err_msg=f"{router} {name}")


def test_crosspt_defaults_match_released_code():
    method = CrossPT(10, CROSSPT_SOURCES)
    assert (method.compose_by, method.router, method.share) == (
        "private_sum",
        "relaxed_bernoulli",
        "add",
    )
    assert method.annealing == Annealing(5.0, 0.001, 250)
    assert method.top_k is None and method.reparameterize == ()
    assert (method.normalize, method.draws, method.share_temperature) == ("softmax", "example", 5.0)


# --- Inference parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"compose_by": "cat"}, ("sources",)),
        ({"compose_by": "private_sum"}, ("sources", "private")),
        ({"compose_by": "private"}, ("private",)),
        ({"compose_by": "private_cat", "router": "attention"}, ("sources", "private")),
    ],
    ids=str,
)
@BY_GROUP
def test_crosspt_for_inference_replaces_mlps_with_output(settings, names, bank):
    method, runs = crosspt(reparameterize=names, **settings), BANKS[bank]
    params = random_arrays(method, runs)
    parts = ("kernel_in", "bias_in", "kernel_out", "bias_out")
    layers = {f"{name}_{part}" for name in names for part in parts}
    assert layers < set(params)
    assert params[f"{names[0]}_kernel_in"].shape == (*params[names[0]].shape[:-2], H, H)
    released, kept = method.for_inference(params)
    assert not layers & set(kept) and released.reparameterize == ()
    ids = np.arange(K)
    x = texts(ids) if method.router == "attention" else None
    np.testing.assert_allclose(
        compose(released, kept, runs, ids, x), compose(method, params, runs, ids, x), 1e-6, 1e-6
    )


def test_crosspt_for_inference_without_mlps_same_prompts():
    method, runs = crosspt(), BANKS["groups"]
    params = random_arrays(method, runs)
    released, kept = method.for_inference(params)
    ids = np.arange(K)
    np.testing.assert_array_equal(
        compose(released, kept, runs, ids), compose(method, params, runs, ids)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"compose_by": "private_cat", "private_length": LENGTHS},
        {"compose_by": "cat", "router": "attention", "top_k": 2},
        {"share": "learned", "normalize": "softmax"},
        {"share": 0.25, "reparameterize": ("sources", "private")},
        {"router": "uniform", "compose_by": "private_product"},
        {"compose_by": "private"},
    ],
    ids=str,
)
def test_crosspt_config_round_trip_composes_same_prompts(settings):
    method, runs = crosspt(**settings), BANKS["groups"]
    params, ids = random_arrays(method, runs), np.arange(K)
    again = CrossPT(**json.loads(json.dumps(method.config())))
    x = texts(ids) if method.router == "attention" else None
    np.testing.assert_array_equal(
        compose(again, params, runs, ids, x), compose(method, params, runs, ids, x)
    )


# --- Parameter counts ----------------------------------------------------------------------------

SIX = ("mnli", "sst2", "qnli", "qqp", "squad", "record")
GLUE = ["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"]


def numbers(**settings) -> dict[str, int]:
    """Returns trainable parameters by label, of a T5-base with eight targets and six sources."""
    config = t5_config("t5_1_0_base", num_encoder_layers=1, num_decoder_layers=1)
    model = tiny.model(Runs(GLUE), CrossPT(100, SIX, **settings), config)
    tree, _ = param_shapes(model)
    learns = split(tree, model.labels, trainable_labels(model, tree))[0]
    labels, found = flatten(label_tree(learns, model.labels)), flatten(learns)
    return {
        label: num_params({name: leaf for name, leaf in found.items() if labels[name] == label})
        for label in set(labels.values())
    }


def test_crosspt_six_sources_eight_targets_parameter_counts():
    """The released router is [15, 15]: a row and a column per source, per target and one more.

    Of its 225 parameters only the targets' weights of sources are used; we store only those.
    """
    found = numbers()
    assert found["source"] + found["private"] == (6 + 8) * 76_800
    assert found["router"] == 8 * 6
    assert found["clock"] == 1


@pytest.mark.parametrize(
    ("compose_by", "names"),
    [("private_sum", ("sources", "private")), ("sum", ("sources",)), ("private", ("private",))],
)
def test_crosspt_reparameterize_all_takes_prompts_of_composition(compose_by, names):
    method = crosspt(compose_by=compose_by, reparameterize="all")
    assert method.reparameterize == names
    assert method == crosspt(compose_by=compose_by, reparameterize=names)


def test_reparameterization_adds_1181184_parameters_per_prompt():
    found = numbers(reparameterize=("sources",))
    assert found["source"] == 6 * (76_800 + 1_181_184)
    assert found["private"] == 8 * 76_800


# --- Transfer ------------------------------------------------------------------------------------

ARTIFACT = Runs(["qqp", "mnli", "rte", "sst2", "qnli"])
TABLE = np.random.default_rng(4).normal(size=(5, P, H)).astype(np.float32)


def start(method, source, source_method, source_runs, runs):
    initial = method.init(KEY, runs, CONTEXT)
    return initial, method.transfer(source, source_method, source_runs, runs, lambda: initial)


@BY_GROUP
def test_crosspt_transfer_sources_by_name_in_every_group(bank):
    method, runs = crosspt(), BANKS[bank]
    initial, started = start(method, {"table": TABLE}, PromptTuning(P), ARTIFACT, runs)
    assert {name: leaf.shape for name, leaf in started.items()} == {
        name: leaf.shape for name, leaf in initial.items()
    }
    for group in range(runs.num_groups):
        np.testing.assert_array_equal(started["sources"][group], TABLE[[1, 3, 4, 0]])
    assert not np.any(started["router"]) and not np.any(started["clock"])


def test_crosspt_transfer_unknown_source_raises_with_known_names():
    method = crosspt(sources=("mnli", "qnlo"))
    with pytest.raises(ValueError, match="'qnlo'.*'qnli'.*mnli, qnli, qqp, rte, sst2"):
        start(method, {"table": TABLE}, PromptTuning(P), ARTIFACT, BANKS["joint"])


def test_crosspt_transfer_own_artifact_keeps_rows_by_name():
    before, after = BANKS["groups"], Runs(["task4", "task2", "task1"], groups=(1, 0, 1))
    method = crosspt(start_from="same", share="learned")
    trained = random_arrays(method, before, clock=9)
    _, started = start(method, trained, crosspt(share="learned"), before, after)
    np.testing.assert_array_equal(
        compose(method, started, after, np.arange(3)),
        compose(method, trained, before, np.array([4, 2, 1])),
    )


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "uniform", "attention"])
def test_crosspt_config_of_earlier_version_is_read(router):
    """It names the normalization of the relaxed Bernoulli, whose default was the sum."""
    new = crosspt(router=router).config()
    old = {name: x for name, x in new.items() if name not in ("draws", "share_temperature")}
    read = method_from_config("crosspt", {**old, "normalize": "sum"}, "config.json")
    assert read.router == router and read.config() == new
    drawn = method_from_config("crosspt", {**crosspt().config(), "normalize": "sum"}, "x")
    assert drawn.normalize == "sum"


# --- Invalid settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compose_by": "wavg"}, "'wavg'.*private_sum"),
        ({"router": "rb"}, "'rb'.*relaxed_bernoulli"),
        ({"normalize": "max"}, "'max'"),
        ({"share": "half"}, "'half'"),
        ({"reparameterize": ("target",)}, "'target'"),
        ({"reparameterize": "sources"}, "a list that holds 'sources'"),
        ({"top_k": 5}, "5"),
        ({"top_k": 2, "router": "uniform"}, "top_k = 2 would have no effect.*'uniform'"),
        ({"top_k": 0}, "0"),
        ({"share": 1.0}, r"1\.0"),
        ({"share": -0.1}, r"-0\.1"),
        ({"sources": ()}, "source"),
        ({"sources": ("mnli", "sst2", "mnli")}, "mnli"),
        *(
            ({"compose_by": by, "share": 0.3}, r"0\.3")
            for by in COMPOSITIONS
            if by != "private_sum"
        ),
        ({"compose_by": "sum", "share": "learned"}, "'learned'"),
        *(
            ({"compose_by": by, "private_length": 9}, "9")
            for by in COMPOSITIONS
            if by != "private_cat"
        ),
        ({"private_length": LENGTHS}, "private_length"),
        ({"compose_by": "private", "router": "softmax"}, "'softmax'"),
        ({"router": "sigmoid", "normalize": "sum"}, "normalize"),
        ({"draws": "step"}, "'step'"),
        ({"router": "softmax", "draws": "run"}, "draws = 'run' would have no effect"),
        ({"share": "joint", "top_k": 2}, "top_k = 2 would have no effect"),
        ({"share": "joint", "compose_by": "sum"}, "'joint'"),
        ({"share": "joint", "router": "attention"}, "needs a router that scores the private"),
        ({"share_temperature": 2.0}, "share_temperature = 2.0 would have no effect"),
        ({"share": "learned", "share_temperature": 0.0}, "SHARE_TEMPERATURE"),
        ({"compose_by": "private_cat", "private_length": 0}, "0"),
        ({"compose_by": "cat", "reparameterize": ("private",)}, "private"),
    ],
    ids=str,
)
def test_crosspt_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossPT(**{"length": P, "sources": CROSSPT_SOURCES, **settings})


def test_crosspt_private_length_missing_run_raises():
    method = crosspt(compose_by="private_cat", private_length={"task0": 3, "task1": 2})
    with pytest.raises(ValueError, match="'task2', only for task0, task1"):
        method.prompt_lengths(BANKS["joint"])

"""Tests of source selection by similarity, against the definitions pair by pair."""

import logging

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.spot import Embeddings, NearestSource, cosines

P, H = 3, 5
SOURCES = Runs(["mnli", "qqp", "sst2"])
TARGETS = Runs(["rte", "cb"])


def embeddings(runs: Runs, seed: int, path: str = "somewhere") -> Embeddings:
    prompts = np.random.default_rng(seed).normal(size=(runs.num_rows, P, H))
    return Embeddings(path, runs, prompts.astype(np.float32))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))


def by_hand(target: np.ndarray, source: np.ndarray, similarity: str) -> float:
    target, source = target.astype(np.float64), source.astype(np.float64)
    if similarity == "mean_pooled":
        return cosine(target.sum(0) / P, source.sum(0) / P)
    return sum(cosine(x, y) for x in target for y in source) / P**2


def rule(**settings) -> NearestSource:
    return NearestSource("sources", "targets", **settings)


@pytest.mark.parametrize("similarity", ["mean_pooled", "row_pairs"])
def test_cosines_match_definition(similarity):
    targets, sources = embeddings(TARGETS, 0).prompts, embeddings(SOURCES, 1).prompts
    expected = [[by_hand(t, s, similarity) for s in sources] for t in targets]
    names = TARGETS.run_names, SOURCES.run_names
    found = cosines(targets, sources, similarity, names)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # The norm of a whole prompt has no effect.
    found = cosines(3 * targets, sources / 7, similarity, names)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cosines_mean_pooled_and_row_pairs_can_disagree():
    """A long row dominates the mean, but counts like any other row in pairs."""
    target = np.array([[[1, 0], [1, 0]]], np.float32)
    sources = np.array([[[9, 0], [0, 1]], [[1, 0.5], [1, 0.5]]], np.float32)
    names = ["target"], ["long", "even"]
    pooled, pairs = (cosines(target, sources, by, names)[0] for by in ("mean_pooled", "row_pairs"))
    assert pooled.argmax() == 0 and pairs.argmax() == 1
    np.testing.assert_allclose(pairs, [0.5, 1 / np.sqrt(1.25)], rtol=1e-6)


@pytest.mark.parametrize("similarity", ["mean_pooled", "row_pairs"])
@pytest.mark.parametrize("seed", range(4))
def test_nearest_source_weights_proportional_to_similarity(similarity, seed):
    sources, targets = embeddings(SOURCES, seed), embeddings(TARGETS, seed + 9)
    nearest = rule(similarity=similarity).choose(sources, targets, SOURCES, TARGETS)
    for t, run in enumerate(TARGETS.run_names):
        found = [by_hand(targets.prompts[t], s, similarity) for s in sources.prompts]
        order = sorted(range(3), key=lambda s: found[s], reverse=True)
        assert nearest[run] == {SOURCES.run_names[order[0]]: 1.0}
        positive = {s: found[s] for s in order[:2] if found[s] > 0}
        if not positive:
            continue
        two = rule(similarity=similarity, top_k=2)
        one = Runs([run])
        weights = two.choose(sources, targets, SOURCES, one)[run]
        assert list(weights) == [SOURCES.run_names[s] for s in positive]
        expected = [value / sum(positive.values()) for value in positive.values()]
        np.testing.assert_allclose(list(weights.values()), expected, atol=1e-6)


def along(*angles: float) -> np.ndarray:
    """Returns one prompt of two equal rows per direction in degrees, [K, 2, 2]."""
    radians = np.deg2rad(angles)
    rows = np.stack([np.cos(radians), np.sin(radians)], -1)
    return np.repeat(rows[:, None], 2, axis=1).astype(np.float32)


def test_nearest_source_negative_similarity_has_no_weight():
    sources = Embeddings("s", SOURCES, along(60, 0, 120))
    target = Embeddings("t", Runs(["rte"]), along(0))
    table = rule(top_k=3).choose(sources, target, SOURCES, Runs(["rte"]))
    assert table == {"rte": {"qqp": pytest.approx(2 / 3), "mnli": pytest.approx(1 / 3)}}
    assert list(table["rte"]) == ["qqp", "mnli"]


def test_nearest_source_all_dissimilar_raises_unless_top_1():
    sources = Embeddings("s", SOURCES, along(170, 100, 180))
    target = Embeddings("t", Runs(["rte"]), along(0))
    assert rule().choose(sources, target, SOURCES, Runs(["rte"])) == {"rte": {"qqp": 1.0}}
    with pytest.raises(
        ValueError, match="No source has a positive similarity to 'rte' .*mnli -0.98"
    ):
        rule(top_k=2).choose(sources, target, SOURCES, Runs(["rte"]))


def test_nearest_source_choice_is_logged(caplog):
    sources = Embeddings("s", SOURCES, along(60, 0, 120))
    target = Embeddings("t", Runs(["rte"]), along(0))
    with caplog.at_level(logging.INFO, logger="absl"):
        rule().choose(sources, target, SOURCES, Runs(["rte"]))
    assert "rte starts from qqp (weight 1). Similarities: mnli 0.5, qqp 1" in caplog.text


def test_nearest_source_finds_rows_by_name():
    """The sources, their embeddings and the bank may have different orders."""
    shuffled = Runs(["cola", "sst2", "mnli", "qqp"])
    sources = Embeddings("s", shuffled, along(10, 20, 30, 40))
    targets = Embeddings("t", Runs(["cb", "rte"]), along(21, 39))
    table = rule().choose(sources, targets, SOURCES, Runs(["rte", "cb"]))
    assert table == {"rte": {"qqp": 1.0}, "cb": {"sst2": 1.0}}


def test_embeddings_run_without_own_row_uses_row_of_task():
    few = Runs(["rte", "rte"], ["rte_k4", "rte_k16"], "independent")
    targets = Embeddings("t", Runs(["rte"]), along(30))
    table = rule().choose(Embeddings("s", SOURCES, along(0, 31, 90)), targets, SOURCES, few)
    assert table == {"rte_k4": {"qqp": 1.0}, "rte_k16": {"qqp": 1.0}}
    with pytest.raises(ValueError, match=r"several embeddings of the task 'rte' \(rte_k4, rte_k16"):
        embeddings(few, 0).of(Runs(["rte"]))


def test_embeddings_unknown_run_raises_with_known_names():
    sources, targets = embeddings(SOURCES, 0), embeddings(TARGETS, 1, "the/targets")
    with pytest.raises(ValueError, match="the/targets has no task embedding of 'wic', only of rte"):
        rule().choose(sources, targets, SOURCES, Runs(["wic"]))
    with pytest.raises(ValueError, match=r"no task embedding of 'squad', only of mnli, qqp, sst2"):
        rule().choose(sources, targets, Runs(["mnli", "squad"]), TARGETS)


def test_nearest_source_top_k_above_sources_raises():
    with pytest.raises(ValueError, match="top_k is 4, .* holds 3 sources: mnli, qqp, sst2"):
        rule(top_k=4).choose(embeddings(SOURCES, 0), embeddings(TARGETS, 1), SOURCES, TARGETS)


def test_nearest_source_invalid_settings_raise():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        rule(top_k=0)
    with pytest.raises(ValueError, match="'mean_pool'.*Did you mean 'mean_pooled'"):
        rule(similarity="mean_pool")


@pytest.mark.parametrize("similarity", ["mean_pooled", "row_pairs"])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_cosines_zero_or_non_finite_embedding_raises(similarity, value):
    prompts = np.full((1, P, H), value, np.float32)
    names = ["rte"], SOURCES.run_names
    with pytest.raises(ValueError, match="embedding of 'rte' is zero or not finite"):
        cosines(prompts, embeddings(SOURCES, 0).prompts, similarity, names)

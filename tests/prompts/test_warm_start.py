"""Tests of weight tables over the rows of a source artifact, and of weighted means."""

import logging

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.factors import aligned
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.spot import NearestSource
from mpt_jax.prompts.warm_start import source_weights, weighted_mean

P, H, R = 4, 6, 2
SOURCES = Runs(["mnli", "qqp", "sst2"])
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(3, P, H)).astype(np.float32)
FACTORS = {
    "shared": RNG.normal(size=(1, P, H)).astype(np.float32),
    "task_left": RNG.normal(size=(3, P, R)).astype(np.float32),
    "task_right": RNG.normal(size=(3, R, H)).astype(np.float32),
}


@pytest.mark.parametrize(
    ("start_from", "names", "expected"),
    [
        ("average", ["x"], [[1, 1, 1]]),
        ("qqp", ["x", "mnli"], [[0, 1, 0], [0, 1, 0]]),
        ("same", ["sst2", "mnli"], [[0, 0, 1], [1, 0, 0]]),
        ("same_or_average", ["x", "sst2"], [[1, 1, 1], [0, 0, 1]]),
        ({"x": {"sst2": 0.2, "mnli": 0.6}, "y": {"qqp": 3}}, ["y", "x"], [[0, 3, 0], [0.6, 0, 0.2]])
    ],
)  # fmt: skip
def test_source_weights_every_setting_gives_weight_table(start_from, names, expected):
    np.testing.assert_array_equal(source_weights(start_from, SOURCES, Runs(names)), expected)


def test_weighted_mean_single_row_is_bit_exact():
    weights = np.array([[0.6, 0, 0.2], [0, 0.3, 0], [1, 1, 1]])
    mixed = weighted_mean(weights, TABLE)
    wide = TABLE.astype(np.float64)
    np.testing.assert_allclose(mixed[0], (3 * wide[0] + wide[2]) / 4, atol=1e-6)
    assert np.asarray(mixed[1]).tobytes() == TABLE[1].tobytes()
    np.testing.assert_allclose(mixed[2], wide.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("start_from", "message"),
    [
        ("mnil", "Unknown run 'mnil'.*'mnli'"),
        ("same", "Unknown run 'rte'.*mnli, qqp, sst2"),
        ("same_or_average", "none of rte is among its runs: mnli, qqp, sst2"),
        ({"cb": {"mnli": 1}}, "no entry for the run 'rte', only for cb"),
        ({"rte": {"squad": 1}}, "Unknown run 'squad'"),
        ({"rte": {"mnli": -1, "qqp": 2}}, "weights for 'rte': .*at least 0"),
        ({"rte": {"mnli": 0}}, "at least one is positive"),
        ({"rte": {}}, "at least one is positive"),
        ({"rte": {"mnli": float("nan")}}, "Use finite weights"),
        (NearestSource("a", "b"), "The task embeddings in a and b have not been read"),
    ],
)
def test_transfer_invalid_start_from_raises(start_from, message):
    for method, params in ((MPT(P, R), FACTORS), (PromptTuning(P), {"table": TABLE})):
        started = type(method)(**method.config(), start_from=start_from)
        with pytest.raises(ValueError, match=message):
            started.transfer(params, method, SOURCES, Runs(["rte"]))


# --- Added tasks ---------------------------------------------------------------------------------


def test_mpt_transfer_added_task_gets_average_others_keep_rows(caplog):
    runs = Runs(["sst2", "record", "mnli", "qqp"])
    method = MPT(P, R, start_from="same_or_average")
    with caplog.at_level(logging.INFO, logger="absl"):
        started = method.transfer(FACTORS, MPT(P, R), SOURCES, runs)
    np.testing.assert_array_equal(started["shared"], FACTORS["shared"])
    sides = aligned(*(np.asarray(FACTORS[f"task_{side}"]) for side in ("left", "right")))
    for name, side in zip(("task_left", "task_right"), sides, strict=True):
        old = np.asarray(started[name])[[2, 3, 0]]
        assert old.tobytes() == FACTORS[name].tobytes()
        np.testing.assert_allclose(started[name][1], side.mean(0), atol=1e-6)
    assert "record is new and starts from the average" in caplog.text
    assert "sst2 starts from its own row of the artifact" in caplog.text


def test_mpt_transfer_added_task_with_several_groups_raises():
    source = {**FACTORS, "shared": RNG.normal(size=(2, P, H)).astype(np.float32)}
    method = MPT(P, R, start_from="same_or_average")
    groups = Runs(SOURCES.run_names, groups=[0, 1, 0])
    for names in (["mnli", "record"], ["mnli", "qqp"]):
        with pytest.raises(ValueError, match="mnli.*one set of shared parameters.*2 groups"):
            method.transfer(source, MPT(P, R), groups, Runs(names))
    apart = Runs(["mnli", "qqp"], groups="independent")
    started = method.transfer(source, MPT(P, R), groups, apart)
    np.testing.assert_array_equal(started["shared"], source["shared"])


def test_prompt_tuning_transfer_mixes_only_by_weights():
    method = PromptTuning(P, start_from="same_or_average")
    with pytest.raises(ValueError, match="holds 3 prompts: mnli, qqp, sst2.*weights"):
        method.transfer({"table": TABLE}, PromptTuning(P), SOURCES, Runs(["mnli", "record"]))
    both = PromptTuning(P, start_from={"record": {"mnli": 1, "sst2": 3}})
    table = both.transfer({"table": TABLE}, PromptTuning(P), SOURCES, Runs(["record"]))["table"]
    np.testing.assert_allclose(table[0], TABLE[0] / 4 + TABLE[2] * 3 / 4, atol=1e-6)


def test_prompt_tuning_transfer_shared_prompt_copies_it():
    shared = {"shared": TABLE[:1]}
    started = PromptTuning(P).transfer(shared, SharedPrompt(P), SOURCES, Runs(["rte", "cb"]))
    np.testing.assert_allclose(started["table"], TABLE[[0, 0]], rtol=1e-6)


def test_mpt_transfer_weight_table_mixes_factors_copies_shared():
    method = MPT(P, R, start_from={"rte": {"mnli": 0.75, "sst2": 0.25}})
    started = method.transfer(FACTORS, MPT(P, R), SOURCES, Runs(["rte"]))
    np.testing.assert_array_equal(started["shared"], FACTORS["shared"])
    sides = aligned(*(np.asarray(FACTORS[f"task_{side}"]) for side in ("left", "right")))
    for name, side in zip(("task_left", "task_right"), sides, strict=True):
        np.testing.assert_allclose(started[name][0], 0.75 * side[0] + 0.25 * side[2], atol=1e-6)

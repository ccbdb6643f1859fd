"""Parameters of lanes and heads: counts, initial values, transfer, and artifacts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.base import method_from_config
from mpt_jax.prompts.cocoop import CoCoOp
from mpt_jax.prompts.init import SampledVocabulary
from mpt_jax.prompts.lanes import HEAD, LANE, LaneInit, MultiLane, num_rows, split_rows
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SiteContext, SitePrompts
from tests.fixtures import tiny_lanes

H = 768
WIDE = SiteContext(jnp.zeros((0, H)), None, H, H)
SMALL = SiteContext(jnp.zeros((0, 24)), None, 24, 24)
RUNS = Runs(["one", "two", "three"])


def lanes(selectors, length, layers, classes, start_from: Any = "average", **init):
    rows = num_rows(selectors, length, layers)
    lane = PromptTuning(rows, LaneInit(selectors, layers, **init), start_from)
    return MultiLane(lane, classes, selectors, layers)


def initial(method, runs, context=WIDE, seed=0):
    return method.init(jax.random.PRNGKey(seed), runs, context)


# Tasks, A, P, n, the number of classes of each task, and the published number of parameters.
SETTINGS = {
    "VOC B0-C4": (10, 10, 5, [4] * 5, 437_780),
    "VOC B10-C2": (10, 10, 5, [10] + [2] * 5, 522_260),
    "COCO B0-C10": (20, 20, 5, [10] * 8, 1_413_200),
    "COCO B40-C10": (20, 20, 5, [40] + [10] * 4, 906_320),
    "ImageNet-R": (20, 20, 12, [20] * 10, 3_993_800),
    "CIFAR-100": (20, 20, 5, [10] * 10, 1_766_500),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_published_numbers_of_parameters(name):
    selectors, length, layers, classes, expected = SETTINGS[name]
    method = lanes(selectors, length, layers, max(classes))
    runs = Runs([f"task {i}" for i in range(len(classes))])
    shapes = flatten(
        jax.eval_shape(lambda key: method.init(key, runs, WIDE), jax.random.PRNGKey(0))
    )
    assert {name: x.shape for name, x in shapes.items()} == {
        "lane/table": (len(classes), num_rows(selectors, length, layers), H),
        "head/kernel": (len(classes), max(classes), H),
        "head/bias": (len(classes), max(classes)),
    }
    used = np.prod(shapes["lane/table"].shape) + sum(classes) * (H + 1)
    assert used == expected


def test_initial_values_have_the_published_scale():
    method = lanes(10, 10, 5, 4, lanes=5)
    params = initial(method, RUNS)
    found = method.lanes(params, RUNS, jnp.arange(3))
    assert found.selectors.shape == (3, 10, H) and found.keys.shape == (3, 5, 10, H)
    flat = lambda x: np.asarray(x).reshape(*x.shape[:-2], -1)  # noqa: E731
    selectors = flat(found.selectors)
    np.testing.assert_allclose(np.linalg.norm(selectors, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(selectors.std(), (10 * H) ** -0.5, rtol=0.02)
    assert np.abs(selectors @ selectors.T - np.eye(3)).max() < 0.05
    keys, values = flat(found.keys), flat(found.values)
    np.testing.assert_allclose((keys * values).sum(-1), 0, atol=1e-6)
    for x in (keys, values):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 5**-0.5, rtol=1e-5)
        np.testing.assert_allclose(x.std(), (5 * 10 * H) ** -0.5, rtol=0.02)
    kernel, bias = method.head(params, jnp.arange(3))
    for x in (kernel, bias):
        assert np.abs(x).max() <= H**-0.5
    np.testing.assert_allclose(np.std(kernel), (3 * H) ** -0.5, rtol=0.03)


def test_other_initial_values():
    found = initial(lanes(4, 3, 2, 4, kind="uniform", selector_kind="zero"), RUNS)[LANE]["table"]
    assert (found[:, :4] == 0).all()
    np.testing.assert_allclose(np.std(found[:, 4:]), 3**-0.5, rtol=0.02)
    found = initial(lanes(4, 0, 0, 4, selector_kind="uniform"), RUNS)[LANE]["table"]
    assert found.shape == (3, 4, H) and 0.99 < np.abs(found).max() <= 1


def test_initial_values_depend_on_names_only():
    method = lanes(3, 2, 2, 4)
    first = flatten(initial(method, RUNS, SMALL))
    second = flatten(initial(method, Runs(["three", "one"]), SMALL))
    for name, values in second.items():
        np.testing.assert_array_equal(values, first[name][jnp.array([2, 0])])


def test_rows_are_selectors_then_keys_and_values_by_layer():
    rows = jnp.arange(11.0)[:, None]
    parts = split_rows(rows, 3, 2)
    assert parts.selectors[:, 0].tolist() == [0, 1, 2]
    assert parts.keys[..., 0].tolist() == [[3, 4], [7, 8]]
    assert parts.values[..., 0].tolist() == [[5, 6], [9, 10]]


def test_next_stage_copies_the_previous_lane_and_starts_a_new_head():
    source_runs = Runs(["one", "two"])
    source_method = lanes(3, 2, 2, 4)
    source = initial(source_method, source_runs, SMALL, seed=1)
    table = {"one": "one", "two": "two", "three": "two"}
    method = lanes(3, 2, 2, 6, table)  # more classes than any task had
    new = initial(method, RUNS, SMALL)
    started = method.transfer(source, source_method, source_runs, RUNS, lambda: new)
    np.testing.assert_array_equal(
        started[LANE]["table"], source[LANE]["table"][jnp.array([0, 1, 1])]
    )
    for name in ("kernel", "bias"):
        found, old, fresh = (np.asarray(x[HEAD][name]) for x in (started, source, new))
        np.testing.assert_array_equal(found[:2, :4], old)
        np.testing.assert_array_equal(found[2], fresh[2])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lanes(2, 2, 2, 4), "selectors is 2, but the initial artifact has 3"),
        (lanes(3, 2, 2, 3, "same"), r"head .* shape \(4, 24\) .*num_classes"),
        (dataclasses.replace(lanes(3, 2, 2, 4), drop_and_replace=False), "drop_and_replace is F"),
    ],
)
def test_artifacts_that_do_not_fit(method, message):
    source_method = lanes(3, 2, 2, 4)
    source = initial(source_method, RUNS, SMALL)
    with pytest.raises(ValueError, match=message):
        method.transfer(source, source_method, RUNS, RUNS, lambda: initial(method, RUNS, SMALL))
    plain = SitePrompts(PromptTuning(3, LaneInit(3, 0)))
    with pytest.raises(ValueError, match="has no lanes"):
        method.transfer({}, plain, RUNS, RUNS, dict)


@pytest.mark.parametrize("lane", [None, MPT(11, 2, LaneInit(3, 2))])
def test_artifact_round_trip(lane, tmp_path):
    model = tiny_lanes.model(tiny_lanes.method(lane))
    prompt = tiny_lanes.params(model)["prompt"]
    digests = {"embedding_sha256": "e", "backbone_sha256": None, "vocabulary_sha256": None}
    artifacts.save_artifact(
        tmp_path / "artifact", model.prompt, prompt, model.runs, step=3, backbone="vit",
        digests={**digests, **model.input_digests}, images=model.input_settings,
        include_folded=True,
    )  # fmt: skip
    found = artifacts.load_artifact(tmp_path / "artifact")
    assert found.method.config() == model.prompt.config() and found.runs == model.runs
    for name, values in flatten(prompt).items():
        np.testing.assert_array_equal(flatten(found.params)[name], values)
    assert found.config["images"]["tasks"]["tags"]["multi_label"]
    again = method_from_config("multi_lane", model.prompt.config(), "the file")
    assert again.config() == model.prompt.config()


def test_settings_from_files_are_checked():
    config = lanes(3, 2, 2, 4).config()
    for change, message in [
        ({"selectors": -1}, "selectors"),
        ({"num_classes": 0}, "num_classes"),
        ({"layers": 3}, "11 rows of the lane"),
        ({"extra": 1}, "extra"),
    ]:
        with pytest.raises(ValueError, match=message):
            method_from_config("multi_lane", {**config, **change}, "config.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lanes(3, 2, 2, 0), "0 classes"),
        (lambda: MultiLane(PromptTuning(4), 4, 3, 2), "4 rows of the lane are not 3 selectors"),
        (lambda: MultiLane(PromptTuning(2), 4, 3, 0), "2 rows of the lane"),
        (lambda: MultiLane(CoCoOp(11), 4, 3, 2), "depends only on the task"),
        (lambda: dataclasses.replace(lanes(3, 2, 2, 4), merged_tokens=4), "one of the two"),
        (lambda: LaneInit(3, 2, "zero"), "LANE_INIT 'zero'"),
        (lambda: LaneInit(3, 2, selector_kind="ones"), "SELECTOR_INIT 'ones'"),
        (lambda: LaneInit(3, 2, lanes=0), "lanes is 0"),
        (lambda: initial(MultiLane(PromptTuning(11, SampledVocabulary()), 4, 3, 2), RUNS),
         "cannot start from token embeddings"),
    ],
)  # fmt: skip
def test_settings_that_contradict(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Artifacts whose config.json has other types, numbers out of range, or does not fit the arrays."""

from __future__ import annotations

import json

import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core import schema
from mpt_jax.core.runs import Runs
from tests.fixtures import saved_artifacts

IMAGES = {
    "transform": {"size": 224, "mode": "crop", "resize_to": None},
    "context_position": "end",
    "tasks": {"rte": {"names": ["cat", "dog"], "templates": ["a {}."], "multi_label": False}},
}


def with_transform(**settings):
    return {**IMAGES, "transform": {**IMAGES["transform"], **settings}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"groups": [1e30, 0, 0]}, r"has groups\[0\] = 1e\+30, but an integer was expected"),
        ({"groups": [2**31 - 1, 0, 1]}, r"group number from 0 to G-1, without a gap"),
        ({"groups": [0, 0, 0]}, r"has shared of type float32 and shape \(2, 4, 6\)"),
        ({"groups": {"a": 1}}, "but a list was expected"),
        ({"task_names": "rte"}, 'task_names = "rte", but a list was expected'),
        ({"run_names": ["a", "b", None]}, r"run_names\[2\] = null, but a string"),
        ({"shapes": {"shared": [2, 4, 6.5]}}, "but an integer was expected"),
        ({"shapes": [1]}, r"shapes = \[1\], but an object was expected"),
        ({"method": ["mpt"]}, r'method = \["mpt"\], but a string was expected'),
        ({"method": "prompt_tuning", "method_config": {"prompt_length": 4}}, "no such parameter"),
        ({"method_config": []}, "but an object was expected"),
        ({"method_config": {"prompt_length": 10**9, "rank": 2}}, "arrays give prompts"),
        ({"method_config": {"prompt_length": 10**30, "rank": 2}}, "<= 2147483647 was expected"),
        ({"method_config": {"prompt_length": -1, "rank": 2}}, ">= 1 was expected"),
        ({"method_config": {"prompt_length": "4", "rank": 2}}, 'value "4", but an integer'),
        ({"method_config": {"prompt_length": 4, "init_factors": 3}}, "does not have: init_factors"),
        ({"method_config": {"rank": 2}}, "lacks settings of the method 'mpt': prompt_length"),
        ({"embedding_sha256": None}, "embedding_sha256 = null, but a string"),
        ({"metrics": {"scores": {"rte_s1": {"accuracy": "x"}}}}, "but a number was expected"),
        ({"images": None}, "has images = null, but an object was expected"),
        ({"images": IMAGES}, "has the field images, but the prompts of its method 'mpt' are for"),
        ({"images": with_transform(size=2**31)}, "images.transform.size = 2147483648, but"),
        (
            {"images": with_transform(resize_to=223)},
            r"images.transform = .*, which is invalid \(resize_to is less than size\)",
        ),
        ({"format": [1]}, r"has artifact format \[1\], but this version"),
    ],
)
def test_load_artifact_of_a_wrong_config_error_names_the_field(tmp_path, change, problem):
    path = saved_artifacts.save_example(tmp_path / "a")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=problem):
        artifacts.load_artifact(path)


def test_load_artifact_of_a_later_version_with_more_fields_is_read(tmp_path):
    path = saved_artifacts.save_example(tmp_path / "a")
    config = json.loads((path / "config.json").read_text())
    later = schema.sealed({**config, "of_a_later_version": {"x": [1]}}, artifacts.SEAL)
    (path / "config.json").write_text(json.dumps(later))
    assert artifacts.load_artifact(path).config["of_a_later_version"] == {"x": [1]}


def test_load_artifact_of_deep_json_error(tmp_path):
    path = saved_artifacts.save_example(tmp_path / "a")
    (path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        artifacts.load_artifact(path)


@pytest.mark.parametrize("groups", [[10**30], [2**31], [-1]])
def test_runs_of_numbers_that_are_no_groups_error(groups):
    with pytest.raises(ValueError, match="Renumber GROUPS"):
        Runs(["rte"], groups=groups)

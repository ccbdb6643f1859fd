"""Comparison of a saved configuration with the current one."""

from __future__ import annotations

import pytest

from mpt_jax.core.comparison import MOST_SHOWN, check_same, differences


def test_differences_equal_configurations_empty():
    assert differences({"a": 1, "from a later version": 2}, {"a": 1}) == ""
    check_same({"a": 1}, {"a": 1}, what="x", advice="y")


def test_differences_changed_values_show_both():
    saved, current = {"a": 1, "b": [2], "c": 3}, {"a": 1, "b": [3], "d": None, "e": 4}
    assert differences(saved, current) == ("b: saved [2], current [3]; e: saved nothing, current 4")
    assert differences(saved, current, ["c"]) == "c: saved 3, current nothing"


def test_differences_too_many_to_show_counted():
    current = {f"n{i}": i for i in range(MOST_SHOWN + 3)}
    found = differences({}, current)
    assert found.count("saved nothing") == MOST_SHOWN and found.endswith("; and 3 more")


def test_check_same_other_configuration_error_with_advice():
    with pytest.raises(ValueError) as error:
        check_same({"a": 1}, {"a": 2}, what="The run in x", advice="Remove x.")
    assert str(error.value) == (
        "The run in x was saved with another configuration (a: saved 1, current 2). Remove x."
    )

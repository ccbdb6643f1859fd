"""Schemas of files: what an error says, and what is read."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from mpt_jax.core import schema


class Inner(msgspec.Struct):
    state: str


class Example(msgspec.Struct):
    groups: list[schema.Count]
    name: str
    shapes: dict[str, list[int]] = {}
    runs: list[Inner] = []
    score: float | None = None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            {"groups": [0, 1e30], "name": "a"},
            "has groups[1] = 1e+30, but an integer was expected",
        ),
        ({"groups": [-1], "name": "a"}, "has groups[0] = -1, but an integer >= 0 was expected"),
        ({"groups": [True], "name": "a"}, "has groups[0] = true, but an integer was expected"),
        ({"groups": [2**40], "name": "a"}, "an integer <= 2147483647 was expected"),
        ({"groups": {}, "name": "a"}, "has groups = {}, but a list was expected"),
        ({}, "is incomplete: it lacks groups, name."),
        ({"groups": [], "name": "a", "runs": [{}]}, "is incomplete: runs[0] lacks state."),
        (
            {"groups": [], "name": "x" * 500 + "y", "score": "z" * 500},
            f'has score = "{"z" * 76}...',
        ),
        ([], "has the value [], but an object was expected"),
        ({"groups": [], "name": "a", "shapes": {"k": ["x"]}}, 'shapes[...][0] = {"k": ["x"]}'),
        ({"groups": [], "name": "a", "score": 10**400}, "Number out of range"),
    ],
)
def test_check_of_a_wrong_value_error_names_place_value_and_fix(value, problem):
    with pytest.raises(ValueError) as error:
        schema.check(value, Example, "F.json", "Copy it.")
    assert f"F.json {problem}" in str(error.value) or problem in str(error.value)
    assert str(error.value).startswith("F.json ") and str(error.value).endswith(" Copy it.")
    assert len(str(error.value)) < 300


def test_check_of_an_unknown_field_reads_the_others():
    found = schema.check({"groups": [1], "name": "a", "of_a_later_version": 3}, Example, "F.json")
    assert found.groups == [1] and found.runs == []


def test_parse_of_not_a_number_is_read():
    assert math.isnan(schema.parse('{"score": NaN}', "F.json")["score"])


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[" * 101 + "]" * 101, '{"a":' * 200_000, "{", "1" * 9999]
)
def test_parse_of_deep_or_broken_json_value_error(text):
    with pytest.raises(ValueError, match=r"^F.json (is not JSON|cannot be read): .* Copy the file"):
        schema.parse(text, "F.json")


def test_damage_changes_errors_of_bytes_and_keeps_errors_of_access():
    with pytest.raises(ValueError, match=r"^F is damaged: it has no 'x'\. Copy it\.$"):
        with schema.damage("F is damaged", "Copy it."):
            raise KeyError("x")
    with pytest.raises(PermissionError), schema.damage("F is damaged", "Copy it."):
        raise PermissionError("no access")
    with pytest.raises(MemoryError), schema.damage("F is damaged", "Copy it."):
        raise MemoryError


RECORD = {"scores": {"rte": {"accuracy": 50.0, "loss": math.nan}}, "step": 3}


def test_check_seal_of_an_unchanged_record_passes():
    sealed = schema.sealed({**RECORD, "lengths": (1, 2), "history": {3: [None]}}, "seal")
    assert sealed["lengths"] == [1, 2] and sealed["history"] == {"3": [None]}
    schema.check_seal(schema.parse(json.dumps(sealed, indent=2), ""), "seal", "FILE")
    assert schema.sealed(sealed, "seal") == sealed
    schema.check_seal(RECORD, "seal", "FILE")  # of an earlier version
    schema.check_seal([], "seal", "FILE")


@pytest.mark.parametrize(
    "changed",
    [
        {**RECORD, "step": 4},
        {**RECORD, "more": None},
        {"step": 3},
        dict(reversed(RECORD.items())),
        {**RECORD, "scores": {"rte": {"loss": math.nan, "accuracy": 50.0}}},
    ],
)
def test_check_seal_of_a_changed_record_error_shows_both_digests(changed):
    seal = schema.sealed(RECORD, "seal")["seal"]
    with pytest.raises(ValueError, match=f"FILE was changed .* [0-9a-f]{{64}}, .*{seal}. Copy"):
        schema.check_seal({**changed, "seal": seal}, "seal", "FILE", "Copy it.")
    with pytest.raises(ValueError, match=r"its seal is \[1\]"):
        schema.check_seal({**RECORD, "seal": [1]}, "seal", "FILE")

"""Rows, runs and groups of a prompt bank."""

import subprocess
import sys

import pytest

from mpt_jax.core.runs import Runs, entry_of_run, unknown_name


def test_runs_joint_one_group_and_task_names():
    runs = Runs(["rte", "cb", "wic"])
    assert runs.run_names == runs.task_names == ("rte", "cb", "wic")
    assert (runs.num_rows, runs.num_groups) == (3, 1)
    assert runs.group_of_row == (0, 0, 0)


def test_runs_independent_one_group_per_row():
    runs = Runs(["cb", "cb"], run_names=["cb_s1", "cb_s2"], groups="independent")
    assert runs.group_of_row == (0, 1)
    assert runs.task_names == ("cb", "cb")
    assert runs.row("cb_s2") == 1


def test_runs_row_many_runs_uses_cached_table():
    runs = Runs([f"run_{i}" for i in range(5000)])
    shown, hashed = repr(runs), hash(runs)
    assert [runs.row(name) for name in runs.run_names] == list(range(5000))
    assert runs._rows is runs._rows, "the table is built once"
    assert (repr(runs), hash(runs)) == (shown, hashed) and runs == Runs(list(runs.task_names))


def test_runs_groups_by_number_counted():
    runs = Runs(["a", "b", "c", "d"], groups=[1, 0, 1, 0])
    assert (runs.num_groups, runs.group_of_row) == (2, (1, 0, 1, 0))


def test_runs_same_arguments_equal_and_hashable():
    """Models are static arguments of compiled steps."""
    assert Runs(["a", "b"]) == Runs(("a", "b"), groups=(0, 0))
    assert hash(Runs(["a", "b"])) == hash(Runs(("a", "b")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task_names": []}, "must be a list of at least one"),
        ({"task_names": "rte"}, "'rte'"),
        ({"task_names": ["a", "b"], "run_names": ["a"]}, "2 task names but 1 run names"),
        ({"task_names": ["cb", "cb"]}, "more than once: cb"),
        ({"task_names": ["a", "b"], "groups": "apart"}, "'apart'"),
        ({"task_names": ["a", "b"], "groups": [0]}, "each of the 2 runs"),
        ({"task_names": ["a", "b"], "groups": [0, 2]}, r"without a gap, got \(0, 2\)"),
        ({"task_names": ["a", "b"], "groups": [1, 2]}, "without a gap"),
        ({"task_names": ["a", "b"], "groups": [-1, 0]}, "without a gap"),
    ],
)
def test_runs_invalid_arguments_error(arguments, says):
    with pytest.raises(ValueError, match=says):
        Runs(**arguments)


def test_runs_row_unknown_name_error_lists_closest_and_known():
    runs = Runs(["toy_boolq", "toy_rte", "toy_wic"])
    with pytest.raises(ValueError) as error:
        runs.row("toy_bolq")
    message = str(error.value)
    assert "Unknown run 'toy_bolq'" in message
    assert "Did you mean 'toy_boolq'" in message
    for name in runs.run_names:
        assert name in message


def test_unknown_name_nothing_known_says_none():
    assert unknown_name("task", "x", []) == "Unknown task 'x'. Known: none."


def test_entry_of_run_missing_error_names_table_run_and_entries():
    assert entry_of_run({"a": 1, "b": 2}, "b", "START_FROM") == 2
    with pytest.raises(ValueError, match="START_FROM has no entry for the run 'c', only for a, b"):
        entry_of_run({"a": 1, "b": 2}, "c", "START_FROM")


def test_groups_of_other_types_error():
    """In a process without the type checks of the tests, as in a job."""
    code = """
from mpt_jax.core.runs import Runs
for groups in (2, 1.5, ["a"], [None]):
    try:
        Runs(["rte"], groups=groups)
    except ValueError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert len(lines) == 4
    for line, shown in zip(lines, ("2", "1.5", "'a'", "None"), strict=True):
        assert f"groups must be a list of integers, got {shown}. Set GROUPS to" in line

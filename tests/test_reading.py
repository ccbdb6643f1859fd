"""docs/reading.md: what its paths name is there, and its counts are those of the files."""

from __future__ import annotations

import ast
import re

import pytest

from tests.fixtures.processes import ROOT

TEXT = (ROOT / "docs" / "reading.md").read_text()
QUESTIONS = re.findall(r"^## (\w)\. .*\n\n(\d+) files, (\d+) lines\.\n\n((?:\|.*\n)+)", TEXT, re.M)
ENTRY = re.compile(r"^\| `([\w./]+)`(?: `(.+?)`)? \| (\d+) \|", re.M)
STOPS = re.findall(r"^\| (\d+) \| `([\w./]+)` `([\w.]+)` \|", TEXT, re.M)
# The two that have no counterpart in T5X; the limits below are for the others.
OURS_ALONE = {"b", "f"}


def num_lines(path: str, name: str) -> int:
    """The lines of a function or class with its docstring, of a section of a page, or of a file."""
    text = (ROOT / path).read_text()
    if not name:
        return len(text.splitlines())
    if path.endswith(".md"):
        (section,) = re.findall(rf"^## {re.escape(name)}\n(?:(?!## ).*\n)*", text, re.M)
        return len(section.splitlines())
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        (node,) = (x for x in node.body if getattr(x, "name", None) == part)  # type: ignore
    first = min([node.lineno, *(x.lineno for x in node.decorator_list)])  # type: ignore
    return node.end_lineno - first + 1  # type: ignore


@pytest.mark.parametrize(("question", "files", "lines", "entries"), QUESTIONS)
def test_counts_of_a_path_are_those_of_its_files(question, files, lines, entries):
    found = ENTRY.findall(entries)
    assert len(found) == len(entries.splitlines()) - 2
    for path, name, count in found:
        assert num_lines(path, name) == int(count), f"{path} {name}"
    assert len({path for path, _, _ in found}) == int(files)
    assert sum(int(count) for *_, count in found) == int(lines)
    (row,) = re.findall(rf"^\| \[{question}\].* \| (\d+) \| (\d+) \|$", TEXT, re.M)
    assert row == (files, lines)


def test_totals_of_the_paths_are_their_sums():
    assert "".join(question for question, *_ in QUESTIONS) == "abcdefghij"
    for label, chosen in (
        ("all ten", QUESTIONS),
        ("without b and f", [x for x in QUESTIONS if x[0] not in OURS_ALONE]),
    ):
        files, lines = (sum(int(x[i]) for x in chosen) for i in (1, 2))
        assert f"| {label} | {files} | {lines} |" in TEXT
    assert files <= 25 and lines <= 1200


def test_the_path_of_the_configuration_names_functions_that_are_there():
    assert [int(number) for number, _, _ in STOPS] == list(range(1, len(STOPS) + 1))
    assert all(num_lines(path, name) for _, path, name in STOPS)
    assert len(STOPS) <= 17

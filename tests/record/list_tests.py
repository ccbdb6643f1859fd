"""Lists every test function with what it proves, as tests/record/properties.tsv.

    python tests/record/list_tests.py

Columns: the test's id when the list was made; what it proves, from its name and its docstring's
first line; its id now (the same when the list is made; whoever moves a test edits it, and several
ids are separated by spaces); and how many cases its parameters make, where that can be read off
the source. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("properties.tsv")
COLUMNS = ("old", "proves", "new", "cases")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """(id within the file, test function), in the order of the file."""
    for node in tree.body:
        if isinstance(node, Function) and node.name.startswith("test"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for inner in node.body:
                if isinstance(inner, Function) and inner.name.startswith("test"):
                    yield f"{node.name}::{inner.name}", inner


def proves(node: Function) -> str:
    """A test's name as a sentence, and the first line of its docstring."""
    sentence = node.name.removeprefix("test_").replace("_", " ")
    first = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    return f"{sentence}. {first}" if first else sentence


def cases(node: Function, constants: Mapping[str, ast.expr]) -> int | None:
    """How many cases a test's own parameters make; None where the source does not tell."""
    sizes = []
    for decorator in node.decorator_list:
        if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("etrize")):
            continue
        given = {keyword.arg: keyword.value for keyword in decorator.keywords}
        values = decorator.args[1] if len(decorator.args) > 1 else given.get("argvalues")
        sizes.append(_length(values, constants))
    return None if None in sizes else math.prod(sizes)


def _length(node: ast.expr | None, constants: Mapping[str, ast.expr]) -> int | None:
    if isinstance(node, ast.Name):
        node = constants.get(node.id)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        parts = [
            _length(x.value, constants) if isinstance(x, ast.Starred) else 1 for x in node.elts
        ]
        return None if None in parts else sum(parts)
    if isinstance(node, ast.Dict):
        return None if None in node.keys else len(node.keys)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "range":
        try:
            return len(range(*map(ast.literal_eval, node.args)))
        except ValueError:
            return None
    return None


def fixtures_of_several(tree: ast.Module) -> set[str]:
    """Fixtures of a file that make several cases of a test, which `cases` does not count, and those
    that use one."""
    defined = {node.name: node for node in tree.body if isinstance(node, Function)}
    found = {
        name
        for name, node in defined.items()
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and any(x.arg == "params" for x in decorator.keywords)
    }
    while more := {name for name, node in defined.items() if found & _arguments(node)} - found:
        found |= more
    return found


def _arguments(node: Function) -> set[str]:
    return {argument.arg for argument in node.args.args}


def rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """A line for each test of a file."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    several = fixtures_of_several(tree)
    for name, node in functions(tree):
        old = f"{path.relative_to(TESTS.parent)}::{name}"
        count = cases(node, constants)
        if several & _arguments(node):
            count = None
        yield old, proves(node), old, "" if count is None else str(count)


def main() -> None:
    """Writes the list."""
    files = sorted(TESTS.rglob("test_*.py"))
    with TARGET.open("w", newline="") as stream:
        writer = csv.writer(
            stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
        )
        writer.writerow(COLUMNS)
        writer.writerows(row for path in files for row in rows(path))


if __name__ == "__main__":
    main()

"""The troubleshooting pages quote errors as the code words them."""

from __future__ import annotations

import ast
import re

import pytest

from tests.fixtures.processes import ROOT

PAGES = ("troubleshooting.md", "troubleshooting-data.md", "troubleshooting-runs.md")
# What stands for a value in a quotation: names in quotes, numbers, brackets, macros, paths, files.
VALUE = re.compile(
    r"\.\.\.|'[^']*'|\b\d[\d,.]*\b|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)"
    r"|\S*[/_=]\S*|\w+\.\w+|[;:.] "
)
SHORTEST = 14  # characters of a fragment that is searched


def quotations() -> list[tuple[str, str]]:
    """Returns (page, quotation)."""
    return [
        (page, quotation)
        for page in PAGES
        for quotation in re.findall(r"^> `(.+)`$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    ]


def texts_of_the_code() -> str:
    """Returns all string literals of the library; NUL stands for a formatted value."""
    found = []
    for path in (ROOT / "mpt_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "\0" for x in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.fixture(scope="module")
def code() -> str:
    return texts_of_the_code()


def test_quotations_exist_in_every_page():
    pages = [page for page, _ in quotations()]
    assert min(pages.count(page) for page in PAGES) >= 8


@pytest.mark.parametrize(("page", "quotation"), quotations())
def test_quotation_of_a_page_is_in_the_code(page, quotation, code):
    for fragment in VALUE.split(quotation):
        fragment = fragment.strip(" .,:;`)(")
        assert len(fragment) < SHORTEST or fragment in code, fragment

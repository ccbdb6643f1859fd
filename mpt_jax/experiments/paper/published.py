"""The paper's figures, from published.toml."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")
TOLERANCE = 0.05  # figures are printed with one decimal


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a published table.

    Attributes:
        name: as the paper has it, with its trained parameters.
        of: the variant of ours that it is set beside; None for methods that are not here.
        source: 'paper'; '† X' where the paper, as we remember it, took it from X; or another note.
        values: shots (None for all) -> task or average -> figure.
        stds: of `values`, where they are printed; for all examples.
    """

    name: str
    of: str | None
    source: str
    values: Mapping[int | None, Mapping[str, float]]
    stds: Mapping[str, float]


def rows(table: str) -> list[Row]:
    """The published rows of a table; none for a table that the paper does not have."""
    return [
        Row(
            name=row["name"],
            of=row.get("of"),
            source=f"† {row['from']}" if "from" in row else row.get("note", "paper"),
            values={int(shots): found for shots, found in row.get("shots", {}).items()}
            | ({None: row["values"]} if "values" in row else {}),
            stds=row.get("stds", {}),
        )
        for row in _read().get(table, {}).get("rows", [])
    ]


def majority() -> Mapping[str, float]:
    """Shares of the most frequent label in the paper's test splits, where they are known."""
    return _read()["majority"]


@functools.cache
def _read() -> Mapping[str, Any]:
    return tomllib.loads(FILE.read_text())

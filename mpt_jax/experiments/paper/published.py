"""The paper's published figures, read from published.toml."""

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
        name: as in the paper, with the number of trained parameters.
        of: our variant that the row is compared with; None for methods that we do not have.
        source: 'paper'; '† X' if the paper, as we remember it, took the row from X; or a note.
        values: shots (None for all) -> task or average -> figure.
        stds: published standard deviations of the figures on all examples.
    """

    name: str
    of: str | None
    source: str
    values: Mapping[int | None, Mapping[str, float]]
    stds: Mapping[str, float]


def rows(table: str) -> list[Row]:
    """Returns the published rows of a table; [] for a table that the paper does not have."""
    return [
        Row(
            name=row["name"],
            of=row.get("of"),
            source=f"† {row['from']}" if "from" in row else row.get("note", "paper"),
            values={int(shots): figures for shots, figures in row.get("shots", {}).items()}
            | ({None: row["values"]} if "values" in row else {}),
            stds=row.get("stds", {}),
        )
        for row in _read().get(table, {}).get("rows", [])
    ]


def majority() -> Mapping[str, float]:
    """Returns the known majority-class shares of the paper's test splits, in percent."""
    return _read()["majority"]


@functools.cache
def _read() -> Mapping[str, Any]:
    return tomllib.loads(FILE.read_text())

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
        name: The method as named in the paper, with the number of trained parameters.
        of: The variant of ours that corresponds to the row; None if there is none.
        source: The origin of the figures: 'paper'; '† X' if, as far as we remember, the paper took
            the row from paper X; or another source.
        values: Number of examples (None for all) -> task or average -> figure.
        stds: Task or average -> published standard deviation, for all examples.
    """

    name: str
    of: str | None
    source: str
    values: Mapping[int | None, Mapping[str, float]]
    stds: Mapping[str, float]


def rows(table: str) -> list[Row]:
    """Returns the published rows of a table, or [] if nothing is published for it."""
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
    """Returns task -> majority-class share of the paper's test split in percent, if known."""
    return _read()["majority"]


@functools.cache
def _read() -> Mapping[str, Any]:
    return tomllib.loads(FILE.read_text())

"""What the formats of `benchmarks.fuzz` have in common: their description, and small arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten

P, H = 4, 6
RUNS = Runs(["rte", "rte", "cb"], ["rte_s1", "rte_s2", "cb_s1"], groups=[0, 1, 0])


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that is read.

    Attributes:
        write: writes an example into an empty folder.
        read: reads the folder; returns what it holds, to compare, as a text.
        has_digest: whether all that is read is compared with recorded digests, so that a mutated
            file is rejected or read as the original.
        changes_folder: whether reading changes the folder, which is then copied for each input.
        share: how often the format is drawn. Formats that take longer to read have smaller shares.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], str]
    has_digest: bool = False
    changes_folder: bool = False
    share: int = 2


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns random float32 arrays of some shapes."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def fields(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns some fields of a record: those that are used, without its digest, whose name or value
    may have been mutated."""
    return {name: record.get(name) for name in names}


def text(tree: Any, *others: Any) -> str:
    """Returns a text that differs between trees of arrays, and between other values."""
    return artifacts.digest(flatten(tree)) + repr(others)

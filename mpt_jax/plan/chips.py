"""TPUs: what a chip can do, and which slices there are."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip, from Google Cloud's documentation of each TPU.

    Attributes:
        name: as in a topology.
        flops: bfloat16 operations a second.
        hbm_bytes: memory.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second between chips in one direction, over all links.
        slices: shapes of slices, from small to large.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    slices: Sequence[str]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9,
             ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9,
             ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9,
             ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    )
}  # fmt: skip


def topologies(name: str) -> list[str]:
    """`v5e:4x4` as it is; `v5e` as its slices, from small to large.

    Raises:
        ValueError: no such chip.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        raise ValueError(f"No TPU is called {chip!r} here; known: {', '.join(CHIPS)}.")
    return [name] if shape else [f"{chip}:{shape}" for shape in CHIPS[chip].slices]


def count(topology: str) -> int:
    """How many chips `v5e:4x4` has."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def share_libtpu() -> None:
    """Lets several processes of a machine load libtpu at once, in a process that only compiles.

    By default libtpu locks a file, since a chip serves one process. It reads these variables when
    it is loaded, which JAX does when it looks for devices.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server knows chips not here


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The chips of a slice, or of several alike, to compile for.

    Raises:
        ImportError: libtpu, which holds the compiler, is not installed.
        ValueError: libtpu knows no such slice, or not several of them.
    """
    from jax.experimental import topologies as known

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs their compiler, which runs on any machine: "
            "pip install 'mpt-jax[tpu]'."
        )
    share_libtpu()
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        found = known.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except Exception as error:
        times = f"{slices} times " if slices > 1 else ""
        raise ValueError(f"libtpu has no slice {times}{topology!r}: {error}") from error
    return list(found)

"""TPU chips: peak performance, memory and available slices."""

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
        name: name in a topology.
        flops: bfloat16 operations per second.
        hbm_bytes: size of HBM.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second to other chips in one direction, over all links.
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
    """Expands `v5e` to its slices, from small to large; `v5e:4x4` stays one slice.

    Raises:
        ValueError: the chip is unknown.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        raise ValueError(f"Unknown TPU {chip!r}. Choose one of {', '.join(CHIPS)}.")
    return [name] if shape else [f"{chip}:{shape}" for shape in CHIPS[chip].slices]


def count(topology: str) -> int:
    """Returns the number of chips of a slice, 16 for `v5e:4x4`."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def share_libtpu() -> None:
    """Lets several processes on a machine load libtpu at once. Only for processes that compile.

    By default libtpu locks a file, because a chip serves one process. It reads these variables when
    JAX loads it to look for devices.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server for absent chips


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Returns the chips to compile for, of one slice or of several equal ones.

    Raises:
        ImportError: libtpu, which contains the compiler, is not installed.
        ValueError: libtpu does not know the slice, or does not support several of it.
    """
    from jax.experimental import topologies as known

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs libtpu, which runs on any machine. Install it: "
            "pip install 'mpt-jax[tpu]'."
        )
    share_libtpu()
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        chips = known.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except Exception as error:
        what = f"{slices} slices {topology!r}" if slices > 1 else f"the slice {topology!r}"
        raise ValueError(
            f"libtpu cannot compile for {what}: {error}. Choose another --topology."
        ) from error
    return list(chips)

"""Peak performance, memory and available slices of TPU chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak performance of one chip, from Google Cloud's documentation of each TPU.

    Attributes:
        name: The chip's name in a topology, such as `v5e`.
        flops: The peak of bfloat16 operations per second.
        hbm_bytes: The size of HBM, in bytes.
        hbm_bandwidth: The bandwidth of HBM, in bytes per second.
        ici_bandwidth: The bandwidth of all links to other chips in one direction, in bytes per
            second.
        slices: The shapes of the slices, from small to large.
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
    """Returns the slices of a chip (`v5e`), from small to large, or a single slice (`v5e:4x4`).

    Raises:
        ValueError: the chip is unknown, or the shape does not have the form `4x4`.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        raise ValueError(
            f"Unknown TPU {chip!r}. Set --topology to one of {', '.join(CHIPS)}, or to a slice, "
            "such as v5e:4x4."
        )
    if shape and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise ValueError(
            f"--topology={name} has the invalid shape {shape!r}. Write the number of chips along "
            f"each axis, such as {', '.join(CHIPS[chip].slices)}."
        )
    return [name] if shape else [f"{chip}:{shape}" for shape in CHIPS[chip].slices]


def count(topology: str) -> int:
    """Returns the number of chips of a slice: 16 for `v5e:4x4`."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def share_libtpu() -> None:
    """Allows several processes of a machine to load libtpu at once, for compiling only.

    By default, libtpu locks a file, because a chip serves only one process. Call this function,
    which sets environment variables, before JAX looks for devices and thus loads libtpu.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server for absent chips


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Returns the chips to compile for, in one slice or in several slices of the same shape.

    Raises:
        ImportError: libtpu, which contains the compiler, is not installed.
        ValueError: libtpu cannot compile for the slice, or for several such slices.
    """
    from jax.experimental import topologies as known

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs the package libtpu, which is not installed. Run "
            "`pip install 'mpt-jax[tpu]'`; no TPU is needed."
        )
    share_libtpu()
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        chips = known.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except Exception as error:
        what, change = f"the slice {topology!r}", "choose another --topology"
        if slices > 1:
            what = f"{slices} slices of {topology!r}"
            change += " or change PjitPartitioner.dcn_mesh_shape, which sets the number of slices"
        raise ValueError(
            f"libtpu cannot compile for {what}: {str(error).rstrip('.')}. If libtpu does not "
            f"support this topology, {change}."
        ) from error
    return list(chips)

"""Checksums of what a checkpoint holds, so that a flipped bit is an error and not another prompt.

Array stores check the structure of their files, not every byte of the values. A leaf's checksum is
a sum of integers, which is the same in any order: each device adds up its own part of a leaf that
is spread over a mesh, and another mesh finds the same number.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array
from mpt_jax.core.tree import flatten

SEAL = "sha256"


class Damaged(ValueError):
    """What was read is not what was saved."""


def of_leaves(tree: Any) -> dict[str, int]:
    """Path -> checksum of every array of a tree; all processes call it together.

    The checksum is sum of bits_i (2 i + 1) modulo 2^32, over the elements i in row-major order. Its
    odd weights find any change of one element, and all but one in 2^32 of other changes.
    """
    return {name: int(found) for name, found in _checksums(flatten(tree)).items()}


def check(found: dict[str, int], expected: dict[str, int]) -> None:
    """Compares a tree's checksums with those it was saved with; each process does so by itself.

    Raises:
        Damaged: names the leaves that differ.
    """
    if differing := [name for name in found if found[name] != expected.get(name)]:
        raise Damaged(f"The values of {', '.join(differing)} are not those that were saved")


@jax.jit
def _checksums(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: _checksum(jnp.asarray(leaf)) for name, leaf in leaves.items()}


def _checksum(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = leaf.view(f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = jnp.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """JSON values with a digest of them beside."""
    return {**record, SEAL: _digest(record)}


def check_seal(record: dict[str, Any]) -> None:
    """Compares JSON values with the digest beside them, where there is one.

    Raises:
        Damaged: they differ.
    """
    rest = {name: value for name, value in record.items() if name != SEAL}
    if record.get(SEAL) not in (None, _digest(rest)):
        raise Damaged("The record of the checkpoint is not the one that was saved")


def _digest(record: dict[str, Any]) -> str:
    # As a reader finds them: tuples are lists, and keys are text.
    values = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

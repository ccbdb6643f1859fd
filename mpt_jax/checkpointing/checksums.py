"""Checksums of a checkpoint's contents, so that a flipped bit raises an error.

Array stores check the structure of their files, but not every byte of the values. The checksum of a
leaf is a sum of integers, which does not depend on their order. So each device sums only its shard
of a leaf, and the result is the same on every mesh.
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
    """The data that were read differ from those that were saved."""


def of_leaves(tree: Any) -> dict[str, int]:
    """Returns {path: checksum} for every array of a tree; all processes must call it together.

    The checksum is the sum of bits_i (2 i + 1) modulo 2^32 over the elements i in row-major order.
    Its odd weights detect every change of a single element, and all but one in 2^32 other changes.
    """
    return {name: int(checksum) for name, checksum in _checksums(flatten(tree)).items()}


def check(found: dict[str, int], expected: dict[str, int]) -> None:
    """Compares the checksums of a tree with the saved ones, in this process only.

    Raises:
        Damaged: the checksums of some leaves differ; the message names these leaves.
    """
    if differing := [name for name in found if found[name] != expected.get(name)]:
        raise Damaged(f"The values of {', '.join(differing)} differ from those that were saved.")


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
    """Returns a record of JSON values with its digest added."""
    return {**record, SEAL: _digest(record)}


def check_seal(record: dict[str, Any]) -> None:
    """Compares a record with its digest, if it has one.

    Raises:
        Damaged: the record does not match its digest.
    """
    if not isinstance(record, dict):
        raise Damaged("The metadata of the checkpoint is not a JSON object.")
    rest = {name: value for name, value in record.items() if name != SEAL}
    if record.get(SEAL) not in (None, _digest(rest)):
        raise Damaged("The metadata of the checkpoint differs from the metadata that was saved.")


def _digest(record: dict[str, Any]) -> str:
    # As they will be read back: tuples become lists, and keys become strings.
    values = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

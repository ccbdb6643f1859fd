"""Checksums detect every flipped bit, and do not depend on how a leaf is sharded."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.checkpointing import checksums
from mpt_jax.checkpointing.checksums import Damaged

TREE = {
    "prompt": {"shared": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)},
    "half": np.random.default_rng(1).normal(size=(6,)).astype(jnp.bfloat16),
    "mask": np.array([True, False]),
    "step": np.int32(7),
}


def by_hand(leaf: np.ndarray) -> int:
    """The formula of the docstring, in Python integers."""
    words = np.frombuffer(np.ascontiguousarray(leaf).tobytes(), f"u{leaf.dtype.itemsize}")
    return sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**32


def test_checksums_of_leaves_match_documented_formula():
    assert checksums.of_leaves(TREE) == {
        "prompt/shared": by_hand(TREE["prompt"]["shared"]),
        "half": by_hand(TREE["half"]),
        "mask": by_hand(TREE["mask"]),
        "step": 7,
    }


def test_checksums_check_any_flipped_bit_error():
    leaf = TREE["prompt"]["shared"]
    saved = checksums.of_leaves({"x": leaf})
    for element in range(leaf.size):
        for bit in range(32):
            words = leaf.copy().view(np.uint32)
            words.flat[element] ^= np.uint32(1 << bit)
            with pytest.raises(Damaged, match="The values of x differ"):
                checksums.check(checksums.of_leaves({"x": words.view(np.float32)}), saved)
    checksums.check(checksums.of_leaves({"x": leaf}), saved)


@pytest.mark.devices(4)
def test_checksums_sharded_leaf_same_as_whole():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    leaf = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
    for spec in (PartitionSpec("data", "model"), PartitionSpec(None, None, ("data", "model"))):
        spread = jax.device_put(leaf, NamedSharding(mesh, spec))
        assert checksums.of_leaves({"x": spread}) == {"x": by_hand(leaf)}


def test_checksums_check_seal_changed_record_error():
    record = {"taken": (1, 2), "rate": 0.1 + 0.2, "by_step": {3: None}, "name": "ü"}
    saved = json.loads(json.dumps(checksums.sealed(record)))
    checksums.check_seal(saved)
    checksums.check_seal({"saved": "before there were seals"})
    for change in ({"taken": [1, 3]}, {"added": 1}, {"sha256": "0"}):
        with pytest.raises(Damaged, match="metadata of the checkpoint"):
            checksums.check_seal({**saved, **change})

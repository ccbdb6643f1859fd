"""Digest of all weights of a backbone, and its configuration. Artifacts and checkpoints record
both, and readers compare them.

The embedding does not identify a backbone: merging a LoRA or fine-tuning some layers leaves it
unchanged, but prompts of the original backbone do not work with the result.

All copies of a backbone have the same digest. Values are rounded to bfloat16, as in
`artifacts.embedding_digest`, so float32 and bfloat16 copies agree. Leaves are named as in the
unscanned tree, regardless of the form that was loaded. Biases that are all zeros, such as those
that BitFit adds, are ignored.

With another activation or another maximum distance of relative positions, the same weights compute
other outputs, so the architecture is recorded beside the digest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.clip.config import CLIPConfig, architecture
from mpt_jax.backbones.t5.hf_config import ARCHITECTURE
from mpt_jax.backbones.t5.scanned_params import layers_of_leaf
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten

FIELD = "backbone_sha256"
CONFIG_FIELD = "backbone_config"
# Whether every layer has a table depends on the form of the tree; the digest shows whether tables
# differ.
_CONFIG = tuple(name for name in ARCHITECTURE if name != "relative_bias_per_layer")
# Rows that are rounded at a time. Kernels from Hugging Face are transposed views, and few rows of
# them fit in the cache.
_ROWS = 64
_TABLE = re.compile(r"(encoder|decoder)/layers_\d+/(relpos_bias/.+)")


def backbone_config(config: Any) -> dict[str, Any]:
    """Returns, as JSON values, the fields of a backbone's configuration that its logits depend on.

    Args:
        config: the configuration of the backbone's module, such as a `T5Config`.
    """
    if isinstance(config, CLIPConfig):
        return architecture(config)
    values = {name: getattr(config, name) for name in _CONFIG if hasattr(config, name)}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def backbone_digest(params: Params) -> str:
    """Returns the sha256 of the names, shapes and bfloat16 values of all leaves of a backbone.

    Copies a few rows of a leaf at a time. Uses all cores.

    Args:
        params: the backbone's parameters, with or without stacked layers, as NumPy or JAX arrays.
    """
    leaves = list(_leaves(params))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(pool.map(_named_digest, leaves))
    lines = [f"{name} {digest}\n" for name, digest in sorted(_one_table_per_stack(digests).items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _leaves(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the leaves of the unscanned tree as views, without biases that are all zeros."""
    for name, leaf in flatten(params).items():
        for unstacked, part in layers_of_leaf(name, np.asarray(leaf)):
            if not unstacked.endswith("/bias") or part.any():
                yield unstacked, part


def _named_digest(item: tuple[str, np.ndarray]) -> tuple[str, str]:
    name, leaf = item
    hasher = hashlib.sha256(f"{leaf.shape} ".encode())
    leaf = np.atleast_1d(leaf)
    for start in range(0, len(leaf), _ROWS):
        rounded = leaf[start : start + _ROWS].astype(jnp.bfloat16, copy=False).view(np.uint16)
        hasher.update(np.ascontiguousarray(rounded).data)
    return name, hasher.hexdigest()


def _one_table_per_stack(digests: dict[str, str]) -> dict[str, str]:
    """Returns the digests with one relative position table per stack if its layers have equal
    tables, since a scanned tree does not show whether there was one or many."""
    tables: dict[str, set[str]] = {}
    for name, digest in digests.items():
        if match := _TABLE.fullmatch(name):
            tables.setdefault("/".join(match.groups()), set()).add(digest)
    equal = {name: found.pop() for name, found in tables.items() if len(found) == 1}
    rest = {
        name: digest
        for name, digest in digests.items()
        if not (match := _TABLE.fullmatch(name)) or "/".join(match.groups()) not in equal
    }
    return rest | equal

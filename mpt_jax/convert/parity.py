"""Checks of a conversion: bitwise comparison of every leaf, and logits on a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.t5 import T5Config, Transformer
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.tree import flatten, match_exactly

# Lengths of the rows in a batch of width 40. It has padding, and distances so large that T5 puts
# several into one bucket.
LENGTHS = (40, 23, 4)
TARGETS = 8
SEED = 0
_REPORT = "Convert again; if the result is the same, report it as a bug."


def identical(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> str:
    """Checks that two trees are equal bit for bit.

    Args:
        expected: the tree that was converted.
        found: the tree that was read back.
        what: the name of the second tree in errors.

    Returns:
        A summary such as `52 leaves, 2,801,152 numbers`.

    Raises:
        ValueError: leaves are missing, unexpected, or differ in shape, dtype or value; the message
            lists them.
    """
    wanted, actual = flatten(expected), flatten(found)
    match_exactly(
        {name: np.shape(x) for name, x in wanted.items()},
        {name: np.shape(x) for name, x in actual.items()},
        what,
        standard="the source",
        advice=_REPORT,
    )
    differing = [name for name, x in wanted.items() if _bits(x) != _bits(actual[name])]
    if differing:
        raise ValueError(
            f"{what} does not match the source: {len(differing)} of {len(wanted)} leaves differ: "
            f"{abbreviate(differing)}. {_REPORT}"
        )
    return f"{len(wanted)} leaves, {sum(np.size(x) for x in wanted.values()):,} numbers"


def _bits(x: Any) -> tuple[str, bytes]:
    return str(np.asarray(x).dtype), np.asarray(x).tobytes()


def fixed_batch(config: T5Config) -> dict[str, np.ndarray]:
    """Returns a padded batch that depends only on the vocabulary's size.

    The batch has `tokens` int32 [3, 40], `mask` bool [3, 40] (False at padding) and `targets` int32
    [3, 8].
    """
    rng = np.random.default_rng(SEED)
    first = min(2, config.vocab_size - 1)  # after padding and the end of sequence
    mask = np.arange(max(LENGTHS))[None] < np.asarray(LENGTHS)[:, None]
    tokens = rng.integers(first, config.vocab_size, mask.shape, np.int32)
    targets = rng.integers(first, config.vocab_size, (len(LENGTHS), TARGETS), np.int32)
    return {"tokens": tokens * mask, "mask": mask, "targets": targets}


def forward(config: T5Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Runs our network on the fixed batch, in float32 regardless of the parameters' dtype. The
    decoder reads the targets shifted by one position, after the start token 0.

    Returns:
        `encoder` and `decoder`, hidden states [layers + 1, 3, positions, H] indexed as in
        `Transformer.encode`, and `logits` [3, 8, V].
    """
    model = Transformer(config)
    hidden: dict[str, Any] = {"return_hidden": True}

    @jax.jit
    def run(params: Any, tokens: Any, mask: Any, targets: Any) -> dict[str, jax.Array]:
        # Cast inside jit, so that a half-precision model is not held twice.
        variables = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params)}
        encoded, encoder = _pair(model.apply(variables, tokens, mask, method="encode", **hidden))
        decoder_tokens = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
        decode = (variables, encoded, mask, decoder_tokens)
        logits, decoder = _pair(model.apply(*decode, method="decode", **hidden))
        return {"encoder": jnp.stack(encoder), "decoder": jnp.stack(decoder), "logits": logits}

    batch = fixed_batch(config)
    with jax.default_matmul_precision("highest"):
        outputs = run(params, **batch)
    return {name: np.asarray(outputs[name]) for name in ("encoder", "decoder", "logits")}


def _pair(output: Any) -> tuple[Any, Any]:
    """Returns `output` unchanged, but typed as the pair (output, hidden states) that the network
    returns if `return_hidden` is set."""
    return output


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest absolute difference between two arrays; NaN if either contains NaN."""
    return float(np.max(np.abs(first - second), initial=0.0))

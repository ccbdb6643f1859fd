"""Initial values for pretraining the tiny T5: T5's random values, except for attention heads.

    python -m mpt_jax.tasks.toy_init    writes ROOT/toy_init/checkpoint_0 (ROOT: runtime/paths.py)

Every task of the suite needs attention that finds a word of one sentence in the other sentence.
Large models learn this in a late phase change. On two cores, a network of this size does not learn
it within an hour (data/tiny_t5/log.md has the numbers). So pretraining starts with such heads:

* In half of the encoder's heads, queries and keys are the same projection, so that equal content
  attends to equal content. The relative bias keeps a position from attending to itself.
* The other half prefers certain distances more strongly than T5's initial biases do.
* In half of the decoder's cross-attention heads, queries and keys are the same projection.

The parameter tree and the network are those of T5X; only these initial values differ.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.convert.t5x import save_t5x
from mpt_jax.runtime import paths
from mpt_jax.tasks.toy_vocabulary import EMBEDDING_ROWS

# The same values as in gin/tiny.gin; a test compares them.
TINY_T5 = T5Config(
    vocab_size=EMBEDDING_ROWS,
    emb_dim=128,
    num_heads=8,
    head_dim=16,
    mlp_dim=256,
    num_encoder_layers=3,
    num_decoder_layers=2,
    logits_via_embedding=True,
)
# Equal content scores about MATCH_SCALE * sqrt(D) = 6, unequal content 1.5 in standard deviation.
MATCH_SCALE = 1.5
SELF_BIAS = -8.0
DISTANCE_SCALE = 5.0


def initial_params(config: T5Config = TINY_T5, seed: int = 0) -> dict[str, Any]:
    """Returns T5's random parameters, changed to have matching heads and distance heads."""
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = Transformer(config).init(jax.random.key(seed), tokens, tokens > 0, tokens)
    params = jax.tree.map(np.array, variables["params"])
    half = config.num_heads // 2
    encoder, decoder = params["encoder"], params["decoder"]
    for stack in (encoder, decoder):
        stack["relpos_bias"]["rel_embedding"] *= DISTANCE_SCALE
    biases = encoder["relpos_bias"]["rel_embedding"]
    biases[:half] = 0.0
    biases[:half, 0] = SELF_BIAS  # bucket 0 is distance 0
    attentions = [encoder[f"layers_{i}"]["attention"] for i in range(config.num_encoder_layers)] + [
        decoder[f"layers_{i}"]["encoder_decoder_attention"]
        for i in range(config.num_decoder_layers)
    ]
    columns = half * config.head_dim
    for attention in attentions:
        matching = attention["key"]["kernel"][:, :columns] * (MATCH_SCALE / config.head_dim**0.5)
        attention["query"]["kernel"][:, :columns] = matching
    return params


if __name__ == "__main__":
    print(f"Wrote {save_t5x(paths.under(base=paths.root(), name='toy_init'), initial_params())}")

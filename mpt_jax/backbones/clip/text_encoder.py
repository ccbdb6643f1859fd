"""Text tower: token or prompt embeddings in, features of the end-of-text position out."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes

from mpt_jax.backbones.clip import layers
from mpt_jax.backbones.clip.config import CLIPConfig, TextTowerConfig
from mpt_jax.backbones.t5.layers import constrain
from mpt_jax.core.shapes import Array, Float, Int

_TOKEN_STD, _POSITION_STD = 0.02, 0.01


class Embed(nn.Module):
    """Token embedding table."""

    config: CLIPConfig
    tower: TextTowerConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "C T"]) -> Float[Array, "C T H"]:
        shape = (self.tower.vocab_size, self.tower.emb_dim)
        init = nn.initializers.normal(_TOKEN_STD)
        table = param_with_axes("embedding", init, shape, jnp.float32, axes=("vocab", "embed"))
        x = jnp.take(jnp.asarray(table), tokens, axis=0).astype(self.config.dtype)
        return constrain(x, "batch", "length", "embed")


class TextEncoder(nn.Module):
    """The text tower."""

    config: CLIPConfig
    tower: TextTowerConfig

    def setup(self) -> None:
        self.token_embedder = Embed(self.config, self.tower)

    def embed(self, tokens: Int[Array, "C T"]) -> Float[Array, "C T H"]:
        """Returns the embeddings of tokens, without positions."""
        return self.token_embedder(tokens)

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "C T H"], eot: Int[Array, "C"], collect: bool
    ) -> tuple[Float[Array, "C U"], layers.Hidden]:
        cfg, tower, length = self.config, self.tower, embeddings.shape[1]
        if length > tower.context_length:
            raise ValueError(
                f"The texts have {length} positions, but the text tower has "
                f"{tower.context_length}. Shorten the texts or the prompt."
            )
        shape, axes = (tower.context_length, tower.emb_dim), ("abspos_buckets", "embed")
        positions = layers.Table(shape, axes, _POSITION_STD, name="position_embedding")()
        x = embeddings.astype(cfg.dtype) + positions[:length].astype(cfg.dtype)[None]
        x = constrain(x, "batch", "length", "embed")
        # Padding follows the end of the text, so the causal mask also hides it.
        index = jnp.arange(length)
        mask = (index[None, :] <= index[:, None])[None, None]
        x, hidden = layers.run_layers(
            cfg, tower, "text_encoder", self.is_initializing(), collect, x, None, mask
        )
        last = jnp.take_along_axis(x, eot[:, None, None], axis=1)[:, 0]
        norm = layers.LayerNorm(cfg.layer_norm_epsilon, jnp.float32, name="output_norm")
        return layers.Projection(cfg, name="projection")(norm(last)), hidden

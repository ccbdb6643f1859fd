"""CLIP: images and texts in, features of both in one space out.

The network does not know prompt methods. For texts, a caller embeds the tokens with `embed_tokens`,
inserts the prompt rows, and passes the embeddings and the end-of-text positions to `encode_text`.
For images, it passes the composed prompts to `encode_image`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes

from mpt_jax.backbones.clip.config import CHANNELS, CLIPConfig
from mpt_jax.backbones.clip.image_encoder import ImageEncoder, Images, Prompts
from mpt_jax.backbones.clip.layers import Hidden
from mpt_jax.backbones.clip.text_encoder import TextEncoder
from mpt_jax.core.shapes import Array, Float, Int
from mpt_jax.core.tree import flatten

_TEMPERATURE = 0.07  # at the start of training from scratch


class CLIP(nn.Module):
    """CLIP, or a plain ViT if the configuration has no text tower. The collection `params_axes` has
    the logical axes of the parameters.

    The parameter `logit_scale` [] is the logarithm of the factor of cosine similarities.
    """

    config: CLIPConfig

    def setup(self) -> None:
        self.image_encoder = ImageEncoder(self.config)
        if self.config.text is not None:
            self.text_encoder = TextEncoder(self.config, self.config.text)
            init = nn.initializers.constant(math.log(1 / _TEMPERATURE))
            self.logit_scale = param_with_axes("logit_scale", init, (), jnp.float32, axes=())

    def embed_tokens(self, tokens: Int[Array, "C T"]) -> Float[Array, "C T H"]:
        """Returns the embeddings of tokens, without positions."""
        return self._text_encoder().embed(tokens)

    def encode_text(
        self,
        embeddings: Float[Array, "C T H"],
        eot: Int[Array, "C"],
        return_hidden: bool = False,
    ) -> Float[Array, "C U"] | tuple[Float[Array, "C U"], Hidden]:
        """Runs the text tower over embeddings that the caller computed.

        Args:
            embeddings: the embeddings of tokens and prompts, without positions. T is at most
                `context_length`.
            eot: the position of the end-of-text token of each text. The feature of a text is that
                of this position; later positions do not change it.
            return_hidden: whether to also return the hidden states: the input of the first layer
                and the output of every layer, each [C,T,H].

        Returns:
            The features in float32, not normalized, or `(features, hidden states)`. Features are
            NaN if `eot` is outside the text.

        Raises:
            ValueError: the texts have more positions than the tower, or there is no text tower.
        """
        features, hidden = self._text_encoder()(embeddings, eot, return_hidden)
        return (features, hidden) if return_hidden else features

    def encode_image(
        self, images: Images, prompts: Prompts | None = None, return_hidden: bool = False
    ) -> Float[Array, "B U"] | tuple[Float[Array, "B U"], Hidden]:
        """Runs the image tower over images, with visual prompts if they are given.

        Prompts are inserted between the class token and the patches. They get neither positions nor
        the input norm. If there are prompts for Y layers, those of a layer overwrite the outputs of
        the layer before at their positions. If there is one, it passes through all layers.

        Args:
            images: bytes [B,S,S,3], which are normalized, or normalized floating point values. S is
                the configuration's `image_size`.
            prompts: None, or prompts [B,n,P,H] or [n,P,H] for all images, where n is 1 or Y.
            return_hidden: whether to also return the hidden states: the input of the first layer
                and the output of every layer, each [B,P+I,H].

        Returns:
            The features in float32, not normalized, or `(features, hidden states)`. Without a
            projection, they are the class token [B,H] after the output norm.

        Raises:
            ValueError: the images have another size, or the prompts have another shape.
        """
        features, hidden = self.image_encoder(images, prompts, return_hidden)
        return (features, hidden) if return_hidden else features

    def __call__(
        self, images: Images, tokens: Int[Array, "C T"] | None, eot: Int[Array, "C"] | None
    ) -> tuple[Float[Array, "B U"], Float[Array, "C U"] | None]:
        """Returns the features of images and of texts, as for initialization; see `encode_image`
        and `encode_text`. Without a text tower, `tokens` and `eot` are None."""
        features: Any = self.encode_image(images)
        if tokens is None or eot is None:
            return features, None
        texts: Any = self.encode_text(self.embed_tokens(tokens), eot)
        return features, texts

    def _text_encoder(self) -> TextEncoder:
        if self.config.text is None:
            raise ValueError(
                "The model has no text tower, so it cannot encode texts. Use a CLIP model."
            )
        return self.text_encoder


def parameter_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path name, without creating arrays."""
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=64)  # tracing takes a second or more
def _parameter_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    variables = abstract_variables(config)
    return {name: leaf.shape for name, leaf in flatten(variables["params"]).items()}


def abstract_variables(config: CLIPConfig) -> Any:
    """Returns the result of `CLIP.init` without its values: parameters and their logical axes."""
    size = config.image.image_size
    images = jax.ShapeDtypeStruct((1, size, size, CHANNELS), jnp.uint8)
    tokens = eot = None
    if config.text is not None:
        tokens, eot = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 1), (1,)))
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens, eot)

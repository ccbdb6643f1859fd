"""Image tower: pixels and visual prompts in, features of the class token out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes

from mpt_jax.backbones.clip import layers
from mpt_jax.backbones.clip.config import CHANNELS, CLIPConfig
from mpt_jax.backbones.t5.layers import constrain
from mpt_jax.backbones.t5.low_memory_ops import over_rows
from mpt_jax.core.shapes import Array, Float, UInt8

Images = UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"]
Prompts = Float[Array, "some n P H"] | Float[Array, "n P H"]


def normalize(images: Images, config: CLIPConfig) -> Float[Array, "B height width 3"]:
    """Returns images in float32. Bytes are divided by 255 and normalized with the mean and standard
    deviation of the configuration; floating point images are returned unchanged."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    mean = over_rows(jnp.asarray(config.image_mean, jnp.float32), images)
    std = over_rows(jnp.asarray(config.image_std, jnp.float32), images)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def split_patches(
    images: Float[Array, "B height width 3"], size: int
) -> Float[Array, "B patches values"]:
    """Returns the values of each patch by row, column and channel; patches are in reading order."""
    batch, across = images.shape[0], images.shape[1] // size
    x = images.reshape(batch, across, size, across, size, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, across * across, size * size * CHANNELS)


class ImageEncoder(nn.Module):
    """The image tower."""

    config: CLIPConfig

    @nn.compact
    def __call__(
        self, images: Images, prompts: Prompts | None, collect: bool
    ) -> tuple[Float[Array, "B U"], layers.Hidden]:
        cfg, tower = self.config, self.config.image
        _check_images(images, cfg)
        x = self._tokens(normalize(images, cfg))
        deep = None
        if prompts is not None:
            by_layer = _by_layer(prompts, images, cfg)
            x = layers.insert(x[:, :1], by_layer[0], x[:, 1:])
            # The first layer overwrites its prompt with an equal one, so that all layers are alike.
            deep = by_layer if prompts.shape[-3] > 1 else None
        x = constrain(x, "batch", "length", "embed")
        mask = jnp.ones((1, 1, 1, x.shape[1]), jnp.bool_)
        x, hidden = layers.run_layers(
            cfg, tower, "image_encoder", self.is_initializing(), collect, x, deep, mask
        )
        norm = layers.LayerNorm(cfg.layer_norm_epsilon, jnp.float32, name="output_norm")
        features = norm(x[:, 0])
        if cfg.joint_dim is not None:
            features = layers.Projection(cfg, name="projection")(features)
        return features, hidden

    def _tokens(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B I H"]:
        """Returns the class token and the patches, with positions and the input norm."""
        cfg, tower = self.config, self.config.image
        std = tower.emb_dim**-0.5
        # torch's default for a convolution: uniform within fan_in^-0.5.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        embed = layers.Dense(
            tower.emb_dim,
            ("patch", "embed"),
            cfg.dtype,
            init,
            cfg.patch_bias,
            name="patch_embedding",
        )
        patches = embed(split_patches(images, tower.patch_size))
        first = param_with_axes(
            "class_embedding",
            nn.initializers.normal(std),
            (tower.emb_dim,),
            jnp.float32,
            axes=("embed",),
        )
        first = over_rows(jnp.asarray(first, cfg.dtype), patches)
        x = jnp.concatenate(
            [jnp.broadcast_to(first, (images.shape[0], 1, tower.emb_dim)), patches], 1
        )
        shape, axes = (tower.num_tokens, tower.emb_dim), ("abspos_buckets", "embed")
        positions = layers.Table(shape, axes, std, name="position_embedding")()
        x = x + positions.astype(cfg.dtype)[None]
        if cfg.input_norm:
            x = layers.LayerNorm(cfg.layer_norm_epsilon, cfg.dtype, name="input_norm")(x)
        return x


def _check_images(images: jax.Array, config: CLIPConfig) -> None:
    size = config.image.image_size
    if images.shape[1:] != (size, size, CHANNELS):
        raise ValueError(
            f"The images have the shape {' x '.join(map(str, images.shape[1:]))}, but the image "
            f"tower needs {size} x {size} x {CHANNELS}. Resize and crop the images to {size} "
            "pixels, and convert them to RGB."
        )


def _by_layer(prompts: jax.Array, images: Images, config: CLIPConfig) -> Float[Array, "n some P H"]:
    """Returns prompts by layer, checked against the tower and the images."""
    tower, batch = config.image, images.shape[0]
    count, width = prompts.shape[-3], prompts.shape[-1]
    counts = sorted({1, tower.num_layers})
    if count not in counts or width != tower.emb_dim:
        raise ValueError(
            f"The visual prompts have {count} layers and width {width}, but the image tower has "
            f"{tower.num_layers} layers and width {tower.emb_dim}. Give prompts for "
            f"{' or '.join(map(str, counts))} layers in that width."
        )
    if prompts.ndim == 3:
        return prompts[:, None]
    if prompts.shape[0] not in (1, batch):
        raise ValueError(
            f"There are visual prompts for {prompts.shape[0]} images, but the batch has {batch} "
            "images. Give one prompt for each image, or one for all."
        )
    return prompts.swapaxes(0, 1)

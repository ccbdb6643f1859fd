"""CLIP hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
REMAT_POLICIES = ("none", "minimal", "full")
# Mean and standard deviation of the channels, in [0, 1], that CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CHANNELS = 3
# The number of values in a product of three sizes fits in int64, as does that of the scores.
MOST = 2**20
MOST_LAYERS = 1024


class Resizing(NamedTuple):
    """How the publisher of a model resizes images, in the terms of `ImageTransform`.

    Attributes:
        mode: `crop` or `squash`.
        resize_to: the length of the shorter edge before the crop; None for the image size.
        filter: `bicubic` or `bilinear`.
    """

    mode: str = "crop"
    resize_to: int | None = None
    filter: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of a transformer tower.

    Attributes:
        num_layers: the number of layers (Y for an image tower).
        emb_dim: the width H.
        num_heads: the number of attention heads N, which must divide H.
        mlp_dim: the feed-forward width F.

    Raises:
        ValueError: a size is not an integer in its range, or the heads do not divide the width.
    """

    num_layers: int
    emb_dim: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            most = MOST_LAYERS if field.name == "num_layers" else MOST
            if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= most:
                raise ValueError(
                    f"{type(self).__name__}.{field.name} must be an integer from 1 to {most:,}, "
                    f"got {size!r:.80}. Correct the configuration of the model."
                )
        if self.emb_dim % self.num_heads:
            raise ValueError(
                f"{type(self).__name__}.num_heads={self.num_heads} does not divide "
                f"emb_dim={self.emb_dim}. Correct the configuration of the model."
            )

    @property
    def head_dim(self) -> int:
        """The width D of one head."""
        return self.emb_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig(TowerConfig):
    """Sizes of an image tower.

    Attributes:
        patch_size: the height and width of a patch in pixels, which must divide `image_size`.
        image_size: the height and width of an image in pixels.

    Raises:
        ValueError: as in `TowerConfig`, or the patches do not fill the image.
    """

    patch_size: int
    image_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size or self.num_tokens > MOST:
            raise ValueError(
                f"Images of {self.image_size} pixels cannot be divided into at most {MOST:,} "
                f"patches of {self.patch_size} pixels. Correct image_size or patch_size in the "
                "configuration of the model."
            )

    @property
    def num_tokens(self) -> int:
        """The number of image tokens I: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    """Sizes of a text tower.

    Attributes:
        vocab_size: the number of rows V of the token embedding.
        context_length: the largest number of positions T.
    """

    vocab_size: int
    context_length: int


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Hyperparameters of CLIP, or of a plain vision transformer (ViT).

    Attributes:
        image: the sizes of the image tower.
        text: the sizes of the text tower. None omits it and the logit scale.
        joint_dim: the width U that both towers are projected to. None omits the projection, which
            only a model without a text tower supports.
        activation: the feed-forward activation: `quick_gelu` (x sigmoid(1.702 x), all weights of
            OpenAI), `gelu` (exact) or `gelu_tanh`. Weights do not show which one they need.
        layer_norm_epsilon: the value added to the variance in layer norms.
        patch_bias: whether the patch embedding has a bias (ViT).
        input_norm: whether the image tower has a layer norm before the first layer (CLIP).
        image_mean, image_std: the mean and standard deviation of each channel, for values in
            [0, 1], with which images are normalized.
        eos_id: the id that transformers and open_clip search for to find the end of a text; None if
            it is the largest id of the text. Only read and written, since the network is given the
            positions. Not compared.
        resizing: the publisher's. Only read and written, since jobs have their own transform. Not
            compared.
        dtype: the dtype of activations, `float32` or `bfloat16`, given as a dtype or its name.
            Softmax, layer-norm statistics and the returned features are always float32.
        remat: what the backward pass recomputes: `none`, `minimal` (everything except products with
            weights) or `full` (whole layers).
        scan_layers: whether to run the layers of a tower as one loop over stacked weights (see
            `backbones/t5/scanned_params.py`), so that compile time does not grow with depth.

    Raises:
        ValueError: a value is not supported, or a text tower has no joint width.
    """

    image: ImageTowerConfig
    text: TextTowerConfig | None
    joint_dim: int | None
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    patch_bias: bool = False
    input_norm: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    eos_id: int | None = dataclasses.field(default=None, compare=False)
    resizing: Resizing = dataclasses.field(default=Resizing(), compare=False)
    dtype: Any = "float32"
    remat: str = "none"
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if self.joint_dim is None and self.text is not None:
            raise ValueError(
                "CLIPConfig.joint_dim is None, but a text tower needs a width that both towers "
                "are projected to. Set joint_dim, or set text to None for a plain ViT."
            )
        dim = self.joint_dim
        if dim is not None and (isinstance(dim, bool) or not 0 < dim <= MOST):
            raise ValueError(
                f"CLIPConfig.joint_dim must be an integer from 1 to {MOST:,}, got {dim!r:.80}. "
                "Correct the configuration of the model."
            )
        dtype = jnp.dtype(self.dtype)
        if dtype not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
            raise ValueError(
                f"CLIPConfig.dtype={self.dtype!r} is not supported. Use 'float32' or 'bfloat16'."
            )
        object.__setattr__(self, "dtype", dtype)
        for name, values in (("activation", ACTIVATIONS), ("remat", REMAT_POLICIES)):
            if (value := getattr(self, name)) not in values:
                raise ValueError(
                    f"CLIPConfig.{name} must be {', '.join(map(repr, values[:-1]))} or "
                    f"{values[-1]!r}, got {value!r:.80}."
                )
        if not 0.0 < self.layer_norm_epsilon < 1.0:
            raise ValueError(
                "CLIPConfig.layer_norm_epsilon must be between 0 and 1, got "
                f"{self.layer_norm_epsilon}. Correct the configuration of the model."
            )
        self._check_normalization()

    def _check_normalization(self) -> None:
        for name in ("image_mean", "image_std"):
            values = tuple(map(float, getattr(self, name)))
            finite = len(values) == CHANNELS and all(map(math.isfinite, values))
            if not finite or (name == "image_std" and min(values) <= 0):
                raise ValueError(
                    f"CLIPConfig.{name} must have {CHANNELS} finite values"
                    f"{', all above 0' if name == 'image_std' else ''}, got {values!r:.80}. "
                    "Correct the configuration of the model."
                )
            object.__setattr__(self, name, values)


def image_size(config: CLIPConfig) -> int:
    """Returns S, the height and width of an image in pixels, for use in gin files."""
    return config.image.image_size


def num_image_layers(config: CLIPConfig) -> int:
    """Returns Y, the number of layers of the image tower, for use in gin files."""
    return config.image.num_layers


def image_prompt_scale(config: CLIPConfig) -> float:
    """Returns the bound of VPT's uniform initial values, `sqrt(6 / (3 p^2 + H))`, for patches of p
    pixels (arXiv 2203.12119)."""
    return math.sqrt(6 / (CHANNELS * config.image.patch_size**2 + config.image.emb_dim))


def architecture(config: CLIPConfig) -> dict[str, Any]:
    """Returns, as JSON values, the fields that the features of a model depend on, by dotted name.

    The fields of a tower that the model lacks are not included.
    """
    values = dataclasses.asdict(config)
    for name in ("eos_id", "resizing", "dtype", "remat", "scan_layers"):
        del values[name]
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{field}": size for field, size in value.items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat

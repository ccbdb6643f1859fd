"""Schema of open_clip's `open_clip_config.json`.

open_clip's models vary in many ways. A field that is not in the schema is an error, because it
might change what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from mpt_jax.backbones.clip.config import (
    MOST,
    CLIPConfig,
    ImageTowerConfig,
    Resizing,
    TextTowerConfig,
)
from mpt_jax.backbones.clip.hf_config import Channels, Deviations, Epsilon, Layers, Size
from mpt_jax.core import schema
from mpt_jax.runtime.files import read_json

CONFIG = "open_clip_config.json"
_ADVICE = "Use an open_clip model that is a plain ViT CLIP."
_HEAD_DIM = 64  # open_clip's default for image towers

Ratio = Annotated[float, msgspec.Meta(gt=0, le=64)]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class _NormArguments(_Strict):
    eps: Epsilon = 1e-5


class _ActivationArguments(_Strict):
    approximate: Literal["none", "tanh"] = "none"


class _Tower(_Strict, kw_only=True, forbid_unknown_fields=True):
    """The fields that both towers have."""

    width: Size
    layers: Layers
    mlp_ratio: Ratio = 4.0
    ls_init_value: None = None
    norm_kwargs: _NormArguments | None = None
    act_kwargs: _ActivationArguments | None = None
    output_tokens: Literal[False] = False


class _Image(_Tower, kw_only=True, forbid_unknown_fields=True):
    image_size: Size
    patch_size: Size
    head_width: Size = _HEAD_DIM
    patch_dropout: float = 0.0  # of training
    attentional_pool: Literal[False] = False
    no_ln_pre: Literal[False] = False
    pool_type: Literal["tok"] = "tok"
    pos_embed_type: Literal["learnable"] = "learnable"
    final_ln_after_pool: bool = False  # the same for the class token


class _Text(_Tower, kw_only=True, forbid_unknown_fields=True):
    context_length: Size
    vocab_size: Size
    heads: Size
    no_causal_mask: Literal[False] = False
    embed_cls: Literal[False] = False
    # The end of the text, whose position we are given: its largest id, or `eos_id`.
    pool_type: Literal["argmax", "eos"] = "argmax"
    eos_id: Annotated[int, msgspec.Meta(ge=0, le=MOST)] | None = 2
    proj_type: Literal["linear"] = "linear"
    proj_bias: Literal[False] = False
    final_ln_after_pool: bool = False
    # Of the tokenizer.
    pad_id: int = 0
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class _Model(_Strict):
    embed_dim: Size
    vision_cfg: _Image
    text_cfg: _Text
    quick_gelu: bool = False
    custom_text: bool = False  # names the parameters in another way
    # Initial values, and the dtype to compute in.
    init_logit_scale: float | None = None
    init_logit_bias: None = None
    cast_dtype: str | None = None


class _Preprocess(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    size: Size | Annotated[list[Size], msgspec.Meta(min_length=2, max_length=2)] | None = None
    mode: Literal["RGB"] = "RGB"
    mean: Channels | None = None
    std: Deviations | None = None
    interpolation: Literal["bicubic"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    fill_color: int = 0  # of a resize_mode that pads


class _File(_Strict):
    model_cfg: _Model
    preprocess_cfg: _Preprocess = _Preprocess()


def architecture(fields: Mapping[str, Any], what: str = CONFIG) -> dict[str, Any]:
    """Returns the arguments of `CLIPConfig` that an `open_clip_config.json` describes.

    Args:
        fields: the content of the file.
        what: its name in errors.

    Raises:
        ValueError: a field is unknown, out of range, or has a value that is not supported; or the
            towers differ in a value that they must share.
    """
    file = schema.check(fields, _File, what, _ADVICE)
    model = file.model_cfg
    image, text = model.vision_cfg, model.text_cfg
    shared = {"image": _activation_and_epsilon(image), "text": _activation_and_epsilon(text)}
    if shared["image"] != shared["text"]:
        raise ValueError(
            f"{what} has other norm_kwargs or act_kwargs in vision_cfg than in text_cfg, but both "
            f"towers must have the same. {_ADVICE}"
        )
    activation, epsilon = shared["image"]
    preprocess = file.preprocess_cfg
    if preprocess.size not in (None, image.image_size, [image.image_size] * 2):
        raise ValueError(
            f"{what} has images of size {preprocess.size}, but the model has positions for "
            f"{image.image_size} x {image.image_size}. Use the files of one model."
        )
    pixels = {"image_mean": preprocess.mean, "image_std": preprocess.std}
    return {
        "image": ImageTowerConfig(
            num_layers=image.layers,
            emb_dim=image.width,
            num_heads=image.width // image.head_width,
            mlp_dim=int(image.width * image.mlp_ratio),
            patch_size=image.patch_size,
            image_size=image.image_size,
        ),
        "text": TextTowerConfig(
            num_layers=text.layers,
            emb_dim=text.width,
            num_heads=text.heads,
            mlp_dim=int(text.width * text.mlp_ratio),
            vocab_size=text.vocab_size,
            context_length=text.context_length,
        ),
        "joint_dim": model.embed_dim,
        # Without quick_gelu, open_clip uses torch's GELU.
        "activation": "quick_gelu" if model.quick_gelu else activation,
        "layer_norm_epsilon": epsilon,
        "eos_id": text.eos_id if text.pool_type == "eos" else None,
        "resizing": Resizing("squash" if preprocess.resize_mode == "squash" else "crop"),
        **{name: tuple(value) for name, value in pixels.items() if value is not None},
    }


def _activation_and_epsilon(tower: _Tower) -> tuple[str, float]:
    arguments = tower.act_kwargs or _ActivationArguments()
    activation = "gelu_tanh" if arguments.approximate == "tanh" else "gelu"
    return activation, (tower.norm_kwargs or _NormArguments()).eps


def fields_of(config: CLIPConfig) -> dict[str, Any]:
    """Returns the content of an `open_clip_config.json`; the inverse of `architecture`.

    Args:
        config: the configuration of a CLIP with two towers.

    Raises:
        ValueError: the images of the model are resized in a way that open_clip does not support.
    """
    image, text = config.image, config.text
    assert text is not None, "the writer checks that there are two towers"
    if config.resizing.resize_to is not None:
        raise ValueError(
            f"The model's images are resized to a shorter edge of {config.resizing.resize_to} "
            f"pixels before the crop of {image.image_size} x {image.image_size}, which a file of "
            "open_clip cannot describe. Keep the model in Hugging Face's format."
        )
    shared: dict[str, Any] = {}
    if config.layer_norm_epsilon != _NormArguments().eps:
        shared["norm_kwargs"] = {"eps": config.layer_norm_epsilon}
    if config.activation == "gelu_tanh":
        shared["act_kwargs"] = {"approximate": "tanh"}
    pooling: dict[str, Any] = {}
    # The last id of the vocabulary is the largest of a text, and early versions of open_clip search
    # for that only.
    if config.eos_id not in (None, text.vocab_size - 1):
        pooling = {"pool_type": "eos", "eos_id": config.eos_id}
    return {
        "model_cfg": {
            "embed_dim": config.joint_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "layers": image.num_layers,
                "width": image.emb_dim,
                "head_width": image.head_dim,
                "mlp_ratio": image.mlp_dim / image.emb_dim,
                **shared,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "layers": text.num_layers,
                "width": text.emb_dim,
                "heads": text.num_heads,
                "mlp_ratio": text.mlp_dim / text.emb_dim,
                **pooling,
                **shared,
            },
        },
        "preprocess_cfg": {
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "interpolation": config.resizing.filter,
            "resize_mode": "squash" if config.resizing.mode == "squash" else "shortest",
        },
    }


def read_architecture(folder: epath.Path) -> dict[str, Any]:
    """Reads the `open_clip_config.json` of a folder.

    Returns:
        The arguments of `CLIPConfig`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or as in `architecture`.
    """
    return architecture(read_json(folder / CONFIG), str(folder / CONFIG))

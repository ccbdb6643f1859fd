"""Schema of the `config.json` and `preprocessor_config.json` of a Hugging Face CLIP or ViT.

Fields that change neither features nor the pixels of images are ignored. `eos_token_id` is kept for
transformers only: the end of a text is data, not part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from mpt_jax.backbones.clip.config import (
    CHANNELS,
    MOST,
    MOST_LAYERS,
    CLIPConfig,
    ImageTowerConfig,
    Resizing,
    TextTowerConfig,
    TowerConfig,
)
from mpt_jax.core import schema
from mpt_jax.runtime.files import read_json

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CLIP_TYPE, VIT_TYPE = "clip", "vit"
# hidden_act -> our activation.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ADVICE = "Use a folder that CLIPModel.save_pretrained or ViTModel.save_pretrained wrote."
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_BICUBIC = 3
_LARGEST_ID = 2  # an eos_token_id with which transformers finds the end of a text by its largest id
_ONE_TOWER = {"clip_vision_model": "image", "clip_text_model": "text"}
# Including those that are an error, so that the error is about a CLIP.
MODEL_TYPES = (CLIP_TYPE, VIT_TYPE, *_ONE_TOWER)

Size = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Channels = Annotated[
    list[Annotated[float, msgspec.Meta(gt=-1e6, lt=1e6)]],
    msgspec.Meta(min_length=CHANNELS, max_length=CHANNELS),
]
Deviations = Annotated[
    list[Annotated[float, msgspec.Meta(gt=0, lt=1e6)]],
    msgspec.Meta(min_length=CHANNELS, max_length=CHANNELS),
]


class _Text(msgspec.Struct, kw_only=True):
    """The fields of a text tower, with transformers' defaults, since files may leave those out."""

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: Annotated[int, msgspec.Meta(ge=0, le=MOST)] | None = 49407


class _Image(msgspec.Struct, kw_only=True):
    """The fields of an image tower, with the defaults of transformers' CLIP."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    num_channels: Literal[3] = 3
    image_size: Size = 224
    patch_size: Size = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5


class _Vit(_Image, kw_only=True):
    """The fields of a ViT, with the defaults of transformers' ViT."""

    patch_size: Size = 16
    hidden_act: str = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    qkv_bias: Literal[True] = True
    quantization_config: None = None


class _Clip(msgspec.Struct, kw_only=True):
    """The fields of a CLIP. If a file has a `*_config_dict`, transformers reads a tower's fields
    from it instead of `*_config`."""

    projection_dim: Size = 512
    text_config: _Text | None = None
    text_config_dict: _Text | None = None
    vision_config: _Image | None = None
    vision_config_dict: _Image | None = None
    quantization_config: None = None


class _Shape(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    height: Size | None = None
    width: Size | None = None
    shortest_edge: Size | None = None


class _Preprocessor(msgspec.Struct, kw_only=True):
    """The fields of `preprocessor_config.json` that change the values of images or their size."""

    do_resize: Literal[True] = True
    size: Size | _Shape | None = None
    resample: Literal[3] = _BICUBIC
    do_center_crop: bool | None = None
    crop_size: Size | _Shape | None = None
    do_normalize: bool = True
    do_rescale: Literal[True] = True
    rescale_factor: Annotated[float, msgspec.Meta(ge=0.0039, le=0.00393)] = 1 / 255
    image_mean: Channels | None = None
    image_std: Deviations | None = None


class _VitPreprocessor(_Preprocessor, kw_only=True):
    resample: Literal[2, 3] = 2  # pyright: ignore[reportIncompatibleVariableOverride]


def architecture(fields: Mapping[str, Any], what: str = CONFIG) -> dict[str, Any]:
    """Returns the arguments of `CLIPConfig` that a `config.json` describes.

    Args:
        fields: the content of the file.
        what: its name in errors.

    Raises:
        ValueError: the model is not a CLIP with two towers and not a ViT, a field is out of range,
            the towers differ in a value that they must share, or the activation is not supported.
    """
    kind = fields.get("model_type")
    if isinstance(kind, str) and kind in _ONE_TOWER:
        raise ValueError(
            f"{what} describes only the {_ONE_TOWER[kind]} tower of a CLIP (model_type {kind!r}). "
            "Save the whole model with CLIPModel.save_pretrained."
        )
    if kind == VIT_TYPE:
        vit = schema.check(fields, _Vit, what, _ADVICE)
        return {
            "image": _image_tower(vit),
            "text": None,
            "joint_dim": None,
            "activation": activation(vit.hidden_act, what),
            "layer_norm_epsilon": vit.layer_norm_eps,
            "patch_bias": True,
            "input_norm": False,
            "image_mean": (0.5,) * CHANNELS,
            "image_std": (0.5,) * CHANNELS,
        }
    if kind != CLIP_TYPE:
        raise ValueError(
            f"{what} has model_type {schema.short(kind)}, which is not supported. Use a model of "
            f"type {CLIP_TYPE} or {VIT_TYPE}."
        )
    clip = schema.check(fields, _Clip, what, _ADVICE)
    text = clip.text_config_dict or clip.text_config or _Text()
    image = clip.vision_config_dict or clip.vision_config or _Image()
    for name in ("hidden_act", "layer_norm_eps"):
        if getattr(text, name) != getattr(image, name):
            raise ValueError(
                f"{what} has {name}={schema.short(getattr(text, name))} for texts and "
                f"{schema.short(getattr(image, name))} for images, but both towers must have the "
                "same value. Use a model whose towers agree."
            )
    return {
        "image": _image_tower(image),
        "text": TextTowerConfig(
            num_layers=text.num_hidden_layers,
            emb_dim=text.hidden_size,
            num_heads=text.num_attention_heads,
            mlp_dim=text.intermediate_size,
            vocab_size=text.vocab_size,
            context_length=text.max_position_embeddings,
        ),
        "joint_dim": clip.projection_dim,
        "activation": activation(text.hidden_act, what),
        "layer_norm_epsilon": text.layer_norm_eps,
        "eos_id": None if text.eos_token_id == _LARGEST_ID else text.eos_token_id,
    }


def activation(name: str, what: str) -> str:
    """Returns our name of an activation.

    Raises:
        ValueError: the activation is not supported.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{what} has hidden_act={schema.short(name)}, which is not supported. Use a model with "
            f"one of {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def _image_tower(image: _Image) -> ImageTowerConfig:
    return ImageTowerConfig(
        num_layers=image.num_hidden_layers,
        emb_dim=image.hidden_size,
        num_heads=image.num_attention_heads,
        mlp_dim=image.intermediate_size,
        patch_size=image.patch_size,
        image_size=image.image_size,
    )


def preprocessing(
    fields: Mapping[str, Any], image_size: int, what: str, *, is_vit: bool
) -> dict[str, Any]:
    """Returns the arguments of `CLIPConfig` that a `preprocessor_config.json` describes.

    Args:
        fields: the content of the file.
        image_size: the image size in the `config.json` beside it.
        what: its name in errors.
        is_vit: whether the model is a plain ViT, whose file has other defaults.

    Raises:
        ValueError: a field is not valid or not supported, or the images have another size than the
            model's.
    """
    read = schema.check(fields, _VitPreprocessor if is_vit else _Preprocessor, what, _ADVICE)
    size = image_size if read.size is None else read.size
    if isinstance(size, int):
        size = _Shape(height=size, width=size) if is_vit else _Shape(shortest_edge=size)
    cropped = size if read.do_center_crop is False or read.crop_size is None else read.crop_size
    sides = (cropped.height, cropped.width) if isinstance(cropped, _Shape) else (cropped, cropped)
    if any(side not in (None, image_size) for side in sides):
        raise ValueError(
            f"{what} makes images of {sides[0]} x {sides[1]} pixels, but the model has positions "
            f"for {image_size} x {image_size}. Use the files of one model."
        )
    found: dict[str, Any] = {"resizing": _resizing(size, image_size, _FILTERS[read.resample], what)}
    if not read.do_normalize:
        return {**found, "image_mean": (0.0,) * CHANNELS, "image_std": (1.0,) * CHANNELS}
    values = {"image_mean": read.image_mean, "image_std": read.image_std}
    return found | {name: tuple(value) for name, value in values.items() if value is not None}


def _resizing(size: _Shape, image_size: int, filter_name: str, what: str) -> Resizing:
    """Returns how images become `size`, from which the image is cropped."""
    edge = size.shortest_edge
    if edge is None and (size.height, size.width) == (image_size, image_size):
        return Resizing("squash", None, filter_name)
    if edge is None or edge < image_size:
        shown = f"{size.height} x {size.width}" if edge is None else f"a shorter edge of {edge}"
        raise ValueError(
            f"{what} resizes images to {shown} pixels before the crop of {image_size} x "
            f"{image_size}, which is not supported. Use a model whose images are resized to "
            f"{image_size} x {image_size}, or to a shorter edge of at least {image_size}."
        )
    return Resizing("crop", None if edge == image_size else edge, filter_name)


def read_architecture(folder: epath.Path) -> dict[str, Any]:
    """Reads the `config.json` of a folder, and its `preprocessor_config.json` if it exists.

    Returns:
        The arguments of `CLIPConfig`.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: a file is not JSON, or as in `architecture` and `preprocessing`.
    """
    path = folder / CONFIG
    found = architecture(read_json(path), str(path))
    preprocessor = folder / PREPROCESSOR
    if preprocessor.exists():
        size = found["image"].image_size
        found |= preprocessing(
            read_json(preprocessor), size, str(preprocessor), is_vit=found["text"] is None
        )
    return found


def fields_of(config: CLIPConfig) -> dict[str, Any]:
    """Returns the content of a `config.json`; the inverse of `architecture`.

    Args:
        config: the configuration of a CLIP with two towers.

    Raises:
        ValueError: transformers could not find the end of a text.
    """
    image, text = config.image, config.text
    assert text is not None, "the writer checks that there are two towers"
    if config.eos_id == _LARGEST_ID:
        raise ValueError(
            f"The model's texts end at the id {_LARGEST_ID}, but transformers takes this "
            "eos_token_id for the largest id of a text. Keep the model in open_clip's format."
        )
    names = {ours: hf_name for hf_name, ours in reversed(ACTIVATIONS.items())}
    shared = {
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.layer_norm_epsilon,
        "projection_dim": config.joint_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": CLIP_TYPE,
        "projection_dim": config.joint_dim,
        "text_config": {
            "model_type": "clip_text_model",
            **_tower_fields(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "eos_token_id": _LARGEST_ID if config.eos_id is None else config.eos_id,
            **shared,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **_tower_fields(image),
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            **shared,
        },
    }


def _tower_fields(tower: TowerConfig) -> dict[str, int]:
    return {
        "hidden_size": tower.emb_dim,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
    }


def preprocessor_fields_of(config: CLIPConfig) -> dict[str, Any]:
    """Returns the content of a `preprocessor_config.json`, for transformers' CLIPImageProcessor."""
    size, resizing = config.image.image_size, config.resizing
    square = {"height": size, "width": size}
    edge = {"shortest_edge": resizing.resize_to or size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if resizing.mode == "squash" else edge,
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }

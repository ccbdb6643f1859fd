"""Names and layouts of CLIP's parameters in Hugging Face's and open_clip's files, and of a ViT's in
Hugging Face's.

A table lists every tensor of a file: its name, our parameters that it holds, and its layout.
OpenAI's own names are those of open_clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from mpt_jax.backbones.clip import CLIPConfig

Shape = tuple[int, ...]
_CHANNELS = 3


class Layout(NamedTuple):
    """How a file stores one or several of our parameters as a tensor.

    Attributes:
        read: returns the parameters of a tensor.
        write: returns the tensor of the parameters.
        shape: returns the shape of the tensor, given those of the parameters.
    """

    read: Callable[[np.ndarray], list[np.ndarray]]
    write: Callable[[list[np.ndarray]], np.ndarray]
    shape: Callable[[list[Shape]], Shape]


class Tensor(NamedTuple):
    """A tensor of a file: its name, the path names of our parameters that it holds, its layout."""

    name: str
    params: tuple[str, ...]
    layout: Layout


def _patch_size(rows: int) -> int:
    return math.isqrt(rows // _CHANNELS)


def _write_patches(arrays: list[np.ndarray]) -> np.ndarray:
    """Returns the weight of a convolution [H,3,p,p] from our kernel [p*p*3,H]."""
    size = _patch_size(len(arrays[0]))
    return arrays[0].reshape(size, size, _CHANNELS, -1).transpose(3, 2, 0, 1)


def _patches_shape(shapes: list[Shape]) -> Shape:
    size = _patch_size(shapes[0][0])
    return (shapes[0][1], _CHANNELS, size, size)


COPY = Layout(lambda x: [x], lambda arrays: arrays[0], lambda shapes: shapes[0])
TRANSPOSE = Layout(lambda x: [x.T], lambda arrays: arrays[0].T, lambda shapes: shapes[0][::-1])
PATCHES = Layout(
    lambda x: [x.transpose(2, 3, 1, 0).reshape(-1, len(x))], _write_patches, _patches_shape
)
# Query, key and value as rows of one tensor.
JOINED_KERNELS = Layout(
    lambda x: [part.T for part in np.split(x, 3)],
    lambda arrays: np.concatenate([x.T for x in arrays]),
    lambda shapes: (sum(shape[1] for shape in shapes), shapes[0][0]),
)
JOINED_BIASES = Layout(
    lambda x: list(np.split(x, 3)),
    np.concatenate,
    lambda shapes: (sum(shape[0] for shape in shapes),),
)
# With axes of length 1 in front.
ONE_ROW = Layout(
    lambda x: [x[0, 0]], lambda arrays: arrays[0][None, None], lambda shapes: (1, 1, *shapes[0])
)
ONE_BATCH = Layout(lambda x: [x[0]], lambda arrays: arrays[0][None], lambda shapes: (1, *shapes[0]))

# Buffers that old Hugging Face files hold, and OpenAI's settings beside its weights.
HF_IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
OPEN_CLIP_IGNORED = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
    "text.attn_mask",
)
TEXT_PREFIX = "text."  # of the text tower, in models with `custom_text`
VIT_PREFIX = "vit."  # of a ViT below a classifier
VIT_IGNORED = (
    "pooler.dense.weight",
    "pooler.dense.bias",
    "classifier.weight",
    "classifier.bias",
)
_QKV = ("query", "key", "value")


def _linear(theirs: str, ours: str) -> list[Tensor]:
    return [
        Tensor(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSE),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), COPY),
    ]


def _norm(theirs: str, ours: str) -> list[Tensor]:
    return [
        Tensor(f"{theirs}.weight", (f"{ours}/scale",), COPY),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), COPY),
    ]


def _layer(theirs: str, ours: str, names: Sequence[str]) -> list[Tensor]:
    """Returns the tensors of a layer, given the names of its eight modules in our order."""
    pre_attention, *qkv, out, pre_mlp, wi, wo = (f"{theirs}.{name}" for name in names)
    table = _norm(pre_attention, f"{ours}/pre_attention_layer_norm")
    for name, module in zip(_QKV, qkv, strict=True):
        table += _linear(module, f"{ours}/attention/{name}")
    table += _linear(out, f"{ours}/attention/out")
    table += _norm(pre_mlp, f"{ours}/pre_mlp_layer_norm")
    return table + _linear(wi, f"{ours}/mlp/wi") + _linear(wo, f"{ours}/mlp/wo")


_HF_LAYER = (
    "layer_norm1",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)
_VIT_LAYER = (
    "layernorm_before",
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)


def _position(stack: str) -> tuple[str]:
    return (f"{stack}/position_embedding/embedding",)


def hf_table(config: CLIPConfig) -> list[Tensor]:
    """Returns the tensors of Hugging Face's `CLIPModel`."""
    image, text, embeddings = "image_encoder", "text_encoder", "vision_model.embeddings"
    table = [
        Tensor("logit_scale", ("logit_scale",), COPY),
        Tensor(
            f"{embeddings}.patch_embedding.weight", (f"{image}/patch_embedding/kernel",), PATCHES
        ),
        Tensor(f"{embeddings}.class_embedding", (f"{image}/class_embedding",), COPY),
        Tensor(f"{embeddings}.position_embedding.weight", _position(image), COPY),
        *_norm("vision_model.pre_layrnorm", f"{image}/input_norm"),  # not our typo
        *_norm("vision_model.post_layernorm", f"{image}/output_norm"),
        Tensor("visual_projection.weight", (f"{image}/projection/kernel",), TRANSPOSE),
        Tensor(
            "text_model.embeddings.token_embedding.weight",
            (f"{text}/token_embedder/embedding",),
            COPY,
        ),
        Tensor("text_model.embeddings.position_embedding.weight", _position(text), COPY),
        *_norm("text_model.final_layer_norm", f"{text}/output_norm"),
        Tensor("text_projection.weight", (f"{text}/projection/kernel",), TRANSPOSE),
    ]
    for theirs, ours, tower in (
        ("vision_model", image, config.image),
        ("text_model", text, config.text),
    ):
        for i in range(tower.num_layers if tower else 0):
            table += _layer(f"{theirs}.encoder.layers.{i}", f"{ours}/layers_{i}", _HF_LAYER)
    return table


def vit_table(config: CLIPConfig, prefix: str) -> list[Tensor]:
    """Returns the tensors of Hugging Face's `ViTModel`, with a prefix before every name."""
    ours, embeddings = "image_encoder", f"{prefix}embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    table = [
        Tensor(f"{embeddings}.cls_token", (f"{ours}/class_embedding",), ONE_ROW),
        Tensor(f"{embeddings}.position_embeddings", _position(ours), ONE_BATCH),
        Tensor(f"{patches}.weight", (f"{ours}/patch_embedding/kernel",), PATCHES),
        Tensor(f"{patches}.bias", (f"{ours}/patch_embedding/bias",), COPY),
        *_norm(f"{prefix}layernorm", f"{ours}/output_norm"),
    ]
    for i in range(config.image.num_layers):
        table += _layer(f"{prefix}encoder.layer.{i}", f"{ours}/layers_{i}", _VIT_LAYER)
    return table


def open_clip_table(config: CLIPConfig, found: Collection[str] = ()) -> list[Tensor]:
    """Returns the tensors of OpenAI's CLIP and of open_clip.

    Args:
        config: the configuration.
        found: the names in the file, which show whether the text tower has a prefix, and whether
            the projection of texts is a linear layer. With none, neither is the case.
    """
    image, text = "image_encoder", "text_encoder"
    prefix = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in found) else ""
    projection = Tensor(f"{prefix}text_projection", (f"{text}/projection/kernel",), COPY)
    linear = Tensor(f"{projection.name}.weight", projection.params, TRANSPOSE)
    if linear.name in found:
        projection = linear
    table = [
        Tensor("logit_scale", ("logit_scale",), COPY),
        Tensor("visual.conv1.weight", (f"{image}/patch_embedding/kernel",), PATCHES),
        Tensor("visual.class_embedding", (f"{image}/class_embedding",), COPY),
        Tensor("visual.positional_embedding", _position(image), COPY),
        *_norm("visual.ln_pre", f"{image}/input_norm"),
        *_norm("visual.ln_post", f"{image}/output_norm"),
        Tensor("visual.proj", (f"{image}/projection/kernel",), COPY),
        Tensor(f"{prefix}token_embedding.weight", (f"{text}/token_embedder/embedding",), COPY),
        Tensor(f"{prefix}positional_embedding", _position(text), COPY),
        *_norm(f"{prefix}ln_final", f"{text}/output_norm"),
        projection,
    ]
    for theirs, ours, tower in (("visual.", image, config.image), (prefix, text, config.text)):
        for i in range(tower.num_layers if tower else 0):
            block = f"{theirs}transformer.resblocks.{i}"
            table += _open_clip_layer(block, f"{ours}/layers_{i}")
    return table


def _open_clip_layer(theirs: str, ours: str) -> list[Tensor]:
    attention = f"{ours}/attention"
    kernels, biases = (
        tuple(f"{attention}/{name}/{leaf}" for name in _QKV) for leaf in ("kernel", "bias")
    )
    return [
        *_norm(f"{theirs}.ln_1", f"{ours}/pre_attention_layer_norm"),
        Tensor(f"{theirs}.attn.in_proj_weight", kernels, JOINED_KERNELS),
        Tensor(f"{theirs}.attn.in_proj_bias", biases, JOINED_BIASES),
        *_linear(f"{theirs}.attn.out_proj", f"{attention}/out"),
        *_norm(f"{theirs}.ln_2", f"{ours}/pre_mlp_layer_norm"),
        *_linear(f"{theirs}.mlp.c_fc", f"{ours}/mlp/wi"),
        *_linear(f"{theirs}.mlp.c_proj", f"{ours}/mlp/wo"),
    ]

"""Hugging Face folders of T5: `config.json` and safetensors, both ways.

One table pairs the names; kernels are transposed (torch's `Linear` keeps `[out, in]`), and so is
the relative position table (`[buckets, heads]` there), everything else is as it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.convert.files import is_local, new_folder
from mpt_jax.tree import flatten, match_exactly, unflatten

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SELF_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# feed_forward_proj there -> mlp_activations here. `gated-gelu` is the tanh form in both.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# Their T5 has these besides the ones we read: copies of the embedding, and a table that the
# first T5 checkpoints carry and no version of the model reads.
_IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def name_table(config: T5Config) -> dict[str, str]:
    """Our path name -> the name in Hugging Face's state dict, for every parameter."""
    table = {"token_embedder/embedding": "shared.weight"}
    if not config.logits_via_embedding:
        table["decoder/logits_dense/kernel"] = "lm_head.weight"
    stacks = (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers))
    for stack, layers in stacks:
        first = f"{stack}.block.0.layer.0.SelfAttention"
        table[f"{stack}/relpos_bias/rel_embedding"] = f"{first}.relative_attention_bias.weight"
        table[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
        parts = _layer_table(stack, gated=len(config.mlp_activations) > 1)
        for i in range(layers):
            for ours, theirs in parts.items():
                table[f"{stack}/layers_{i}/{ours}"] = f"{stack}.block.{i}.layer.{theirs}.weight"
    return table


def _layer_table(stack: str, gated: bool) -> dict[str, str]:
    """One layer's names here -> there, where a layer is a list of two or three blocks."""
    if stack == "encoder":
        blocks = [("attention", "pre_attention_layer_norm", "SelfAttention")]
    else:
        blocks = [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ]
    table = {}
    for position, (ours, norm, theirs) in enumerate(blocks):
        table[f"{norm}/scale"] = f"{position}.layer_norm"
        for projection, letter in _SELF_ATTENTION.items():
            table[f"{ours}/{projection}/kernel"] = f"{position}.{theirs}.{letter}"
    last = len(blocks)
    table["pre_mlp_layer_norm/scale"] = f"{last}.layer_norm"
    for name in (*(("wi_0", "wi_1") if gated else ("wi",)), "wo"):
        table[f"mlp/{name}/kernel"] = f"{last}.DenseReluDense.{name}"
    return table


def _transposed(name: str) -> bool:
    return name.endswith(("/kernel", "/rel_embedding"))


def config_from_hf(fields: Mapping[str, Any], what: str = "config.json") -> T5Config:
    """The shape that a Hugging Face `config.json` describes.

    Raises:
        ValueError: another architecture, or a T5 that differs from ours in arithmetic.
    """
    if fields.get("model_type") not in ("t5", "mt5"):
        raise ValueError(
            f"{what} describes a model of type {fields.get('model_type')!r}; only 't5' and 'mt5' "
            "(T5 1.0, T5 1.1, Flan, mT5, ByT5) have this architecture."
        )
    activation = fields.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{what}: feed_forward_proj={activation!r} is not supported; "
            f"known: {list(_ACTIVATIONS)}."
        )
    if fields.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise ValueError(f"{what}: layer_norm_epsilon={fields['layer_norm_epsilon']}, not 1e-6.")
    return T5Config(
        vocab_size=fields["vocab_size"],
        emb_dim=fields["d_model"],
        num_heads=fields["num_heads"],
        num_encoder_layers=fields["num_layers"],
        num_decoder_layers=fields.get("num_decoder_layers") or fields["num_layers"],
        head_dim=fields["d_kv"],
        mlp_dim=fields["d_ff"],
        mlp_activations=_ACTIVATIONS[activation],
        logits_via_embedding=fields.get("tie_word_embeddings", True),
        relative_attention_num_buckets=fields.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=fields.get("relative_attention_max_distance", 128),
    )


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The fields of `config.json`; the inverse of `config_from_hf`."""
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.mlp_activations not in activations:
        raise ValueError(
            f"mlp_activations={config.mlp_activations} has no name in Hugging Face's T5; "
            f"known: {list(activations)}."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": activations[config.mlp_activations],
        "tie_word_embeddings": config.logits_via_embedding,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    }


def load_hf(folder: str | os.PathLike[str]) -> tuple[T5Config, dict[str, Any]]:
    """Reads a T5 from a Hugging Face folder.

    Returns:
        its configuration, and its parameters as NumPy arrays in the dtype of the file (float16
        becomes float32, in which T5 does not overflow).

    Raises:
        FileNotFoundError: no `config.json` or no weights.
        ValueError: only pickled weights, truncated or missing shards, missing or misshaped
            parameters, another architecture.
    """
    folder = epath.Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no config.json; is it a Hugging Face folder?")
    config = config_from_hf(
        json.loads((folder / "config.json").read_text()), f"{folder / 'config.json'}"
    )
    found = _read_weights(folder)
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in found:
        found["shared.weight"] = found["encoder.embed_tokens.weight"]
    for name in _IGNORED:
        found.pop(name, None)
    if config.logits_via_embedding:
        found.pop("lm_head.weight", None)  # saved as a copy of the embedding it is tied to
    ours = {theirs: name for name, theirs in name_table(config).items()}
    params = {}
    for theirs, x in found.items():
        name = ours.get(theirs, theirs)
        x = x.T if _transposed(name) else x
        params[name] = x.astype(np.float32) if x.dtype == np.float16 else x
    shapes = {name: x.shape for name, x in params.items()}
    match_exactly(parameter_shapes(config), shapes, f"The checkpoint {folder}")
    return config, unflatten(params)


def _read_weights(folder: epath.Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder's safetensors file or files, by name."""
    if (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    elif (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds only pickled weights (*.bin), which can run code when read. Save the "
            "model again with transformers' save_pretrained(folder, safe_serialization=True)."
        )
    else:
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder} is incomplete: {INDEX} names {missing}, which are not there.")
    tensors: dict[str, np.ndarray] = {}
    for path in (folder / name for name in files):
        try:
            tensors.update(_tensors(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return tensors


def _tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, wherever it lies; the library maps local files alone, and
    reads bfloat16 no other way."""
    if is_local(path):
        return load_file(path)
    with tempfile.TemporaryDirectory() as folder:
        return load_file(path.copy(os.path.join(folder, path.name)))


def save_hf(
    folder: str | os.PathLike[str], config: T5Config, params: Mapping[str, Any]
) -> epath.Path:
    """Writes a T5 as a Hugging Face folder that `T5ForConditionalGeneration` loads.

    Args:
        folder: to be made; it appears complete or not at all.
        config: without `biases`, which their T5 lacks.
        params: the unscanned tree.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: parameters that do not match the configuration or have no name there.
    """
    if config.biases:
        raise ValueError("Hugging Face's T5 has no biases; a config with biases=True cannot go.")
    leaves = {name: np.asarray(x) for name, x in flatten(params).items()}
    expected = parameter_shapes(config)
    match_exactly(expected, {name: x.shape for name, x in leaves.items()}, "The tree to save")
    tensors = {
        theirs: np.ascontiguousarray(leaves[name].T if _transposed(name) else leaves[name])
        for name, theirs in name_table(config).items()
    }
    with new_folder(folder) as made:
        (made / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
        (made / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    return epath.Path(folder)

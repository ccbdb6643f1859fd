"""Reader and writer of Hugging Face folders with T5, mT5 or umT5: `config.json` and weights.

`name_table` maps the parameter names. Kernels are transposed (torch's `Linear` keeps `[out, in]`),
and so are relative position tables (`[buckets, heads]` in Hugging Face). All other parameters are
unchanged.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mpt_jax.backbones.t5 import T5Config, hf_config, parameter_shapes
from mpt_jax.backbones.t5.hf_config import ACTIVATIONS, CONFIG, MODEL_TYPES, SIZES
from mpt_jax.convert.hf_weights import MAX_SHARD_BYTES, read_tensors, write_tensors
from mpt_jax.core.tree import check_floats, flatten, match_exactly, unflatten
from mpt_jax.runtime.files import new_folder

_SELF_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MT5_VOCABULARY = 250112
_EMBEDDING = "shared.weight"
# Copies of the embedding that files may also hold.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
# The first T5 checkpoints hold this table, and no version of the model reads it.
_UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def name_table(config: T5Config) -> dict[str, str]:
    """Returns the name in Hugging Face's state dict of every parameter, by our path name."""
    table = {"token_embedder/embedding": _EMBEDDING}
    if not config.logits_via_embedding:
        table["decoder/logits_dense/kernel"] = _HEAD
    stacks = (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers))
    for stack, layers in stacks:
        for i in range(layers if config.relative_bias_per_layer else 1):
            prefix = f"{stack}/layers_{i}" if config.relative_bias_per_layer else stack
            hf_name = f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
            table[f"{prefix}/relpos_bias/rel_embedding"] = hf_name
        table[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
        parts = _layer_table(stack, gated=len(config.mlp_activations) > 1)
        for i in range(layers):
            for path, hf_name in parts.items():
                table[f"{stack}/layers_{i}/{path}"] = f"{stack}.block.{i}.layer.{hf_name}.weight"
    return table


def _layer_table(stack: str, gated: bool) -> dict[str, str]:
    """Returns Hugging Face's names for the parameters of one layer, by our name in the layer.

    Hugging Face calls our layer a block, and divides it into two or three layers.
    """
    if stack == "encoder":
        hf_layers = [("attention", "pre_attention_layer_norm", "SelfAttention")]
    else:
        hf_layers = [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ]
    table = {}
    for position, (module, norm, hf_module) in enumerate(hf_layers):
        table[f"{norm}/scale"] = f"{position}.layer_norm"
        for projection, letter in _SELF_ATTENTION.items():
            table[f"{module}/{projection}/kernel"] = f"{position}.{hf_module}.{letter}"
    last = len(hf_layers)
    table["pre_mlp_layer_norm/scale"] = f"{last}.layer_norm"
    for name in (*(("wi_0", "wi_1") if gated else ("wi",)), "wo"):
        table[f"mlp/{name}/kernel"] = f"{last}.DenseReluDense.{name}"
    return table


def _transposed(name: str) -> bool:
    return name.endswith(("/kernel", "/rel_embedding"))


def _layout(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a parameter has in Hugging Face's state dict."""
    return shape[::-1] if _transposed(name) else shape


def config_from_hf(fields: Mapping[str, Any], what: str = CONFIG) -> T5Config:
    """Returns the configuration that a Hugging Face `config.json` describes.

    Raises:
        ValueError: as in `hf_config.architecture`.
    """
    return T5Config(**hf_config.architecture(fields, what))


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """Returns the fields of `config.json`; the inverse of `config_from_hf`.

    `model_type` is `umt5` if every layer has a relative position table, `mt5` if the model has
    mT5's vocabulary size and an output projection, otherwise `t5`. `mt5` and `t5` are the same
    architecture.

    Raises:
        ValueError: Hugging Face's T5 does not support the activations.
    """
    activations = {value: hf_name for hf_name, value in ACTIVATIONS.items()}
    if config.mlp_activations not in activations:
        raise ValueError(
            f"Hugging Face's T5 does not support mlp_activations={config.mlp_activations}, only "
            f"{', '.join(map(str, activations))}. Write a T5X checkpoint instead (mpt-jax convert "
            "--to t5x)."
        )
    mt5 = config.vocab_size == _MT5_VOCABULARY and not config.logits_via_embedding
    model_type = "umt5" if config.relative_bias_per_layer else "mt5" if mt5 else "t5"
    return {
        "architectures": [MODEL_TYPES[model_type][0]],
        "model_type": model_type,
        **{hf_name: getattr(config, name) for hf_name, name in SIZES.items()},
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


def read_config(path: str | os.PathLike[str]) -> T5Config:
    """Reads the configuration of a T5 from a `config.json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or it or the `generation_config.json` beside it describes
            a model that is not supported.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Use a Hugging Face folder, which has a {CONFIG} and weights."
        )
    return T5Config(**hf_config.read_architecture(path))


def check_config(folder: str | os.PathLike[str], config: T5Config) -> None:
    """Checks that a model has the architecture in a Hugging Face folder's `config.json`.

    Raises:
        FileNotFoundError, ValueError: as in `read_config`; or fields differ, and the message lists
            them with both values.
    """
    path = epath.Path(folder) / CONFIG
    theirs = read_config(path)
    differing = [
        f"{name} is {getattr(config, name)!r} in the model and {getattr(theirs, name)!r} in the "
        f"file ({hf_name})"
        for name, hf_name in hf_config.ARCHITECTURE.items()
        if getattr(config, name) != getattr(theirs, name)
    ]
    if differing:
        raise ValueError(
            f"The model is not the one that {path} describes: {'; '.join(differing)}. Leave "
            "T5_NAME, T5_CONFIG and these fields of config.t5_config (in a command: --config) "
            "unset to use the file's values, or set INITIAL_CHECKPOINT_PATH to the model's "
            "checkpoint."
        )


def load_hf(folder: str | os.PathLike[str]) -> tuple[T5Config, dict[str, Any]]:
    """Reads a T5 from a Hugging Face folder.

    Returns:
        The configuration, and the parameters as NumPy arrays in the dtype of the file, except that
        float16 is converted to float32, since T5 overflows in float16.

    Raises:
        FileNotFoundError: the folder has no `config.json` or no weights.
        ValueError: `config.json` or its architecture is not supported; shards are truncated or
            missing; a parameter is missing, unexpected or not finite, or has another shape or an
            unsupported dtype; a copy of the embedding differs from it; or the weights are pickled,
            and torch is not installed or finds more than tensors in them.
    """
    folder = epath.Path(folder)
    config = read_config(folder / CONFIG)
    tensors = _without_copies(read_tensors(folder), config, folder)
    table = name_table(config)
    advice = f"Download or copy {CONFIG} and the weights again."
    if not config.logits_via_embedding and _HEAD not in tensors:
        advice = (
            f"If the model has no separate output projection ({_HEAD}), set tie_word_embeddings "
            f"(and scale_decoder_outputs, if present) to true in {CONFIG}. Otherwise download or "
            "copy the weights again."
        )
    match = functools.partial(
        match_exactly, what=f"The checkpoint {folder}", standard=f"its {CONFIG}", advice=advice
    )
    # Names first: they confirm the number of layers before the network is traced for its shapes.
    match(dict.fromkeys(table.values(), ()), dict.fromkeys(tensors, ()))
    shapes = parameter_shapes(config)
    match(
        {theirs: _layout(name, shapes[name]) for name, theirs in table.items()},
        {theirs: x.shape for theirs, x in tensors.items()},
    )
    check_floats(tensors, f"The checkpoint {folder}")
    params = {}
    for name, theirs in table.items():
        x = tensors.pop(theirs)
        x = x.T if _transposed(name) else x
        params[name] = x.astype(np.float32) if x.dtype == np.float16 else x
    return config, unflatten(params)


def _without_copies(
    tensors: Mapping[str, np.ndarray], config: T5Config, folder: epath.Path
) -> dict[str, np.ndarray]:
    """Drops tensors that the model does not read, such as copies of the embedding.

    Raises:
        ValueError: a copy differs from the embedding.
    """
    kept = {name: x for name, x in tensors.items() if name != _UNREAD}
    copies = [name for name in _COPIES if name in kept]
    if _EMBEDDING not in kept and copies:
        kept[_EMBEDDING] = kept[copies[0]]
    if config.logits_via_embedding and _HEAD in kept:
        copies.append(_HEAD)
    for name in copies:
        copy = kept.pop(name)
        if not np.array_equal(copy, kept.get(_EMBEDDING, copy)):
            raise ValueError(
                f"In {folder}, {name} differs from {_EMBEDDING}, but {CONFIG} describes a model "
                f"that shares them. If the model has a separate output projection ({_HEAD}), set "
                "tie_word_embeddings (and scale_decoder_outputs, if present) to false in "
                f"{CONFIG}. Otherwise download or copy the weights again."
            )
    return kept


def save_hf(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> epath.Path:
    """Writes a T5 as a Hugging Face folder that transformers loads.

    Args:
        folder: the folder to create. If writing fails, it is not created.
        config: the configuration. `biases` must be False, since Hugging Face's T5 has none.
        params: the unscanned tree.
        max_shard_bytes: the maximum size of a file in bytes. Larger weights are divided into
            several files with an index.

    Raises:
        FileExistsError: the folder already exists.
        ValueError: the parameters do not match the configuration, or Hugging Face's T5 does not
            support the configuration.
    """
    with new_folder(folder) as scratch:
        write_hf(scratch, config, params, max_shard_bytes)
    return epath.Path(folder)


def write_hf(
    folder: epath.Path,
    config: T5Config,
    params: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the files of `save_hf` into an existing, empty folder. Raises as `save_hf` does."""
    if config.biases:
        raise ValueError(
            "Hugging Face's T5 has no biases, so a model with biases=True cannot be written. Write "
            "a T5X checkpoint instead (mpt-jax convert --to t5x)."
        )
    leaves = {name: np.asarray(x) for name, x in flatten(params).items()}
    expected = parameter_shapes(config)
    shapes = {name: x.shape for name, x in leaves.items()}
    advice = "Save the parameters with the configuration of their model."
    match_exactly(expected, shapes, "The tree to save", standard="its configuration", advice=advice)
    tensors = {
        hf_name: leaves[name].T if _transposed(name) else leaves[name]
        for name, hf_name in name_table(config).items()
    }
    dtypes = {str(x.dtype) for x in tensors.values()}
    fields = config_to_hf(config) | ({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    write_tensors(folder, tensors, max_shard_bytes)

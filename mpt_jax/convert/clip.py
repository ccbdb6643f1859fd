"""Reader and writer of CLIP in Hugging Face and open_clip folders; reader of Hugging Face's ViT.

OpenAI's files are TorchScript archives. To read one, save its state dict as safetensors, under
open_clip's file name:

    model = torch.jit.load("ViT-B-16.pt", map_location="cpu")
    safetensors.torch.save_file(model.state_dict(), "open_clip_model.safetensors")

and write an `open_clip_config.json` beside it, {"model_cfg": ..., "preprocess_cfg": ...} with
"quick_gelu": true (docs/checkpoints.md has that of ViT-B/16). The files in open_clip's folder
`model_configs` hold only the value of "model_cfg", and its ViT-B-16.json lacks "quick_gelu".
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpt_jax.backbones.clip import (
    CLIPConfig,
    hf_config,
    open_clip_config,
    parameter_shapes,
)
from mpt_jax.backbones.clip.config import architecture
from mpt_jax.backbones.clip.published import read_config
from mpt_jax.convert import clip_names as names
from mpt_jax.convert.hf_weights import (
    MAX_SHARD_BYTES,
    read_file,
    read_tensors,
    write_file,
    write_tensors,
)
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.tree import check_floats, flatten, match_exactly, unflatten
from mpt_jax.runtime.files import new_folder

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


def read_clip_config(path: str | os.PathLike[str]) -> CLIPConfig:
    """Reads the configuration of a CLIP or ViT from a Hugging Face or open_clip folder.

    Raises:
        FileNotFoundError: the folder has neither a `config.json` nor an `open_clip_config.json`.
        ValueError: the file does not describe a supported model.
    """
    if (config := read_config(path)) is None:
        raise FileNotFoundError(
            f"{os.fspath(path)} has no {hf_config.CONFIG} and no {open_clip_config.CONFIG}. Use a "
            "Hugging Face folder or an open_clip folder, which has one of these files and weights."
        )
    return config


def load_clip(path: str | os.PathLike[str], config: CLIPConfig | None = None) -> dict[str, Any]:
    """Reads the parameters of a CLIP or ViT as the unscanned tree of NumPy arrays.

    The arrays have the dtype of the file, except that float16 is converted to float32.

    Args:
        path: a Hugging Face folder (`config.json` and weights, with the names of `CLIPModel`,
            `ViTModel` or `ViTForImageClassification`), or an open_clip folder
            (`open_clip_config.json` and `open_clip_model.safetensors`, with open_clip's or
            OpenAI's names).
        config: the configuration of the model that will use the parameters. If given, the folder
            must describe the same architecture and normalization of images.

    Raises:
        FileNotFoundError: the folder has no configuration or no weights.
        ValueError: the configuration is not supported or differs from `config`; the weights are
            truncated or lack a tower; or a parameter is missing, unexpected or not finite, or has
            another shape or an unsupported dtype.
    """
    folder = epath.Path(path)
    theirs = read_clip_config(folder)
    if config is not None:
        _check_config(folder, config, theirs)
    if (folder / hf_config.CONFIG).exists():
        tensors, table = _read_hf(folder, theirs)
    else:
        tensors, table = _read_open_clip(folder, theirs)
    _match(tensors, table, theirs, f"The checkpoint {folder}")
    params: dict[str, np.ndarray] = {}
    for tensor in table:
        x = tensors.pop(tensor.name)
        x = x.astype(np.float32) if x.dtype == np.float16 else x
        params |= dict(zip(tensor.params, tensor.layout.read(x), strict=True))
    return unflatten(params)


def _check_config(folder: epath.Path, config: CLIPConfig, theirs: CLIPConfig) -> None:
    """Raises ValueError if a model has another architecture than its folder describes."""
    ours, found = architecture(config), architecture(theirs)
    differing = [
        f"{name} is {ours.get(name)!r} in the model and {found.get(name)!r} in the folder"
        for name in sorted(ours.keys() | found.keys())
        if ours.get(name) != found.get(name)
    ]
    if differing:
        raise ValueError(
            f"The model is not the one that {folder} describes: {abbreviate(differing, '; ')}. "
            "Read the configuration from the folder, or use the folder of the model."
        )


def _read_hf(
    folder: epath.Path, config: CLIPConfig
) -> tuple[dict[str, np.ndarray], list[names.Tensor]]:
    if config.text is not None:
        tensors = read_tensors(folder, names.HF_IGNORED)
        _check_towers(tensors, folder, image="vision_model.", text="text_model.")
        return tensors, names.hf_table(config)
    tensors = read_tensors(folder)
    prefix = names.VIT_PREFIX if any(x.startswith(names.VIT_PREFIX) for x in tensors) else ""
    tensors = {name: x for name, x in tensors.items() if name not in names.VIT_IGNORED}
    return tensors, names.vit_table(config, prefix)


def _read_open_clip(
    folder: epath.Path, config: CLIPConfig
) -> tuple[dict[str, np.ndarray], list[names.Tensor]]:
    path = folder / OPEN_CLIP_WEIGHTS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {OPEN_CLIP_WEIGHTS}. Download it, or save the state dict of the "
            "model under this name with safetensors.torch.save_file."
        )
    tensors = read_file(path, names.OPEN_CLIP_IGNORED)
    table = names.open_clip_table(config, tensors)
    embedding = next(tensor.name for tensor in table if "token_embedding" in tensor.name)
    _check_towers(tensors, folder, image="visual.", text=embedding)
    return tensors, table


def _check_towers(found: Collection[str], folder: epath.Path, **prefixes: str) -> None:
    """Raises ValueError if no tensor's name starts with the prefix of a tower."""
    for tower, prefix in prefixes.items():
        if not any(name.startswith(prefix) for name in found):
            raise ValueError(
                f"The weights in {folder} have no {tower} tower: no name starts with {prefix}. "
                "Save the whole model, not one tower."
            )


def _match(
    tensors: Mapping[str, np.ndarray], table: Sequence[names.Tensor], config: CLIPConfig, what: str
) -> None:
    """Checks the names, shapes and values of the tensors of a file."""
    standard, advice = "its configuration", "Download or copy all files of the model again."
    # Names first: they confirm the number of layers before the network is traced for its shapes.
    expected: dict[str, tuple[int, ...]] = {tensor.name: () for tensor in table}
    match_exactly(expected, dict.fromkeys(tensors, ()), what, standard=standard, advice=advice)
    shapes = parameter_shapes(config)
    expected = {
        tensor.name: tensor.layout.shape([shapes[name] for name in tensor.params])
        for tensor in table
    }
    found = {name: x.shape for name, x in tensors.items()}
    match_exactly(expected, found, what, standard=standard, advice=advice)
    check_floats(tensors, what)


def save_clip(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: CLIPConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> epath.Path:
    """Writes a CLIP as a Hugging Face folder that transformers loads.

    Args:
        path: the folder to create. If writing fails, it is not created.
        params: the unscanned tree.
        config: the configuration of a CLIP with two towers.
        max_shard_bytes: the maximum size of a file in bytes. Larger weights are divided into
            several files with an index.

    Raises:
        FileExistsError: the folder already exists.
        ValueError: the parameters do not match the configuration, or Hugging Face's CLIP does not
            support the configuration.
    """
    with new_folder(path) as scratch:
        write_clip(scratch, params, config, max_shard_bytes)
    return epath.Path(path)


def write_clip(
    folder: epath.Path,
    params: Mapping[str, Any],
    config: CLIPConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the files of `save_clip` into an existing, empty folder, and raises as it does."""
    tensors = _tensors(params, config, names.hf_table(config))
    _write_json(folder / hf_config.CONFIG, hf_config.fields_of(config))
    _write_json(folder / hf_config.PREPROCESSOR, hf_config.preprocessor_fields_of(config))
    write_tensors(folder, tensors, max_shard_bytes)


def save_open_clip(
    path: str | os.PathLike[str], params: Mapping[str, Any], config: CLIPConfig
) -> epath.Path:
    """Writes a CLIP as a folder that open_clip loads; see `save_clip`."""
    with new_folder(path) as scratch:
        write_open_clip(scratch, params, config)
    return epath.Path(path)


def write_open_clip(folder: epath.Path, params: Mapping[str, Any], config: CLIPConfig) -> None:
    """Writes the files of `save_open_clip` into an existing, empty folder."""
    tensors = _tensors(params, config, names.open_clip_table(config))
    _write_json(folder / open_clip_config.CONFIG, open_clip_config.fields_of(config))
    write_file(folder / OPEN_CLIP_WEIGHTS, tensors, tensors)


def _tensors(
    params: Mapping[str, Any], config: CLIPConfig, table: Sequence[names.Tensor]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, checked against the configuration."""
    if config.text is None or config.patch_bias or not config.input_norm:
        raise ValueError(
            "Only a CLIP with two towers, an input norm and no patch bias can be written, but the "
            f"configuration has {'no text tower' if config.text is None else 'another form'}. Use "
            "the files that the model was read from."
        )
    leaves = {name: np.asarray(x) for name, x in flatten(params).items()}
    match_exactly(
        parameter_shapes(dataclasses.replace(config, scan_layers=False)),
        {name: x.shape for name, x in leaves.items()},
        "The tree to save",
        standard="its configuration",
        advice="Save the unscanned parameters with the configuration of their model.",
    )
    return {
        tensor.name: tensor.layout.write([leaves[name] for name in tensor.params])
        for tensor in table
    }


def _write_json(path: epath.Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")

"""Conversion of a T5 to another format. The output is read back and compared before it is
moved to the target folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mpt_jax.backbones.t5 import T5Config, parameter_shapes, t5_config
from mpt_jax.backbones.t5.config import NAMES
from mpt_jax.convert import architecture, detect, load_backbone, load_hf, load_t5x, parity
from mpt_jax.convert.hf import read_config, write_hf
from mpt_jax.convert.t5x import write_orbax, write_t5x
from mpt_jax.core.tree import flatten, match_exactly, unflatten
from mpt_jax.runtime.files import new_folder

DTYPES = ("float32", "bfloat16")
_STEP = re.compile(r"checkpoint_\d+")


def read(
    source: epath.Path, config: str | None, say: Callable[[str], None] = print
) -> tuple[T5Config, dict[str, Any]]:
    """Reads a backbone and its configuration.

    Args:
        source: a Hugging Face folder or a T5X checkpoint.
        config: the name of a configuration, or a Hugging Face `config.json`. If None, it is read
            from the Hugging Face folder, or inferred from the shapes of the T5X checkpoint.
        say: called with a line that lists the assumed settings, if the configuration is inferred.

    Raises:
        FileNotFoundError, ValueError: the backbone cannot be read, or its parameters do not match
            the configuration.
    """
    if config is None and detect.recognize(source) == detect.HF:
        return load_hf(source)
    requested = None if config is None else named_config(config)
    params = load_backbone(source, requested)
    if requested is not None:
        params = architecture.with_tables(params, requested.relative_bias_per_layer)
        shapes = {name: np.shape(x) for name, x in flatten(params).items()}
        match_exactly(
            parameter_shapes(requested),
            shapes,
            f"{source}, read as {config},",
            advice="Set --config to the configuration of the checkpoint.",
        )
        return requested, params
    inferred = architecture.config_of_tree(params, str(source))
    say(
        "The configuration was inferred from the parameters' shapes, assuming "
        f"mlp_activations={inferred.mlp_activations} and {architecture.ASSUMED}. If the model has "
        "other values, set --config."
    )
    return inferred, params


def named_config(config: str) -> T5Config:
    """Returns the configuration that a published name or a `config.json` describes.

    Raises:
        ValueError: the name is unknown, or the file does not describe a supported T5.
        FileNotFoundError: the file does not exist.
    """
    if config.lower() in NAMES:
        return t5_config(config)
    if config.endswith(".json"):
        return read_config(config)
    raise ValueError(
        f"Unknown T5 configuration {config!r}. Set --config to a config.json or to one of "
        f"{', '.join(NAMES)}."
    )


def convert(
    source: epath.Path,
    target: epath.Path,
    to: str,
    *,
    config: str | None = None,
    dtype: str | None = None,
    logits: bool = True,
    say: Callable[[str], None] = print,
) -> epath.Path:
    """Converts a backbone to another format. The target is created only if every leaf that is read
    back is identical to the leaf that was written.

    Args:
        source: see `read`.
        target: the folder to create. A T5X or Orbax checkpoint is written to `target` itself if
            its name is `checkpoint_<step>`, otherwise to `checkpoint_0` inside it.
        to: `'hf'`, `'t5x'` or `'orbax'`.
        config: see `read`.
        dtype: the dtype to write, `'float32'` or `'bfloat16'`; None keeps the dtype of each leaf.
        logits: whether to also compare the logits of source and target on a fixed batch.
        say: called with each line to show to the user; the last is the result of the comparison.

    Returns:
        The path of the new checkpoint.

    Raises:
        FileExistsError: the target already exists.
        FileNotFoundError, ValueError: as in `read`, or the target differs from the source.
    """
    if target.exists():
        raise FileExistsError(
            f"{target} already exists. Choose another target, or remove the existing one."
        )
    named = to == detect.HF or _STEP.fullmatch(target.name)
    inside = "" if named else "checkpoint_0"
    shape, params = read(source, config, say)
    before = parity.forward(shape, params)["logits"] if logits else None
    if dtype is not None:
        params = cast(params, dtype)  # frees the parameters of full precision
    with new_folder(target) as scratch:
        folder = scratch / inside
        folder.mkdir(exist_ok=True)
        if to == detect.HF:
            write_hf(folder, shape, params)
            restored = load_hf(folder)[1]
        else:
            step = int((inside or target.name).removeprefix("checkpoint_"))
            {detect.T5X: write_t5x, detect.ORBAX: write_orbax}[to](folder, params, step)
            restored = load_t5x(folder)
        line = parity.identical(params, restored, str(target)) + ": identical"
        if dtype is not None:
            line += f" after rounding to {dtype}"
        if before is not None:
            after = parity.forward(shape, restored)["logits"]
            difference = parity.largest_difference(before, after)
            line += f"; logits of a fixed batch differ by at most {difference:.3g}"
    say(line)
    return target / inside


def cast(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the parameters as NumPy arrays of a dtype."""
    return unflatten(
        {name: np.asarray(x).astype(jnp.dtype(dtype)) for name, x in flatten(params).items()}
    )

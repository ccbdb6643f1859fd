"""A backbone from one format into another, read back and compared before it takes its name."""

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
    """A backbone and its configuration.

    Args:
        source: a Hugging Face folder or a T5X checkpoint.
        config: the name of a configuration, or a Hugging Face `config.json`; where there is none
            the folder's own, or for T5X what the shapes tell.
        say: is told what of the configuration was not read but assumed.

    Raises:
        FileNotFoundError, ValueError: unreadable, or the parameters are not of that configuration.
    """
    if config is None and detect.recognize(source) == detect.HF:
        return load_hf(source)
    params = load_backbone(source)
    if config is not None:
        chosen = named_config(config)
        params = architecture.with_tables(params, chosen.relative_bias_per_layer)
        shapes = {name: np.shape(x) for name, x in flatten(params).items()}
        match_exactly(parameter_shapes(chosen), shapes, f"{source}, read as {config},")
        return chosen, params
    found = architecture.config_of_tree(params, str(source))
    say(
        f"Configuration read from the shapes; assumed: mlp_activations={found.mlp_activations}, "
        f"{architecture.ASSUMED}. If the model has others, give --config."
    )
    return found, params


def named_config(config: str) -> T5Config:
    """The configuration of a published name or of a `config.json`.

    Raises:
        ValueError, FileNotFoundError: neither.
    """
    if config.lower() in NAMES:
        return t5_config(config)
    if config.endswith(".json"):
        return read_config(config)
    raise ValueError(f"No T5 is called {config!r}, and it is no config.json. Known: {list(NAMES)}.")


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
    """Writes a backbone in another format; the target appears when it has been read back and every
    leaf was found identical, or not at all.

    Args:
        source: see `read`.
        target: a folder to be made. T5X's checkpoints are named `checkpoint_<step>`; under another
            name the folder gets a `checkpoint_0`.
        to: `'hf'`, `'t5x'` or `'orbax'`.
        config: see `read`.
        dtype: `'float32'` or `'bfloat16'`; None keeps each leaf's.
        logits: whether to run both on a fixed batch as well.
        say: takes the lines for the user; the last is the parity line.

    Returns:
        the checkpoint that was made.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already and is not overwritten.")
    named = to == detect.HF or _STEP.fullmatch(target.name)
    inside = "" if named else "checkpoint_0"
    shape, params = read(source, config, say)
    before = parity.forward(shape, params)["logits"] if logits else None
    if dtype is not None:
        params = _cast(params, dtype)  # from here on the whole numbers are not held
    with new_folder(target) as made:
        folder = made / inside
        folder.mkdir(exist_ok=True)
        if to == detect.HF:
            write_hf(folder, shape, params)
            back = load_hf(folder)[1]
        else:
            step = int((inside or target.name).removeprefix("checkpoint_"))
            {detect.T5X: write_t5x, detect.ORBAX: write_orbax}[to](folder, params, step)
            back = load_t5x(folder)
        line = parity.identical(params, back, str(target)) + ": identical"
        if dtype is not None:
            line += f" after rounding to {dtype}"
        if before is not None:
            after = parity.forward(shape, back)["logits"]
            difference = parity.largest_difference(before, after)
            line += f"; logits of a fixed batch differ by at most {difference:.3g}"
    say(line)
    return target / inside


def _cast(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return unflatten(
        {name: np.asarray(x).astype(jnp.dtype(dtype)) for name, x in flatten(params).items()}
    )

"""`mpt-jax verify-weights FOLDER`: compares our network with transformers' on the same weights.

    mpt-jax verify-weights runs/backbones/t5-base
    mpt-jax verify-weights runs/backbones/t5x/checkpoint_0 --config t5_1_1_base

Both networks run in float32 on a fixed padded batch. The exit code is 0 if no hidden state or logit
differs by more than 1e-4, 1 if one does, and 2 if the comparison cannot be made.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mpt_jax.backbones.t5 import T5Config
from mpt_jax.convert import backbones, parity, save_hf
from mpt_jax.runtime.exits import exit_with

TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    """Compares both networks, prints the differences, and exits with the code for the result."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax verify-weights",
        description="Compares our network with transformers' on the same weights, in float32.",
    )
    parser.add_argument("folder", help="a Hugging Face folder or a T5X checkpoint")
    parser.add_argument(
        "--config", help="a name such as t5_1_1_base, or a config.json, if the folder has none"
    )
    args = parser.parse_args(argv)
    try:
        differences = compare(epath.Path(args.folder), args.config)
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)
    for name, difference in differences.items():
        print(f"{name:8} differs by at most {difference:.3g}")
    # NaN is not <= the tolerance, so it fails.
    passed = all(difference <= TOLERANCE for difference in differences.values())
    print(f"{'PASS' if passed else 'FAIL'}: the tolerance is {TOLERANCE:g}")
    sys.exit(0 if passed else 1)


def compare(folder: epath.Path, config: str | None) -> dict[str, float]:
    """Returns the largest absolute differences of the encoder's hidden states, the decoder's hidden
    states, and the logits.

    Raises:
        ValueError: torch or transformers is not installed, the weights cannot be read, or Hugging
            Face's T5 does not support the model.
        FileNotFoundError: the folder does not exist or has no weights.
    """
    torch, transformers = _oracle()
    shape, params = backbones.read(folder, config)
    outputs = parity.forward(shape, params)
    with tempfile.TemporaryDirectory() as scratch:
        # transformers reads a local Hugging Face folder: the given one, or one that is saved here.
        hf_folder = os.fspath(folder)
        if config is not None or not os.path.exists(os.path.join(hf_folder, "config.json")):
            hf_folder = os.fspath(save_hf(os.path.join(scratch, "hf"), shape, params))
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(hf_folder, dtype=torch.float32)
        reference = _outputs(torch, model.eval(), shape)
    return {name: parity.largest_difference(x, reference[name]) for name, x in outputs.items()}


def _oracle() -> tuple[Any, Any]:
    """Imports torch and transformers."""
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{error.name or 'torch'} is not installed, and the comparison needs it. Install it: "
            "pip install 'mpt-jax[parity]'."
        ) from error


def _outputs(torch: Any, model: Any, shape: T5Config) -> dict[str, np.ndarray]:
    """Returns the outputs of transformers' model, in the form that `parity.forward` returns."""
    batch = {name: torch.tensor(x) for name, x in parity.fixed_batch(shape).items()}
    with torch.no_grad():
        result = model(
            input_ids=batch["tokens"].long(),
            attention_mask=batch["mask"].long(),
            decoder_input_ids=batch["decoder_tokens"].long(),
            output_hidden_states=True,
        )
    return {
        "encoder": torch.stack(result.encoder_hidden_states).numpy(),
        "decoder": torch.stack(result.decoder_hidden_states).numpy(),
        "logits": result.logits.numpy(),
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every array
    main()

"""`mpt-jax verify-weights FOLDER`: compares our T5 or CLIP with transformers' on the same weights.

    mpt-jax verify-weights runs/backbones/t5-base
    mpt-jax verify-weights runs/backbones/t5x/checkpoint_0 --config t5_1_1_base

Both networks run in float32 on a fixed batch; transformers' also runs in float64, with the same
float32 weights. The float64 outputs are the reference. The exit code is 0 if our error is at most 4
times that of transformers in float32 (plus float32's rounding error), 1 if it is larger, and 2 if
the comparison cannot be made.

A CLIP that `mpt-jax convert` wrote is also compared with the fingerprint of its features. The exit
code is 1 if they differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from mpt_jax.backbones.t5 import T5Config
from mpt_jax.backbones.t5.hf_config import CONFIG
from mpt_jax.convert import backbones, clip_fingerprint, clip_parity, detect, parity, save_hf
from mpt_jax.convert.clip import load_clip, read_clip_config, save_clip
from mpt_jax.runtime.exits import exit_with
from mpt_jax.runtime.files import is_local, read_json

# Two float32 programs that sum in another order differ by about their own rounding errors, which
# grow with the scale and the depth of a model. An absolute tolerance would fail good large models.
TOLERANCE = 4.0
FLOOR = float(np.finfo(np.float32).eps)  # times the scale: one rounding of the largest value


Outputs = dict[str, np.ndarray]


class Difference(NamedTuple):
    """The largest absolute differences between outputs in float32 and in float64.

    Attributes:
        ours: between our float32 and transformers' float64.
        theirs: between transformers' float32 and its float64.
        between: between our float32 and transformers' float32.
        scale: the largest absolute value of transformers' float64.
    """

    ours: float
    theirs: float
    between: float
    scale: float

    @property
    def passes(self) -> bool:
        """Whether our float32 output is within tolerance of transformers' float64 output.

        False if the float64 output, `ours` or `theirs` is NaN or infinite.
        """
        limit = TOLERANCE * self.theirs + FLOOR * self.scale
        return bool(np.isfinite(limit)) and self.ours <= limit


def main(argv: Sequence[str] | None = None) -> None:
    """Compares both networks, prints the differences, and exits with the code for the result."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax verify-weights",
        description="Compares our network with transformers' on the same weights.",
    )
    parser.add_argument(
        "folder", help="a Hugging Face folder, an open_clip folder or a T5X checkpoint"
    )
    parser.add_argument(
        "--config", help="a name such as t5_1_1_base, or a config.json, if the folder has none"
    )
    args = parser.parse_args(argv)
    try:
        folder = epath.Path(args.folder)
        differences = compare(folder, args.config)
        problem = _other_fingerprint(folder)
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)
    for name, difference in differences.items():
        print(
            f"{name:8} largest difference from float64: ours {difference.ours:.3g}, transformers' "
            f"float32 {difference.theirs:.3g}; from each other: {difference.between:.3g}; largest "
            f"value: {difference.scale:.3g}"
        )
    passed = all(difference.passes for difference in differences.values())
    print(
        f"{'PASS' if passed else 'FAIL'}: ours may be at most {TOLERANCE:g} times as far from "
        "float64 as transformers' float32"
    )
    if problem is not None:
        print(f"FAIL: {problem}")
    sys.exit(0 if passed and problem is None else 1)


def compare(folder: epath.Path, config: str | None) -> dict[str, Difference]:
    """Compares our network with transformers' on the same weights.

    Returns:
        The differences of the hidden states (`encoder`, `decoder`) and of the `logits`; of a CLIP,
        those of the features (`image`, `text`).

    Raises:
        ValueError: torch or transformers is not installed, the weights cannot be read, or Hugging
            Face's T5 does not support the model.
        FileNotFoundError: the folder does not exist or has no weights.
    """
    torch, transformers = _oracle()
    if detect.is_clip(folder):
        if config is not None:
            raise ValueError(
                f"--config is only for a T5, but {folder} holds a CLIP. Remove the option."
            )
        outputs, single, double = _of_clip(torch, transformers, folder)
    else:
        outputs, single, double = _of_t5(torch, transformers, folder, config)
    return {
        name: Difference(
            parity.largest_difference(ours, double[name]),
            parity.largest_difference(single[name], double[name]),
            parity.largest_difference(ours, single[name]),
            float(np.max(np.abs(double[name]))),
        )
        for name, ours in outputs.items()
    }


def _other_fingerprint(folder: epath.Path) -> str | None:
    """Returns what is wrong if a CLIP's features differ from the fingerprint in its folder."""
    if not (folder / clip_fingerprint.FILE).exists() or not detect.is_clip(folder):
        return None
    difference = clip_fingerprint.difference(folder, read_clip_config(folder), load_clip(folder))
    if difference <= clip_fingerprint.TOLERANCE:
        return None
    return (
        f"the features of a fixed batch differ by {difference:.2g} from those in "
        f"{folder / clip_fingerprint.FILE}, and the limit is {clip_fingerprint.TOLERANCE:g}. "
        "Probably the activation or the normalization of images was changed: compare hidden_act or "
        "quick_gelu, and the mean and standard deviation, with those of the source."
    )


def _of_t5(torch: Any, transformers: Any, folder: epath.Path, config: str | None) -> list[Outputs]:
    """Returns the outputs of our T5, and of transformers' in float32 and in float64."""
    shape, params = backbones.read(folder, config)
    ours = parity.forward(shape, params)
    with tempfile.TemporaryDirectory() as scratch:
        # transformers reads the files of a Hugging Face folder, or a folder that is saved here.
        hf_folder = os.path.join(scratch, "hf")
        if config is not None or not is_local(folder) or not (folder / CONFIG).exists():
            save_hf(hf_folder, shape, params)
        else:
            _link(folder, hf_folder)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            hf_folder, dtype=torch.float32, trust_remote_code=False
        )
        # Even so, transformers computes softmax and the layer norms' variances in float32.
        return [ours, *(_outputs(torch, x, shape) for x in _in_both(model))]


def _of_clip(torch: Any, transformers: Any, folder: epath.Path) -> list[Outputs]:
    """Returns the features of our CLIP or ViT, and of transformers' in float32 and in float64."""
    config, params = read_clip_config(folder), load_clip(folder)
    ours = clip_parity.forward(config, params)
    with tempfile.TemporaryDirectory() as scratch:
        hf_folder = os.path.join(scratch, "hf")
        if is_local(folder) and (folder / CONFIG).exists():
            _link(folder, hf_folder)
        else:
            save_clip(hf_folder, params, config)
        name = "ViTModel" if config.text is None else "CLIPModel"
        model = getattr(transformers, name).from_pretrained(hf_folder, dtype=torch.float32)
        theirs = (clip_parity.hugging_face(torch, x, config) for x in _in_both(model))
        return [ours, *theirs]


def _in_both(model: Any) -> Iterator[Any]:
    """Yields a model in float32, then in float64."""
    yield model.eval()
    yield model.double()


def _oracle() -> tuple[Any, Any]:
    """Imports torch and transformers."""
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{error.name or 'torch'} is not installed, and the comparison needs it. Install it: "
            "pip install 'mpt-jax[parity]'."
        ) from error


def _link(folder: epath.Path, target: str) -> None:
    """Creates a folder with the configuration of a Hugging Face folder, except
    `attn_implementation`, and links to its weights.

    If transformers loaded the original folder, it would download and import the code that
    `attn_implementation` in config.json names, for the model or for a tower of it, and load another
    model if the folder has an adapter_config.json.
    """
    os.mkdir(target)
    with open(os.path.join(target, CONFIG), "w", encoding="utf-8") as file:
        json.dump(_without_code(read_json(folder / CONFIG)), file)
    for path in folder.iterdir():
        if path.name.endswith((".safetensors", ".bin", ".index.json")):
            os.symlink(os.path.abspath(path), os.path.join(target, path.name))


def _without_code(value: Any) -> Any:
    """Returns a JSON value without the fields, at any depth, that set the code of attention:
    `attn_implementation`, `_attn_implementation` and `_attn_implementation_internal`."""
    if isinstance(value, dict):
        kept = {name: x for name, x in value.items() if "attn_implementation" not in name}
        return {name: _without_code(x) for name, x in kept.items()}
    return [_without_code(x) for x in value] if isinstance(value, list) else value


def _outputs(torch: Any, model: Any, shape: T5Config) -> dict[str, np.ndarray]:
    """Returns the outputs of transformers' model, in the form that `parity.forward` returns.

    transformers shifts the targets to get the decoder's input, which starts with the start token of
    the configuration. It has no default for that token, so 0 is set if the configuration lacks it.
    """
    if model.config.decoder_start_token_id is None:
        model.config.decoder_start_token_id = 0
    batch = {name: torch.tensor(x) for name, x in parity.fixed_batch(shape).items()}
    with torch.no_grad():
        result = model(
            input_ids=batch["tokens"].long(),
            attention_mask=batch["mask"].long(),
            labels=batch["targets"].long(),
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

"""`mpt-jax convert SOURCE TARGET`: converts backbones and prompts between formats.

    mpt-jax convert runs/backbones/t5-base runs/backbones/t5x --to t5x
    mpt-jax convert gs://bucket/t5_1_1_base/checkpoint_1000000 t5_1_1_base --config t5_1_1_base
    mpt-jax convert runs/backbones/clip-vit-b16 runs/backbones/clip --to open-clip
    mpt-jax convert runs/mpt_source/artifact adapter --to peft
    mpt-jax convert adapter artifact --backbone runs/backbones/t5-base

The output is read back and compared with the source. The target is created only if they agree.
Prints the result of the comparison. If the conversion fails, prints an error and exits with code 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from absl import logging
from etils import epath

from mpt_jax.convert import backbones, clip_backbones, detect, prompts
from mpt_jax.runtime.exits import exit_with


def main(argv: Sequence[str] | None = None) -> None:
    """Converts the source, whose format is detected from its content."""
    parser = _parser()
    args = parser.parse_args(argv)
    source, target = epath.Path(args.source), epath.Path(args.target)
    try:
        source_format = detect.recognize(source)
        clip = source_format in detect.CLIP_FORMATS and detect.is_clip(source)
        formats = detect.CLIP_FORMATS if clip else detect.T5_FORMATS
        usual = detect.OPEN_CLIP if clip and source_format == detect.HF else None
        to = args.to or usual or detect.USUAL_TARGET[source_format]
        if clip and to in formats:
            _reject_options(args, ("config", "backbone", "runs"), "of a T5 or of prompts")
            written = clip_backbones.convert(
                *(source, target, to), dtype=args.dtype, outputs=not args.no_logits
            )
        elif source_format in formats and to in formats:
            _reject_options(args, ("backbone", "runs"), "into an artifact")
            written = backbones.convert(
                *(source, target, to),
                config=args.config,
                dtype=args.dtype,
                logits=not args.no_logits,
            )
        elif to == detect.ARTIFACT:
            _reject_options(args, ("config", "dtype", "no_logits"), "of backbones")
            if not args.backbone:
                raise ValueError(
                    "--backbone is missing, but an artifact must record the backbone of its "
                    "prompts. Set it to a Hugging Face folder or a T5X checkpoint."
                )
            backbone = epath.Path(args.backbone)
            written = prompts.to_artifact(source, target, backbone=backbone, run_names=args.runs)
        elif source_format == detect.ARTIFACT and to in detect.PROMPTS:
            options = ("config", "dtype", "no_logits", "backbone", "runs")
            _reject_options(args, options, "of backbones or into an artifact")
            written = prompts.from_artifact(source, target, to)
        else:
            raise ValueError(
                f"{source} has format {source_format!r} and cannot be converted to {to!r}. Set "
                f"--to to a supported format: {', '.join(formats)} for a backbone; "
                f"{', '.join(detect.PROMPTS[1:])} for an artifact; {detect.ARTIFACT} for other "
                "prompts."
            )
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)
    print(f"{source_format} -> {to}: {written}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-jax convert",
        description="Converts backbones and prompts between formats (docs/checkpoints.md).",
    )
    parser.add_argument("source", help="its format is detected from its content")
    parser.add_argument("target", help="path to create; an existing one is not overwritten")
    parser.add_argument(
        "--to",
        choices=(*detect.BACKBONES, *detect.PROMPTS),
        help="default: hf to t5x or, of a CLIP, to open-clip; t5x and open-clip to hf; an artifact "
        "to peft; prompts to an artifact",
    )
    of_backbones = parser.add_argument_group("backbones")
    of_backbones.add_argument(
        "--config", help="a name such as t5_1_1_base, or a config.json, if the source has none"
    )
    of_backbones.add_argument("--dtype", choices=backbones.DTYPES, help="default: the source's")
    of_backbones.add_argument(
        "--no-logits",
        action="store_true",
        help="compare parameters only, if the model is too large to run on this machine",
    )
    of_prompts = parser.add_argument_group("prompts of other programs")
    of_prompts.add_argument("--backbone", help="the backbone the prompts were trained with")
    of_prompts.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="names of the prompts, in order"
    )
    return parser


def _reject_options(args: argparse.Namespace, names: Sequence[str], users: str) -> None:
    """Raises ValueError if an option is set that this conversion does not use."""
    unused = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if unused:
        raise ValueError(
            f"Only conversions {users} use {', '.join(unused)}. Remove the unused options, or "
            "change --to."
        )


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every array
    main()

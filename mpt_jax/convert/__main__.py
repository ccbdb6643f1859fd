"""`mpt-jax convert SOURCE TARGET`: backbones and prompts from one format into another.

    mpt-jax convert runs/backbones/t5-base runs/backbones/t5x --to t5x
    mpt-jax convert gs://bucket/t5_1_1_base/checkpoint_1000000 t5_1_1_base --config t5_1_1_base
    mpt-jax convert runs/mpt_source/artifact adapter --to peft
    mpt-jax convert adapter artifact --backbone runs/backbones/t5-base

The last line says how what was written compares with what was read; what does not compare is not
left behind. What is wrong is said in a sentence, with exit code 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from absl import logging
from etils import epath

from mpt_jax.convert import backbones, detect, prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the source's format off its content and converts."""
    parser = _parser()
    args = parser.parse_args(argv)
    source, target = epath.Path(args.source), epath.Path(args.target)
    try:
        found = detect.recognize(source)
        to = args.to or detect.USUAL_TARGET[found]
        if found in detect.BACKBONES and to in detect.BACKBONES:
            _refuse(args, ("backbone", "runs"), "prompts")
            made = backbones.convert(
                *(source, target, to),
                config=args.config,
                dtype=args.dtype,
                logits=not args.no_logits,
            )
        elif to == detect.ARTIFACT:
            _refuse(args, ("config", "dtype", "no_logits"), "backbones")
            if not args.backbone:
                raise ValueError(
                    "An artifact records what backbone its prompts belong to: give --backbone, a "
                    "Hugging Face folder or a T5X checkpoint."
                )
            backbone = epath.Path(args.backbone)
            made = prompts.to_artifact(source, target, backbone=backbone, run_names=args.runs)
        elif found == detect.ARTIFACT and to in detect.PROMPTS:
            _refuse(args, ("config", "dtype", "no_logits", "backbone", "runs"), "another direction")
            made = prompts.from_artifact(source, target, to)
        else:
            raise ValueError(
                f"{source} is of format {found!r} and cannot become {to!r}. Backbones go between "
                f"{', '.join(detect.BACKBONES)}; prompts into {detect.ARTIFACT}, and from there "
                f"into {', '.join(detect.PROMPTS[1:])}."
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f"mpt-jax convert: {error}\n")
    print(f"{found} -> {to}: {made}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-jax convert",
        description="Backbones and prompts from one format into another (docs/checkpoints.md).",
    )
    parser.add_argument("source", help="its format is told by what lies there")
    parser.add_argument("target", help="to be made; what exists is not overwritten")
    parser.add_argument(
        "--to",
        choices=(*detect.BACKBONES, *detect.PROMPTS),
        help="default: hf and t5x into each other, an artifact into peft, prompts into an artifact",
    )
    of_backbones = parser.add_argument_group("backbones")
    of_backbones.add_argument(
        "--config", help="a name such as t5_1_1_base, or a config.json, where the source has none"
    )
    of_backbones.add_argument("--dtype", choices=backbones.DTYPES, help="default: the source's")
    of_backbones.add_argument(
        "--no-logits",
        action="store_true",
        help="compare leaves alone, where the model is too large to run here",
    )
    of_prompts = parser.add_argument_group("prompts of other programs")
    of_prompts.add_argument("--backbone", help="what they were trained with")
    of_prompts.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="names of the prompts, in order"
    )
    return parser


def _refuse(args: argparse.Namespace, names: Sequence[str], of: str) -> None:
    """Raises where an option is given that this conversion would not read."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise ValueError(f"{', '.join(given)}: that is for {of}.")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every array
    main()

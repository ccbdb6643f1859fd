"""`mpt-jax export`: writes predict and score for a prompt bank, as files that run with JAX only.

    mpt-jax export --prompts runs/*/artifact --backbone runs/backbones/t5-base --out exported
    mpt-jax export --prompts DIR --folded --platforms cpu,cuda --input-lengths 64 256 --out exported

The folder's README.md explains how to call the functions; docs/serving.md has more. The exit code
is 2 if the export fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from mpt_jax.runtime import compilation_cache
from mpt_jax.runtime.exits import exit_with
from mpt_jax.serving.export.images import write_images
from mpt_jax.serving.export.writing import Settings, check_new, write
from mpt_jax.serving.predict import backbone
from mpt_jax.serving.predict.__main__ import add_model_arguments, load_images
from mpt_jax.serving.predict.image_artifacts import is_of_images
from mpt_jax.serving.prompt_bank import Bank, Named


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder and prints a summary of it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    compilation_cache.enable()
    try:
        settings = Settings(
            tuple(args.platforms.split(",")),
            args.input_lengths,
            args.target_length,
            not args.without_weights,
        )
        check_new(Path(args.out))
        if is_of_images(Named.parse(args.prompts[0]).folder):
            config = write_images(Path(args.out), load_images(args), settings)
            print(
                f"{args.out}: scores of images for {', '.join(config['platforms'])}, "
                f"{len(config['names'])} tasks. Its README.md says how to call them."
            )
            return
        bank = Bank.load([Named.parse(text) for text in args.prompts], args.folded)
        say = lambda text: print(f"mpt-jax export: {text}", file=sys.stderr)  # noqa: E731
        loaded = backbone.load(
            bank,
            args.backbone,
            args.vocabulary,
            extra_ids=args.extra_ids,
            config=args.config,
            dtype=args.dtype,
            digest_backbone=args.backbone_digest,
            say=say,
            warn=say,
        )
        config = write(Path(args.out), bank, loaded, settings)
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)
    print(
        f"{args.out}: predict and score for {', '.join(config['platforms'])}, "
        f"{len(config['names'])} tasks, inputs of {', '.join(config['functions']['predict'])} "
        "tokens. Its README.md says how to call them."
    )


def make_parser() -> argparse.ArgumentParser:
    """Returns the command's argument parser."""
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="mpt-jax export",
        description="Writes predict and score for a prompt bank, as files that run with JAX only.",
        epilog="@FILE reads arguments from a file, one per line.",
        fromfile_prefix_chars="@",
    )
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to create")
    parser.add_argument(
        "--platforms", default=",".join(usual.platforms), help="default: %(default)s"
    )
    parser.add_argument(
        "--input-lengths",
        type=int,
        nargs="+",
        default=list(usual.input_lengths),
        metavar="N",
        help="input lengths in tokens, with functions for each; default: %(default)s",
    )
    parser.add_argument(
        "--target-length", type=int, default=usual.target_length, help="default: %(default)s"
    )
    parser.add_argument(
        "--without-weights", action="store_true", help="do not write the backbone's weights"
    )
    return parser


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every array
    main()

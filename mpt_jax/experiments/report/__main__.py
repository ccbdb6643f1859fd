"""`mpt-jax report DIR`: HTML report of a demo, of a table of the paper, or of one run.

mpt-jax report runs/demo
mpt-jax report runs/mpt_target
mpt-jax report runs/multilane_4 --images 6
mpt-jax report runs/paper/toy/table3 --reference PT --out table3.html
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mpt_jax.experiments import results
from mpt_jax.experiments.report import sections, single_run, tables
from mpt_jax.runtime.exits import exit_with


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report of a folder and prints its path."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax report",
        description="Writes an HTML report of a demo, a paper table or one run.",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help=f"folder with {results.FILE}, or a MODEL_DIR"
    )
    parser.add_argument("--out", type=Path, help=f"output file; default DIR/{sections.FILE}")
    parser.add_argument(
        "--reference",
        default=tables.REFERENCE,
        help="method that the others are subtracted from (%(default)s)",
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=0,
        help="also show the attention of lanes (gin/multilane.gin) on N images of a MODEL_DIR; "
        "reads the backbone and the data that its config.gin names",
    )
    args = parser.parse_args(argv)
    try:
        if args.images and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # of modules that register the user's tasks
        if not (args.folder / results.FILE).exists() and single_run.is_run(args.folder):
            out = args.out or args.folder / sections.FILE
            print(single_run.write(args.folder, out, args.images))
            return
        if args.images:
            raise ValueError(
                f"--images shows the lanes of one run, but {args.folder} is no MODEL_DIR of a job. "
                "Pass a MODEL_DIR, or omit --images."
            )
        loaded, majority = load(args.folder), results.load_majority(args.folder)
        print(sections.write(args.folder, loaded, args.out, args.reference, majority))
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)


def load(folder: Path) -> list[results.Result]:
    """Reads the results of a folder.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: results.json is damaged or was written by another version.
    """
    try:
        return results.load(folder)
    except ValueError as error:
        raise ValueError(
            f"{error} If it was written by another version, rewrite it with `mpt-jax paper TABLE "
            "--collect`, or rerun `mpt-jax demo`."
        ) from error


if __name__ == "__main__":
    main()

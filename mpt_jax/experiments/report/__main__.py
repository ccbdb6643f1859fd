"""`mpt-jax report DIR`: HTML report of a demo, of a table of the paper, or of one run.

mpt-jax report runs/demo
mpt-jax report runs/mpt_target
mpt-jax report runs/paper/toy/table3 --reference PT --out table3.html
"""

from __future__ import annotations

import argparse
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
    args = parser.parse_args(argv)
    try:
        if not (args.folder / results.FILE).exists() and single_run.is_run(args.folder):
            print(single_run.write(args.folder, args.out or args.folder / sections.FILE))
            return
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

"""`mpt-jax report DIR`: the page of a folder that `mpt-jax demo` or `mpt-jax paper` left.

mpt-jax report runs/demo
mpt-jax report runs/paper/toy/table3 --reference PT --out table3.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpt_jax.experiments import results
from mpt_jax.experiments.report import sections, tables


def main(argv: Sequence[str] | None = None) -> None:
    """Reads results and what their runs left, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax report", description="One HTML page of what a demo or a paper table left."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help=f"holds {results.FILE}")
    parser.add_argument("--out", type=Path, help=f"the page; default DIR/{sections.FILE}")
    parser.add_argument(
        "--reference",
        default=tables.REFERENCE,
        help="the others are subtracted from it (%(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        found, majority = load(args.folder), results.load_majority(args.folder)
        print(sections.write(args.folder, found, args.out, args.reference, majority))
    except (ValueError, OSError) as error:
        parser.exit(2, f"mpt-jax report: {error}\n")


def load(folder: Path) -> list[results.Result]:
    """The results of a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not what this version writes.
    """
    try:
        return results.load(folder)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / results.FILE} cannot be read ({type(error).__name__}: {error}); it is "
            "damaged or of another version, so run the demo or `mpt-jax paper --collect` again."
        ) from error


if __name__ == "__main__":
    main()

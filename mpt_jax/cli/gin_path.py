"""`mpt-jax gin-path`: prints the folder that contains `gin/`, for T5X's --gin_search_paths.

    python -m t5x.train --gin_search_paths=$(mpt-jax gin-path) --gin_file=gin/mpt_source.gin ...

T5X searches only the working directory and its own clone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpt_jax.config import trainer_choice


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the folder that contains `gin/`."""
    description = "Prints the folder of the shipped gin files, for --gin_search_paths."
    argparse.ArgumentParser(prog="mpt-jax gin-path", description=description).parse_args(argv)
    print(trainer_choice.gin_folder())


if __name__ == "__main__":
    main()

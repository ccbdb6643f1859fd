"""The demo on images: MVLPT's two stages on the small image world, with baselines, in minutes.

    mpt-jax demo --vision

It runs rows of the table `mvlpt` of `mpt-jax paper`, with fewer seeds and target tasks.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from mpt_jax.experiments import results
from mpt_jax.experiments.paper import __main__ as paper
from mpt_jax.experiments.paper import format, image_suites, image_variants, tables
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.report import sections

VARIANTS = (
    image_variants.ZERO_SHOT,
    image_variants.COOP_VARIANT,
    image_variants.VPT_VARIANT,
    image_variants.MVPT,
)
TARGETS = ("toy_compound", "toy_digits", "toy_many", "toy_outline")
SEEDS, SHOTS = 3, 5


def table() -> Table:
    """Returns the table that the demo runs."""
    whole = tables.get_table("mvlpt").on(image_suites.TOY_IMAGES)
    return dataclasses.replace(
        whole,
        title="MVLPT on the small image world, 5 images of each class",
        variants=VARIANTS,
        groups={"mean": TARGETS},
        shots=(SHOTS,),
        seeds=SEEDS,
    )


def run(root: Path) -> None:
    """Runs the demo, prints its table, and writes its report and results.json."""
    started = time.monotonic()
    suite, chosen = image_suites.TOY_IMAGES, table()
    cells = paper.cells_of(chosen, suite, root)
    paper.run(root, cells)
    found = paper.collect(root, cells, suite)
    seconds = time.monotonic() - started
    print(f"\n{format.text(chosen, suite, found, {})}\n")
    print(f"Everything took {seconds:.0f} s. Artifacts and predictions: {root}")
    rows = list(found.values())
    print(f"Report: {sections.write(root, rows, reference=format.reference(chosen))}")
    results.save(root, rows, {})

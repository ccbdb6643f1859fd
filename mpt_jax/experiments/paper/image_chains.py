"""Source stages on images, which train all draws at once, and what target runs start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mpt_jax.evaluation.finalize import ARTIFACT
from mpt_jax.experiments.paper.image_variants import source_row
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.paper.variants import Source, Variant
from mpt_jax.experiments.stages import Run, Stage, quoted


def chain(source: Source, suite: Suite, table: Table, root: Path) -> Iterator[Stage]:
    """Yields the source stage of a table, preceded by the stage that trains its teachers. Each
    trains all draws that the runs of the table start from."""
    seeds = sorted({draw for seed in range(table.seeds) for draw in draws(source, table, seed)})
    tasks = source_tasks(source, suite, table)
    bindings = [
        *source.bindings,
        f"SOURCE_TASKS = {quoted(tasks)}",
        f"SEEDS = {quoted(seeds)}",
    ]
    if source.teachers is not None:
        *_, teachers = stages = list(chain(source.teachers, suite, table, root))
        yield from stages
        bindings.append(f"TEACHERS = {quoted(str(root / teachers.name / ARTIFACT))}")
    of_table = f"_{table.name}" if source.of_targets else ""
    name = f"{source.name}{of_table}_s{seeds[0]}-{seeds[-1]}"
    files = (*source.files, *suite.files, *suite.source_files)
    yield Stage(name, files, tuple(bindings), steps=suite.source_steps)


def source_tasks(source: Source, suite: Suite, table: Table) -> list[str]:
    """Returns the tasks that a source stage trains on."""
    if source.of_targets:
        return [suite.tasks[name] for name in table.tasks]
    return list(suite.sources.values())


def draws(source: Source, table: Table, seed: int) -> range:
    """Returns the draws of a source stage that the runs of a seed start from: distinct draws for
    each seed, or the same draws for all seeds."""
    first = seed * source.draws if table.source_per_seed else 0
    return range(first + 1, first + source.draws + 1)


def start_from(variant: Variant, suite: Suite, table: Table, runs: Sequence[Run]) -> list[str]:
    """Returns the binding of the rows that each run starts from, of which it takes the mean."""
    source = variant.source
    assert source is not None
    if not table.source_per_seed and variant.start is None and variant.draw is None:
        return []  # the mean of all rows
    start = suite.start_of(variant)
    tasks = source_tasks(source, suite, table) if start is None else [start]

    def rows(seed: int) -> dict[str, float]:
        of_seed = draws(source, table, seed)
        chosen = of_seed if variant.draw is None else of_seed[variant.draw - 1 : variant.draw]
        return {source_row(task, draw): 1.0 for draw in chosen for task in tasks}

    return [f"START_FROM = {quoted({run.name: rows(run.seed) for run in runs})}"]

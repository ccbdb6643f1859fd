"""`mpt-jax paper TABLE`: runs or resumes the stages of a table, and prints the table.

The tables are those of the MPT paper, our own (starts, transfer, crosspt*), and those on images
(mvlpt*, clip_mpt, multilane, base_to_new).

    mpt-jax paper table1 --suite toy        runs the toy suite with the tiny T5
    mpt-jax paper table1 --print            prints commands for a scheduler, in order
    mpt-jax paper table1 --collect          prints the table of finished stages
    mpt-jax paper crosspt --suite toy --collect --against MPT --metric rank_accuracy
                                            shows another metric, and differences to another row

Each stage has a separate MODEL_DIR below the root. Finished stages are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from absl import logging

from mpt_jax.config import gin_utils
from mpt_jax.core import schema
from mpt_jax.core.old_names import current_text
from mpt_jax.core.runs import look_up
from mpt_jax.data.task_lookup import find_task
from mpt_jax.evaluation import evaluator
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import (
    chains,
    footnotes,
    format,
    published,
    sequence_chains,
    suites,
    tables,
)
from mpt_jax.experiments.paper.chains import Cell
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.stages import Stage
from mpt_jax.runtime import compilation_cache, paths
from mpt_jax.runtime.exits import exit_with
from mpt_jax.runtime.files import write_atomic
from mpt_jax.tasks import few_shot

PLAN = "stages.json"
# The schema of stages.json: stage -> gin files, bindings, steps.
Plan = dict[str, Annotated[list[Any], msgspec.Meta(min_length=3, max_length=3)]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the unfinished stages of a table, and prints the table. With --print, prints the
    stages' commands instead; with --collect, runs no stages."""
    args = _parser().parse_args(argv)
    try:
        table = tables.get_table(args.table)
        suite = table.suites[args.suite]
        suite = suite.with_digits() if args.labels == "digits" else suite
        whole = table.on(suite)
        whole = conditioned(whole, suite, args)
        root = Path(args.root or os.path.join(paths.root(), "paper", suite.name)).absolute()
        if args.against is not None:
            (reference,) = chosen(whole, [args.against]).variants
            whole = dataclasses.replace(whole, reference=reference.name)
        table = chosen(whole, args.variants)
        planned = cells_of(table, suite, root)
        if args.print:
            check_plan(root, planned)
            print("\n".join(stage.command(root) for stage in pending(planned, root)))
            return
        if not args.collect:
            run(root, planned)
        # A report shows everything that was run, even if only some rows were requested now.
        finished = collect(root, cells_of(whole, suite, root), suite)
        repeated = f"_repeats{table.repeats}" if table.repeats > 1 else ""
        folder = root / f"{table.name}{chains.condition(table)}{repeated}"
        folder.mkdir(parents=True, exist_ok=True)
        shares = majority_shares(whole, suite)
        known_shares = {suite.tasks[name]: shares[name] for name in shares if name in suite.tasks}
        results.save(folder, list(finished.values()), known_shares)
        if args.metric is not None:
            finished = {cell: results.by_metric(finished[cell], args.metric) for cell in finished}
        print(format.text(table, suite, finished, shares))
        names = {variant.name for variant in table.variants}
        shown = {key: finished[key] for key in finished if key[0] in names}
        print(footnotes.text(table, suite, shown, planned, root))
    except (ValueError, OSError) as error:
        exit_with("mpt-jax paper", error, gin_utils.message(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-jax paper",
        description="Runs a table of a paper, or one of our own, and compares our results with the "
        "published figures, if any.",
        epilog="Tables: " + "; ".join(f"{t.name}, {t.title}" for t in tables.TABLES.values()),
    )
    parser.add_argument("table", help="which table")
    parser.add_argument("--suite", choices=list(suites.SUITES), default="paper")
    parser.add_argument(
        "--labels",
        choices=["words", "digits"],
        default="words",
        help="labels as T5's words (%(default)s) or as digits, like the paper",
    )
    parser.add_argument("--seeds", type=positive_int, help="number of draws; default the table's")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=1,
        help="number of random seeds per draw; the spread over them is a separate table",
    )
    parser.add_argument(
        "--balanced", action="store_true", help="draw k // labels examples of each label"
    )
    parser.add_argument(
        "--few-dev", action="store_true", help="validate on as many examples as training, k"
    )
    parser.add_argument("--variants", "--arms", nargs="+", help="only these rows, by name")
    parser.add_argument("--against", metavar="VARIANT", help="the row to subtract others from")
    parser.add_argument("--metric", help="metric to show; default each task's main metric")
    parser.add_argument("--root", help="folder of the stages; default MPT_JAX_ROOT/paper/SUITE")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print unfinished stages' commands")
    what.add_argument("--collect", action="store_true", help="show finished results only")
    return parser


def conditioned(table: Table, suite: Suite, args: argparse.Namespace) -> Table:
    """Returns the table with the number of seeds and the draws that the arguments set.

    Raises:
        ValueError: an argument would have no effect.
    """
    few = any(shots is not None for shots in table.shots)
    for flag, is_set in (("--balanced", args.balanced), ("--few-dev", args.few_dev)):
        if is_set and not few:
            raise ValueError(
                f"{flag} would have no effect: table {table.name!r} trains on all examples. Drop "
                "it, or choose a few-shot table such as table3."
            )
    if args.few_dev and not suite.tested_apart:
        raise ValueError(
            f"--few-dev would have no effect: the {suite.name} suite does not select steps by the "
            "validation split. Drop it, or use --suite paper."
        )
    if args.balanced and args.few_dev:
        raise ValueError(
            "--balanced and --few-dev cannot be combined: a small validation split, such as CB's, "
            "has too few examples of a label. Drop one of them."
        )
    if args.repeats > 1 and table.of_sequences:
        raise ValueError(
            f"--repeats would have no effect: the seeds of table {table.name!r} are repetitions "
            "already. Drop it, or raise --seeds."
        )
    suite.register()
    tasks = [] if table.of_sequences else [find_task(suite.tasks[name]) for name in table.tasks]
    if args.balanced and not any(evaluator.labels_of(task) for task in tasks):
        raise ValueError(
            f"--balanced would have no effect: no task of table {table.name!r} has labels. Drop it."
        )
    draws = dataclasses.replace(table.draws, balanced=args.balanced, few_dev=args.few_dev)
    seeds = args.seeds or table.seeds
    return dataclasses.replace(table, seeds=seeds, repeats=args.repeats, draws=draws)


def positive_int(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def chosen(table: Table, names: Sequence[str] | None) -> Table:
    """Returns the table with only the named variants, or with all of them if `names` is None.

    Raises:
        ValueError: the table has no such variant.
    """
    if names is None:
        return table
    known = {variant.name: variant for variant in table.variants}
    variants = tuple(look_up(f"{table.name} variant", name, known) for name in names)
    return dataclasses.replace(table, variants=variants)


def cells_of(table: Table, suite: Suite, root: Path) -> Sequence[Cell]:
    """Returns the cells of a table that was adapted to `suite`; stages are below `root`."""
    made_by = sequence_chains if table.of_sequences else chains
    return made_by.cells(table, suite, root)


def unique(cells: Sequence[Cell]) -> list[Stage]:
    """Returns every stage once, in an order in which they can be run."""
    return list({stage.name: stage for cell in cells for stage in cell.stages}.values())


def pending(cells: Sequence[Cell], root: Path) -> list[Stage]:
    """Returns the stages that are not finished."""
    return [stage for stage in unique(cells) if not stage.is_done(root)]


def check_plan(root: Path, cells: Sequence[Cell]) -> None:
    """Records the gin files, bindings and steps of every stage in stages.json.

    Raises:
        ValueError: the folder of a stage was written with other gin files, bindings or steps.
    """
    path = root / PLAN
    known: dict[str, list[Any]] = {}
    if path.exists():
        known = schema.load(current_text(path.read_text()), Plan, f"{path}")
    for stage in unique(cells):
        settings = [list(stage.files), list(stage.bindings), stage.steps]
        if (root / stage.name).exists() and known.get(stage.name, settings) != settings:
            raise ValueError(
                f"{root / stage.name} was written with other settings: "
                f"{_differences(known[stage.name], settings)}. Choose another --root, or rename "
                "the folder to run the stage again."
            )
        known[stage.name] = settings
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(known, indent=1) + "\n")


def _differences(before: Sequence[Any], now: Sequence[Any]) -> str:
    """Returns the gin files, bindings and steps that differ between two plans of a stage, without
    the files and bindings that both have."""
    parts = []
    for name, old, new in zip(("gin files", "bindings", "steps"), before, now, strict=False):
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list) and sorted(old) != sorted(new):
            old, new = [x for x in old if x not in new], [x for x in new if x not in old]
        was, now_is = (
            ", ".join(map(str, x)) or "none" if isinstance(x, list) else x for x in (old, new)
        )
        parts.append(f"{name} {was} instead of {now_is}")
    return "; ".join(parts)


def run(root: Path, cells: Sequence[Cell]) -> None:
    """Runs the unfinished stages one after another in this process."""
    check_plan(root, cells)
    left = pending(cells, root)
    if not left:
        return
    gin_utils.log_progress()
    compilation_cache.enable()
    for number, stage in enumerate(left, 1):
        logging.info("Running stage %d of %d.", number, len(left))
        stage.run(root)


def collect(root: Path, cells: Sequence[Cell], suite: Suite) -> format.Found:
    """Returns the results of the finished cells."""
    return {
        (cell.variant.name, cell.shots): cell.collect(root, suite)
        for cell in cells
        if all(stage.is_done(root) for stage in (*cell.jobs, *cell.tests))
    }


def majority_shares(table: Table, suite: Suite) -> dict[str, float]:
    """Returns the majority-class share of each task's test split, in percent, for tasks with a
    known share. Shares are counted if the data are on this machine, and otherwise taken from
    published.toml."""
    shares = {} if suite.is_toy else dict(published.majority())
    for name in table.tasks if not table.of_sequences else ():
        task = find_task(suite.tasks[name])
        if not evaluator.labels_of(task):
            continue
        try:
            rows = few_shot.text_rows(task, task.source.get_dataset("test", shuffle=False))
            targets = [row["targets"] for row in rows.as_numpy_iterator()]
        except FileNotFoundError:  # the data are not on this machine
            continue
        shares[name] = results.majority_share(targets)
    return shares


if __name__ == "__main__":
    main()

"""What a reader needs to judge a table: missing cells, sampling error of small test splits, draws
that lack a label, spread over random seeds, and costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from scipy import stats

from mpt_jax.data.task_lookup import find_task
from mpt_jax.evaluation import evaluator
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import format
from mpt_jax.experiments.paper.chains import Cell
from mpt_jax.experiments.paper.format import Found
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.report.analysis import examples
from mpt_jax.experiments.report.tables import as_text
from mpt_jax.tasks import few_shot

SMALL = 500  # test examples; the binomial interval of 80% is then 7 points wide
COSTS = (
    "trained: trainable parameters; stored: the method's parameters in the artifact, or without a "
    "prompt the trainable ones; operations: matrix products of the training steps at the maximum "
    "lengths, 2 for a multiply-add; hours: training steps on the machine that ran them, source "
    "stages in total"
)
Rows = list[list[str]]


def text(table: Table, suite: Suite, found: Found, cells: Sequence[Cell], root: Path) -> str:
    """Returns the notes that apply to a table, each with a heading.

    Args:
        table: The table, adapted to the suite.
        suite: The suite that the table was run on.
        found: The finished results.
        cells: The cells of the table.
        root: The folder of the stages.
    """
    tables = (
        (f"Sampling error of {format.reference(table)} on small test splits", sampling_rows),
        ("Standard deviation over random seeds on the same examples", repeat_rows),
        (f"Costs of a run ({COSTS})", cost_rows),
    )
    with_rows = ((title, rows(table, suite, found)) for title, rows in tables)
    notes = [f"\n{title}\n{as_text(rows)}" for title, rows in with_rows if len(rows) > 1]
    notes += ["", *missing_labels(table, suite), *missing_cells(cells, root)]
    return "\n".join(notes).rstrip()


def sampling_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """Returns a table of the 95% binomial (Clopper-Pearson) interval of the reference's accuracy on
    tasks with fewer than `SMALL` test examples. Seeds share these examples, so the interval comes
    in addition to the spread over seeds."""
    rows = [["", "examples", "test examples", "accuracy", "95% interval"]]
    tasks = () if table.of_sequences else table.tasks
    for shots, name in itertools.product(table.shots, tasks):
        result, task = found.get((format.reference(table), shots)), suite.tasks[name]
        if result is None:
            continue
        count = find_task(task).num_input_examples("test")
        if count is None or count >= SMALL:
            continue
        if results.main_metric(result.scores[task]) != "accuracy":
            continue
        mean = results.estimate(result.values(task)).mean
        low, high = binomial_interval(mean / 100, count)
        cells = [f"{count:,}", f"{mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        rows.append([name, examples(shots), *cells])
    return rows


def binomial_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95% Clopper-Pearson interval of a share of `count` examples; the number of right
    answers is rounded."""
    right = round(share * count)
    low = stats.beta.ppf(0.025, right, count - right + 1) if right else 0.0
    high = stats.beta.ppf(0.975, right + 1, count - right) if right < count else 1.0
    return float(low), float(high)


def repeat_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """Returns a table of the spread over random seeds, for runs that were repeated with several.
    The standard deviations of the scores are over draws, each the mean of its repeats."""
    rows = [["", "examples", *table.tasks]]
    for (variant, shots), result in found.items():
        if any(result.repeat_stds.values()):
            tasks = [suite.tasks[name] for name in table.tasks]
            main = [results.main_metric(result.scores[task]) for task in tasks]
            found_stds = [result.repeat_stds[t].get(m) for t, m in zip(tasks, main, strict=True)]
            shown = ["" if std is None else f"{std:.1f}" for std in found_stds]
            rows.append([variant, examples(shots), *shown])
    return rows


def cost_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """Returns a table of trainable and stored parameters, operations and hours per run."""
    untrained = {suite.tasks[name] for name in table.held_out}
    rows = [
        ["", "examples", "trained", "stored", "operations", "hours", "source hours", "backbone"]
    ]
    for (variant, shots), result in found.items():
        runs = len(set(result.scores) - untrained) * len(result.seeds) * table.repeats
        operations = f"{result.operations / runs:.2g}" if result.operations else ""
        source = "" if result.source_seconds is None else f"{result.source_seconds / 3600:.2g}"
        sizes = [f"{number:,.0f}" for number in (result.parameters, result.stored)]
        hours = f"{result.seconds / runs / 3600:.2g}"
        cells = [*sizes, operations, hours, source, result.backbone]
        rows.append([variant, examples(shots), *cells])
    return rows


def missing_labels(table: Table, suite: Suite) -> list[str]:
    """Returns a line for each number of examples at which draws of a task lack a label, if the data
    are on this machine. Draws that are balanced, or of each class, lack none."""
    few = [shots for shots in table.shots if shots is not None]
    if not few or table.draws.balanced or table.draws.per_class:
        return []
    counts = {name: _draws_without_a_label(suite.tasks[name], few, table) for name in table.tasks}
    lines = []
    for number, shots in enumerate(few):
        lacking = {name: of_task[number] for name, of_task in counts.items()}
        shown = [f"{n} of {table.seeds} of {name}" for name, n in lacking.items() if n]
        if shown:
            lines.append(f"Draws that lack a label at k = {shots}: {', '.join(shown)}.")
    return lines


def _draws_without_a_label(name: str, few: Sequence[int], table: Table) -> list[int]:
    """Returns the number of draws that lack a label of the task, for each number of examples."""
    labels = evaluator.labels_of(find_task(name))
    if not labels:
        return [0] * len(few)
    runs = [[table.draws.run_name(name, k, seed) for seed in range(table.seeds)] for k in few]
    try:
        targets = few_shot.drawn_targets([run for of_k in runs for run in of_k])
    except FileNotFoundError:  # the data are not on this machine
        return [0] * len(few)
    return [sum(len(set(targets[run])) < len(labels) for run in of_k) for of_k in runs]


def missing_cells(cells: Sequence[Cell], root: Path) -> Iterator[str]:
    """Yields a line for each cell with unfinished stages, which the table shows as 'not run'."""
    for cell in cells:
        stages = (*cell.jobs, *cell.tests)
        left = [stage.name for stage in stages if not stage.is_done(root)]
        if left:
            yield (
                f"Not run: {cell.variant.name}, {examples(cell.shots)}: {len(left)} of "
                f"{len(stages)} stages are not finished, the first is {left[0]}."
            )

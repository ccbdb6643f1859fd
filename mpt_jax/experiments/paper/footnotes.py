"""What a reader needs to judge a table: missing cells, sampling error of small test splits, draws
that lack a label, spread over random seeds, and costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import seqio
from scipy import stats

from mpt_jax.data import task_lookup
from mpt_jax.evaluation import evaluator
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import format
from mpt_jax.experiments.paper.chains import Cell
from mpt_jax.experiments.paper.format import Found
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.tables import Table
from mpt_jax.experiments.report.tables import as_text
from mpt_jax.tasks import few_shot

SMALL = 500  # test examples; the binomial interval of 80% is then 7 points wide
COSTS = (
    "trained: trainable parameters; stored: parameters in the artifact; operations: matrix "
    "products of the training steps at the maximum lengths, 2 for a multiply-add; hours: training "
    "steps on the machine that ran them, source stages in total"
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
        (f"Sampling error of small test splits, {format.reference(table)}", sampling_rows),
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
    for shots, name in itertools.product(table.shots, table.tasks):
        result, task = found.get((format.reference(table), shots)), suite.tasks[name]
        count = seqio.TaskRegistry.get(task).num_input_examples("test")
        if result is None or count is None or count >= SMALL:
            continue
        if results.main_metric(result.scores[task]) != "accuracy":
            continue
        mean = results.estimate(result.values(task)).mean
        low, high = binomial_interval(mean / 100, count)
        cells = [f"{count:,}", f"{mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        rows.append([name, format.examples(shots), *cells])
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
        if result.repeat_stds:
            stds = [result.repeat_stds.get(suite.tasks[name]) for name in table.tasks]
            shown = ["" if std is None else f"{std:.1f}" for std in stds]
            rows.append([variant, format.examples(shots), *shown])
    return rows


def cost_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """Returns a table of trainable and stored parameters, operations and hours per run."""
    del suite
    rows = [
        ["", "examples", "trained", "stored", "operations", "hours", "source hours", "backbone"]
    ]
    for (variant, shots), result in found.items():
        runs = len(result.scores) * len(result.seeds) * table.repeats
        operations = f"{result.operations / runs:.2g}" if result.operations else ""
        hours = [
            f"{seconds / 3600:.2g}" for seconds in (result.seconds / runs, result.source_seconds)
        ]
        sizes = [f"{number:,.0f}" for number in (result.parameters, result.stored)]
        rows.append([variant, format.examples(shots), *sizes, operations, *hours, result.backbone])
    return rows


def missing_labels(table: Table, suite: Suite) -> list[str]:
    """Returns a line for each number of examples at which draws of a task lack a label, if the data
    are on this machine. Balanced draws lack none."""
    few = [shots for shots in table.shots if shots is not None]
    if not few or table.draws.balanced:
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
    task = seqio.TaskRegistry.get(name)
    if not (labels := evaluator.labels_of(task)):
        return [0] * len(few)
    rows = few_shot.FewShotSource(task, few_shot.Draw(name, few[0], 0))
    try:
        of_row = rows.row_labels("train", labels)
    except FileNotFoundError:  # the data are not on this machine
        return [0] * len(few)
    counts = []
    for shots in few:
        runs = [table.draws.run_name(name, shots, seed) for seed in range(table.seeds)]
        sources: list[Any] = [task_lookup.find_task(run).source for run in runs]
        drawn = [of_row[source.few_shot_indices("train")] for source in sources]
        counts.append(sum(len(set(each.tolist())) < len(labels) for each in drawn))
    return counts


def missing_cells(cells: Sequence[Cell], root: Path) -> Iterator[str]:
    """Yields a line for each cell with unfinished stages, which the table shows as 'not run'."""
    for cell in cells:
        stages = (*cell.jobs, *cell.tests)
        left = [stage.name for stage in stages if not stage.is_done(root)]
        if left:
            yield (
                f"Not run: {cell.variant.name}, {format.examples(cell.shots)}: {len(left)} of "
                f"{len(stages)} stages are not finished, the first is {left[0]}."
            )

"""Text tables of our results beside the paper's figures, and of the differences of variants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from mpt_jax.experiments import results
from mpt_jax.experiments.paper import published, suites
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.report.analysis import examples
from mpt_jax.experiments.report.tables import as_text
from mpt_jax.experiments.results import Result

Found = Mapping[tuple[str, int | None], Result]  # (variant, shots) -> result
NOT_RUN = "not run"
HARMONIC = "harmonic mean"
LEGEND = (
    "mean ± standard deviation over n seeds; [..]: 95% interval of the average, over seeds; "
    "=: the accuracy of the majority class; 0*: undefined for at least one seed (a constant "
    "prediction), which counts as 0"
)
PAPER_LEGEND = (
    "†: not run by the paper's authors, as we remember it, but taken from the named paper. "
    "Published figures are of T5 1.0, which was trained on most of these tasks before."
)
Rows = list[list[str]]


def text(table: Table, suite: Suite, found: Found, shares: Mapping[str, float]) -> str:
    """Returns the table as text.

    Args:
        table: The table, adapted to the suite.
        suite: The suite that the table was run on.
        found: The finished results. All other cells are shown as 'not run'.
        shares: The paper's name of a task -> majority-class share of its test split in percent.
    """
    parts = [f"{table.title} ({suite.name} suite)"]
    for shots in table.shots:
        parts.append(
            f"\n{examples(shots)}\n{as_text(score_rows(table, suite, found, shots, shares))}"
        )
    parts.append(LEGEND)
    backbones = sorted({result.backbone for result in found.values() if result.backbone})
    if backbones:
        parts.append(f"Ours: {', '.join(backbones)}.")
    if suite.name == suites.PAPER.name:
        parts.append("Our labels are words; --labels digits uses digits, like the paper.")
    if suite.is_toy:
        differences = sign_rows(table, suite, found)
        parts.append(
            f"\n{reference(table)} minus each variant, paired by seed\n{as_text(differences)}"
        )
    elif suite.name.startswith(suites.PAPER.name):
        parts.append(PAPER_LEGEND)
    return "\n".join(parts)


def score_rows(
    table: Table, suite: Suite, found: Found, shots: int | None, shares: Mapping[str, float]
) -> Rows:
    """Returns a header and one row per variant. On the paper's suite, each variant is followed by
    its published rows, and published rows without a counterpart come first."""
    heads = ["", *table.columns, *_average_names(table), "95% interval", "n"]
    rows = [heads]
    published_rows = [] if suite.is_toy else published.rows(table.name)
    known = published.majority()
    rows += [_published(table, row, shots, known) for row in published_rows if row.of is None]
    for variant in table.variants:
        result = found.get((variant.name, shots))
        name = f"{variant.name} (ours)" if published_rows else variant.name
        rows.append([name, *_ours(table, suite, result, shares)])
        rows += [
            _published(table, row, shots, known) for row in published_rows if row.of == variant.name
        ]
    return rows


def _average_names(table: Table) -> tuple[str, ...]:
    return (*table.averages, *((HARMONIC,) if table.harmonic else ()))


def _ours(
    table: Table, suite: Suite, result: Result | None, shares: Mapping[str, float]
) -> list[str]:
    if result is None:
        return [NOT_RUN] * (len(table.columns) + len(_average_names(table))) + ["", ""]
    cells = []
    for column in table.columns:
        name, _, metric = column.partition(" ")
        scores = result.scores[suite.tasks[name]]
        metric = metric or results.main_metric(scores)
        estimate = results.estimate(scores[metric])
        share = shares.get(column) if metric == "accuracy" else None
        undefined = any(scores.get(f"{metric}_undefined", ()))
        cells.append(
            _with_std(estimate) + _mark(estimate.mean, share) + (" 0*" if undefined else "")
        )
    means = [
        result.means([suite.tasks[name] for name in names]) for names in table.averages.values()
    ]
    if table.harmonic:
        means.append(stats.hmean(means, axis=0).tolist())
    averages = [results.estimate(values) for values in means]
    intervals = [f"[{a.low:.1f}, {a.high:.1f}]" if a.n > 1 else "" for a in averages]
    cells += [_with_std(average) for average in averages]
    return [*cells, " ".join(intervals).strip(), str(len(result.seeds))]


def _published(
    table: Table, row: published.Row, shots: int | None, shares: Mapping[str, float]
) -> list[str]:
    values = row.values.get(shots, {})
    cells = []
    for name in (*table.columns, *_average_names(table)):
        value = values.get(name)
        std = f" ± {row.stds[name]:.1f}" if name in row.stds else ""
        shown = value is not None
        cells.append(f"{value:.1f}{std}{_mark(value, shares.get(name))}" if shown else "")
    return [f"{row.name} ({row.source})", *cells, "", ""]


def reference(table: Table) -> str:
    """Returns the variant that the other variants are subtracted from.

    It is `table.reference` if set, otherwise MPT, or the first variant of a table without MPT.
    """
    names = [variant.name for variant in table.variants]
    return table.reference or ("MPT" if "MPT" in names else names[0])


def sign_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """Returns a table of the reference minus each other variant, with the sign of the difference in
    the paper, and whether our difference has the same sign.

    Pairs are seeds: a pair is the mean over the tasks of a group. The p-values are those of paired
    t-tests, corrected for the number of rows (`results.holm`). The interval over tasks has tasks as
    units, each the mean over seeds.
    """
    head = ["", "examples", "average", "ours", "95% interval", "n", "p, Holm"]
    head += ["over tasks", "tasks", "paper's sign", "ours is"]
    rows: Rows = []
    differences, of_tasks, of_paper = [], [], []
    for shots in table.shots:
        ours = found.get((reference(table), shots))
        for variant in table.variants:
            result = found.get((variant.name, shots))
            if ours is None or result is None or result is ours:
                continue
            for group, names in table.groups.items():
                tasks = [suite.tasks[name] for name in names]
                differences.append(results.paired(ours, result, tasks))
                of_tasks.append(results.estimate(results.paired_by_task(ours, result, tasks)))
                of_paper.append(_published_difference(table, variant.name, shots, group))
                rows.append([variant.name, examples(shots), group])
    corrected = results.holm([results.p_value(values) for values in differences])
    columns = zip(rows, differences, corrected, of_tasks, of_paper, strict=True)
    for row, values, p, over_tasks, paper in columns:
        difference = results.estimate(values)
        row += [f"{difference.mean:+.1f}", _interval(difference), str(difference.n)]
        row += ["" if np.isnan(p) else f"{p:.3f}", _interval(over_tasks), str(over_tasks.n)]
        row += _verdict(difference.mean, p, paper)
    return [head, *rows]


def _interval(found: results.Estimate) -> str:
    return "" if found.n == 1 else f"[{found.low:+.1f}, {found.high:+.1f}]"


def _verdict(mean: float, p: float, paper_difference: float | None) -> list[str]:
    """Returns the sign of the paper's difference, and whether our difference has the same sign:
    'undecided' if its corrected p-value is 0.05 or more, or unknown. Both are '' if the paper has
    none."""
    if paper_difference is None:
        return ["", ""]
    sign = "+" if paper_difference > 0 else "-" if paper_difference < 0 else "0"
    if not p < 0.05:
        return [sign, "undecided"]
    return [sign, "the same" if np.sign(mean) == np.sign(paper_difference) else "the opposite"]


def _published_difference(
    table: Table, variant: str, shots: int | None, group: str
) -> float | None:
    """Returns the difference in the paper between the reference and a variant.

    It is the difference of the means over the tasks of the group. If figures of some tasks are not
    published, the published average of the group or the only published figure is used. Returns
    None if neither is published.
    """
    by_variant = {row.of: row.values for row in published.rows(table.name) if row.of}
    values = []
    for name in (reference(table), variant):
        by_shots = by_variant.get(name, {})
        figures = by_shots.get(shots, by_shots.get(None, {}))
        on_same_tasks = [figures[task] for task in table.groups[group] if task in figures]
        if len(on_same_tasks) == len(table.groups[group]):
            values.append(float(np.mean(on_same_tasks)))
        elif group in figures or len(figures) == 1:
            values.append(figures.get(group, next(iter(figures.values()))))
        else:
            return None
    return values[0] - values[1]


def _mark(value: float, share: float | None) -> str:
    return " =" if share is not None and abs(value - share) <= published.TOLERANCE else ""


def _with_std(estimate: results.Estimate) -> str:
    mean = f"{estimate.mean:.1f}"
    return mean if estimate.n == 1 else f"{mean} ± {estimate.std:.1f}"

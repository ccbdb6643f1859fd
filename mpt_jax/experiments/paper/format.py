"""A table of what was run: ours beside the paper's; on the toy suite signs of differences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpt_jax.experiments import results
from mpt_jax.experiments.paper import published, suites
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.tables import Table
from mpt_jax.experiments.report.tables import as_text
from mpt_jax.experiments.results import Result

Found = Mapping[tuple[str, int | None], Result]  # (variant, shots) -> result
NOT_RUN = "not run"
LEGEND = (
    "mean ± standard deviation over n seeds; [..]: 95% interval of the average, over seeds; "
    "=: the accuracy of always answering the most frequent label; 0*: undefined for at least one "
    "seed (a constant prediction), which counts as 0"
)
PAPER_LEGEND = (
    "†: not run by the paper's authors, as we remember it, but taken from the named paper. "
    "Published figures are of T5 1.0, which was trained on most of these tasks before."
)
Rows = list[list[str]]


def text(table: Table, suite: Suite, found: Found, shares: Mapping[str, float]) -> str:
    """The table, as text.

    Args:
        table: as the suite has it.
        suite: what it was run on.
        found: what was run; other cells read 'not run'.
        shares: the paper's name of a task -> percent of the most frequent label in its test split.
    """
    parts = [f"{table.title} ({suite.name} suite)"]
    for shots in table.shots:
        parts.append(
            f"\n{_examples(shots)}\n{as_text(score_rows(table, suite, found, shots, shares))}"
        )
    parts.append(LEGEND)
    backbones = sorted({result.backbone for result in found.values() if result.backbone})
    if backbones:
        parts.append(f"Ours: {', '.join(backbones)}.")
    if suite.name == suites.PAPER.name:
        parts.append("Ours say words for labels; the paper's digits are --labels digits.")
    if suite.name == suites.TOY.name:
        differences = sign_rows(table, suite, found)
        parts.append(
            f"\n{reference(table)} minus each variant, paired by seed\n{as_text(differences)}"
        )
    else:
        parts.append(PAPER_LEGEND)
    return "\n".join(parts)


def score_rows(
    table: Table, suite: Suite, found: Found, shots: int | None, shares: Mapping[str, float]
) -> Rows:
    """Ours, and on the paper's suite each published row after the variant of ours it belongs to."""
    heads = ["", *table.columns, *table.averages, "95% interval", "n"]
    lines = [heads]
    theirs = [] if suite.name == suites.TOY.name else published.rows(table.name)
    known = published.majority()
    lines += [_published(table, row, shots, known) for row in theirs if row.of is None]
    for variant in table.variants:
        result = found.get((variant.name, shots))
        name = f"{variant.name} (ours)" if theirs else variant.name
        lines.append([name, *_ours(table, suite, result, shares)])
        lines += [_published(table, row, shots, known) for row in theirs if row.of == variant.name]
    return lines


def _ours(
    table: Table, suite: Suite, result: Result | None, shares: Mapping[str, float]
) -> list[str]:
    if result is None:
        return [NOT_RUN] * (len(table.columns) + len(table.averages)) + ["", ""]
    cells = []
    for column in table.columns:
        name, _, metric = column.partition(" ")
        scores = result.scores[suite.tasks[name]]
        metric = metric or results.main_metric(scores)
        found = results.estimate(scores[metric])
        share = shares.get(column) if metric == "accuracy" else None
        undefined = any(scores.get(f"{metric}_undefined", ()))
        cells.append(_with_std(found) + _mark(found.mean, share) + (" 0*" if undefined else ""))
    averages = [
        results.estimate(result.means([suite.tasks[name] for name in names]))
        for names in table.averages.values()
    ]
    intervals = [f"[{a.low:.1f}, {a.high:.1f}]" if a.n > 1 else "" for a in averages]
    cells += [_with_std(average) for average in averages]
    return [*cells, " ".join(intervals).strip(), str(len(result.seeds))]


def _published(
    table: Table, row: published.Row, shots: int | None, shares: Mapping[str, float]
) -> list[str]:
    values = row.values.get(shots, {})
    cells = []
    for name in (*table.columns, *table.averages):
        value = values.get(name)
        std = f" ± {row.stds[name]:.1f}" if name in row.stds else ""
        shown = value is not None
        cells.append(f"{value:.1f}{std}{_mark(value, shares.get(name))}" if shown else "")
    return [f"{row.name} ({row.source})", *cells, "", ""]


def reference(table: Table) -> str:
    """The variant that the others are subtracted from: the table's own, MPT, or the first."""
    names = [variant.name for variant in table.variants]
    return table.reference or ("MPT" if "MPT" in names else names[0])


def sign_rows(table: Table, suite: Suite, found: Found) -> Rows:
    """The reference minus each other variant: ours, its interval, and the sign of the paper's."""
    lines = [["", "examples", "average", "ours", "95% interval", "n", "paper's sign", "ours is"]]
    for shots in table.shots:
        ours = found.get((reference(table), shots))
        for variant in table.variants:
            result = found.get((variant.name, shots))
            if ours is None or result is None or result is ours:
                continue
            for group, names in table.groups.items():
                theirs = _published_difference(table, variant.name, shots, group)
                tasks = [suite.tasks[name] for name in names]
                difference = results.estimate(
                    np.subtract(ours.means(tasks), result.means(tasks)).tolist()
                )
                lines.append(
                    [variant.name, _examples(shots), group, f"{difference.mean:+.1f}"]
                    + [f"[{difference.low:+.1f}, {difference.high:+.1f}]", str(difference.n)]
                    + _verdict(difference, theirs)
                )
    return lines


def _verdict(ours: results.Estimate, theirs: float | None) -> list[str]:
    """The sign of the paper's difference, and whether ours agrees."""
    if theirs is None:
        return ["", ""]
    sign = "+" if theirs > 0 else "-" if theirs < 0 else "0"
    if not (ours.low > 0 or ours.high < 0):
        return [sign, "undecided"]
    return [sign, "the same" if np.sign(ours.mean) == np.sign(theirs) else "the opposite"]


def _published_difference(
    table: Table, variant: str, shots: int | None, group: str
) -> float | None:
    """The paper's reference minus a variant: over the same tasks, else of the average that it
    prints for them, else of the only figure it has."""
    found = {row.of: row.values for row in published.rows(table.name) if row.of}
    values = []
    for name in (reference(table), variant):
        by_shots = found.get(name, {})
        figures = by_shots.get(shots, by_shots.get(None, {}))
        same = [figures[task] for task in table.groups[group] if task in figures]
        if len(same) == len(table.groups[group]):
            values.append(float(np.mean(same)))
        elif group in figures or len(figures) == 1:
            values.append(figures.get(group, next(iter(figures.values()))))
        else:
            return None
    return values[0] - values[1]


def _mark(value: float, share: float | None) -> str:
    return " =" if share is not None and abs(value - share) <= published.TOLERANCE else ""


def _with_std(found: results.Estimate) -> str:
    return f"{found.mean:.1f}" if found.n == 1 else f"{found.mean:.1f} ± {found.std:.1f}"


def _examples(shots: int | None) -> str:
    return "all examples" if shots is None else f"k = {shots}"

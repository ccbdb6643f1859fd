"""Text tables for the terminal and the HTML page. The first row of each is the header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.experiments.report import analysis, run_reader
from mpt_jax.experiments.report.analysis import ByLabel, short
from mpt_jax.experiments.results import (
    RANKED,
    Estimate,
    Result,
    estimate,
    main_metric,
    paired,
    paired_by_task,
)

REFERENCE = "MPT"
Rows = list[list[str]]


def text(root: Path, results: Sequence[Result], majority: Mapping[str, float]) -> str:
    """Returns the tables that the demo prints.

    Args:
        root: The folder of the source stages.
        results: The results of all methods and numbers of examples.
        majority: Task -> majority-class share of its test split in percent.
    """
    parts = [("Source tasks (test)", source_rows(trained(root)))]
    for shots in dict.fromkeys(result.shots for result in results):
        selected = [result for result in results if result.shots == shots]
        name = "all training examples" if shots is None else f"{shots} training examples"
        parts.append((f"Target tasks, {name} (test)", score_rows(selected, majority, wide=False)))
        # A single seed gives no pairs.
        with_seeds = [result for result in selected if len(result.seeds) > 1]
        differences = difference_rows(with_seeds)
        if len(differences) > 1:
            parts.append((f"{REFERENCE} minus each, paired by seed", differences))
    return "\n\n".join(f"{title}\n{as_text(rows)}" for title, rows in parts)


def trained(root: Path) -> dict[str, Artifact]:
    """Returns name -> artifact of the source stages that have one."""
    artifacts = {name: run_reader.artifact(path) for name, path in run_reader.sources(root).items()}
    return {name: artifact for name, artifact in artifacts.items() if artifact is not None}


def source_rows(sources: Mapping[str, Artifact]) -> Rows:
    """Returns a table of the scores of source stages on their source tasks."""
    tasks = dict.fromkeys(t for artifact in sources.values() for t in artifact.runs.task_names)
    rows = [["", *(short(task) for task in tasks)]]
    for name, artifact in sources.items():
        scores = artifact.config["metrics"].get("scores", {})
        rows.append([name])
        for task in tasks:
            score = scores[task][main_metric(scores[task])] if task in scores else None
            rows[-1].append("" if score is None else f"{score:.1f}")
    return rows


def score_rows(results: Sequence[Result], majority: Mapping[str, float], wide: bool = True) -> Rows:
    """Returns a table of scores, with one row for each method.

    The columns are each task's main metric (mean and standard deviation over seeds), the mean over
    the common tasks, the same mean with labels ranked by likelihood, the trainable parameters per
    task, and the training time in seconds. If majority-class shares are known, the first row shows
    them.

    Args:
        results: The results at one number of examples.
        majority: Task -> majority-class share in percent; {} if unknown.
        wide: Whether to add the interval of the mean over seeds, and the number of seeds.
    """
    metrics = {t: main_metric(scores) for result in results for t, scores in result.scores.items()}
    tasks = analysis.common_tasks(results)
    heads = [f"{short(task)} ({metric})" for task, metric in metrics.items()]
    more = ["95% interval", "n"] if wide else []
    rows = [["", *heads, "mean", *more, "mean, labels ranked", "parameters per task", "seconds"]]
    if any(task in majority for task in metrics):
        guesses = [f"{majority[task]:.1f}" if task in majority else "" for task in metrics]
        known = all(task in majority for task in tasks)
        mean = f"{np.mean([majority[task] for task in tasks]):.1f}" if known else ""
        rows.append(["majority class", *guesses, mean, *[""] * len(more), "", "0", ""])
    for label, cells in analysis.by_label(results).items():
        (result,) = cells.values()
        ranked = [np.mean(result.scores[t][RANKED]) for t in tasks if RANKED in result.scores[t]]
        mean = np.mean([np.mean(result.values(task)) for task in tasks])
        average = estimate(result.means(tasks))
        spread = [interval(average, ".1f"), str(average.n)] if wide else []
        rows.append(
            [label]
            + [mean_and_std(result.values(t)) if t in result.scores else "" for t in metrics]
            + [f"{mean:.1f}", *spread, f"{np.mean(ranked):.1f}" if ranked else ""]
            + [f"{result.parameters:,.0f}", f"{result.seconds:.0f}"]
        )
    return rows


def difference_rows(results: Sequence[Result], reference: str = REFERENCE) -> Rows:
    """Returns a table of the reference minus each other method, with 95% t-intervals.

    A pair is a seed, with the mean over common tasks. Beside it stands the interval with tasks as
    units, each the mean over seeds. Methods without common pairs are omitted. If the reference was
    not run, the table is only a header.
    """
    rows = [["", "mean difference", "95% interval", "seeds", "over tasks", "tasks"]]
    by_label = {
        label: next(iter(cells.values())) for label, cells in analysis.by_label(results).items()
    }
    new = by_label.pop(reference, None)
    if new is None:
        return rows
    for label, old in by_label.items():
        if not set(new.seeds) & set(old.seeds) or not set(new.scores) & set(old.scores):
            continue
        of_seeds, of_tasks = estimate(paired(new, old)), estimate(paired_by_task(new, old))
        cells = [(interval(of, "+.1f"), str(of.n)) for of in (of_seeds, of_tasks)]
        rows.append([label, f"{of_seeds.mean:+.1f}", *cells[0], *cells[1]])
    return rows


def gain_rows(gains: Mapping[str, Mapping[str, Estimate]]) -> Rows:
    """Returns a table of the gain of each method on each task, with intervals over seeds."""
    tasks = list(dict.fromkeys(task for by_task in gains.values() for task in by_task))
    rows = [["", *map(short, tasks)]]
    for label, by_task in gains.items():
        cells = [by_task.get(task) for task in tasks]
        rows.append([label, *("" if gain is None else with_interval(gain) for gain in cells)])
    return rows


def matching_rows(by_label: ByLabel, tasks: Sequence[str]) -> Rows:
    """Returns a table of the number of examples that each method needs to match each other method
    at k examples."""
    curves = {label: analysis.by_shots(cells, tasks) for label, cells in by_label.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    numbers = sorted({k for curve in curves.values() for k in curve})
    rows = [["", "to match", *(f"k = {k}" for k in numbers)]]
    for label, curve in curves.items():
        for other, target in curves.items():
            if other != label:
                cells = [_needed(curve, target.get(k)) for k in numbers]
                rows.append([label, other, *cells])
    return rows


def _needed(curve: Mapping[int, float], level: float | None) -> str:
    if level is None:
        return ""
    needed = analysis.examples_needed(curve, level)
    if needed is None:
        return "not reached"
    return f"≤ {needed:.0f}" if needed == min(curve) else f"{needed:.1f}"


def mean_and_std(values: Sequence[float], form: str = ".1f") -> str:
    """Returns mean and standard deviation as text, or only the mean for a single value."""
    value = estimate(values)
    return f"{value.mean:{form}}" if value.n == 1 else f"{value.mean:{form}} ± {value.std:{form}}"


def interval(found: Estimate, form: str) -> str:
    """Returns the interval of a mean as text; '' for a single value."""
    return "" if found.n == 1 else f"{found.low:{form}} .. {found.high:{form}}"


def with_interval(found: Estimate) -> str:
    """Returns a difference as text, with its interval if there are several values."""
    between = f" ({interval(found, '+.1f')})" if found.n > 1 else ""
    return f"{found.mean:+.1f}{between}"


def as_text(rows: Rows) -> str:
    """Returns a table as text. The first column is aligned left, the others are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""Rows of text: for a terminal as they are, for a page as cells. The first row heads the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.experiments.report import analysis, run_reader
from mpt_jax.experiments.report.analysis import ByLabel, short
from mpt_jax.experiments.results import RANKED, Estimate, Result, estimate, main_metric, paired

REFERENCE = "MPT"
Rows = list[list[str]]


def text(root: Path, results: Sequence[Result], majority: Mapping[str, float]) -> str:
    """The tables that the demo prints.

    Args:
        root: holds the source stages.
        results: of every method and number of examples.
        majority: task -> percent of its test rows that have the most frequent target.
    """
    parts = [("Source tasks (test)", source_rows(trained(root)))]
    for shots in dict.fromkeys(result.shots for result in results):
        chosen = [result for result in results if result.shots == shots]
        name = "all training examples" if shots is None else f"{shots} training examples"
        parts.append((f"Target tasks, {name} (test)", score_rows(chosen, majority, wide=False)))
        drawn = [result for result in chosen if len(result.seeds) > 1]  # with one there is no pair
        differences = difference_rows(drawn)
        if len(differences) > 1:
            parts.append((f"{REFERENCE} minus each, paired by task and seed", differences))
    return "\n\n".join(f"{title}\n{as_text(rows)}" for title, rows in parts)


def trained(root: Path) -> dict[str, Artifact]:
    """Name -> artifact of the source stages that are there."""
    found = {name: run_reader.artifact(path) for name, path in run_reader.sources(root).items()}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def source_rows(sources: Mapping[str, Artifact]) -> Rows:
    """How well source stages do on the tasks they were trained on."""
    tasks = dict.fromkeys(t for artifact in sources.values() for t in artifact.runs.task_names)
    rows = [["", *(short(task) for task in tasks)]]
    for name, artifact in sources.items():
        found = artifact.config["metrics"].get("scores", {})
        rows.append([name])
        for task in tasks:
            score = found[task][main_metric(found[task])] if task in found else None
            rows[-1].append("" if score is None else f"{score:.1f}")
    return rows


def score_rows(results: Sequence[Result], majority: Mapping[str, float], wide: bool = True) -> Rows:
    """Mean and standard deviation over seeds of each task's main metric, by method, and their mean
    over the tasks that all have; then that of ranking the labels instead of decoding.

    Args:
        results: at one number of examples.
        majority: task -> percent of its rows that have the most frequent target; {} if unknown.
        wide: adds the interval of the mean, over seeds, and their number.
    """
    metrics = {t: main_metric(found) for result in results for t, found in result.scores.items()}
    tasks = analysis.common_tasks(results)
    heads = [f"{short(task)} ({metric})" for task, metric in metrics.items()]
    more = ["95% interval", "n"] if wide else []
    rows = [["", *heads, "mean", *more, "mean, labels ranked", "parameters per task", "seconds"]]
    if any(task in majority for task in metrics):
        guesses = [f"{majority[task]:.1f}" if task in majority else "" for task in metrics]
        known = all(task in majority for task in tasks)
        mean = f"{np.mean([majority[task] for task in tasks]):.1f}" if known else ""
        rows.append(["always the most frequent", *guesses, mean, *[""] * len(more), "", "0", ""])
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
    """A method minus each other over pairs of (task, seed), with a 95% t-interval; only the heads
    where the reference is not among them, or no other shares a task and seed with it."""
    rows = [["", "mean difference", "95% interval", "pairs"]]
    by_label = {
        label: next(iter(cells.values())) for label, cells in analysis.by_label(results).items()
    }
    new = by_label.pop(reference, None)
    if new is None:
        return rows
    for label, old in by_label.items():
        if not set(new.seeds) & set(old.seeds) or not set(new.scores) & set(old.scores):
            continue
        found = estimate(paired(new, old))
        rows.append([label, f"{found.mean:+.1f}", interval(found, "+.1f"), str(found.n)])
    return rows


def gain_rows(gains: Mapping[str, Mapping[str, Estimate]]) -> Rows:
    """Gains of each method on each task, with intervals over seeds."""
    tasks = list(dict.fromkeys(task for found in gains.values() for task in found))
    rows = [["", *map(short, tasks)]]
    for label, found in gains.items():
        cells = [found.get(task) for task in tasks]
        rows.append([label, *("" if gain is None else with_interval(gain) for gain in cells)])
    return rows


def matching_rows(by_label: ByLabel, tasks: Sequence[str]) -> Rows:
    """How many examples each method needs to reach what another reaches with k."""
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
    found = analysis.examples_needed(curve, level)
    if found is None:
        return "not reached"
    return f"≤ {found:.0f}" if found == min(curve) else f"{found:.1f}"


def mean_and_std(values: Sequence[float], form: str = ".1f") -> str:
    """Both, each in this form; the mean alone of a single value."""
    found = estimate(values)
    return f"{found.mean:{form}}" if found.n == 1 else f"{found.mean:{form}} ± {found.std:{form}}"


def interval(found: Estimate, form: str) -> str:
    """The interval of a mean; nothing for a single value."""
    return "" if found.n == 1 else f"{found.low:{form}} .. {found.high:{form}}"


def with_interval(found: Estimate) -> str:
    """A difference and its interval, if it has one."""
    between = f" ({interval(found, '+.1f')})" if found.n > 1 else ""
    return f"{found.mean:+.1f}{between}"


def as_text(rows: Rows) -> str:
    """Rows in columns; the first is flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""Report sections about gains: over prompt tuning without a source, and over zero-shot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mpt_jax.experiments.report import analysis, figures, page, tables, transfer
from mpt_jax.experiments.report.analysis import BASELINE, examples, short
from mpt_jax.experiments.report.context import INTERVALS, Content, Drawn, interval_line
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.results import Estimate, Result, estimate, paired

ZERO_SHOT = "zero-shot"  # the method of results without training
MOST_IN_A_PANEL = 5

ByTask = Mapping[str, Estimate]  # task -> gain
ByShots = Mapping[int | None, Mapping[str, ByTask]]  # shots -> label -> task -> gain


def over_baseline(content: Content) -> list[str]:
    """Returns a figure and tables of the gain of each method over PT on each task; [] if no method
    has a comparable PT result."""
    by_shots: dict[int | None, dict[str, ByTask]] = {}
    for shots, results in content.by_shots():
        for label, result in results.items():
            old = analysis.from_nothing(content.results, result)
            if old is not None and old is not result and set(old.seeds) & set(result.seeds):
                by_shots.setdefault(shots, {})[label] = analysis.gains(result, old)
    if not by_shots:
        content.absent.append(f"Transfer gain: no method was run with a comparable {BASELINE}.")
        return []
    blocks = [_figure(content, by_shots, BASELINE, "Difference paired by seed, on each task.")]
    for shots, by_method in by_shots.items():
        name = f"Gain over {BASELINE}, {examples(shots)}"
        blocks += [page.heading(name), page.table(tables.gain_rows(by_method), name)]
    return blocks


def over_zero_shot(content: Content) -> list[str]:
    """Returns a figure and tables of the gain of each method over zero-shot on each task; [] if
    there is no result of the method "zero-shot".

    The tables have the zero-shot scores, the gains, the mean gain over tasks, and the number of
    tasks on which the mean score of a method is below that of zero-shot. The figure omits results
    that a heat map of sources by targets shows (`transfer_sections`).
    """
    by_shots: dict[int | None, dict[str, ByTask]] = {}
    blocks, olds = [], {}
    maps = transfer.of_results(content.results)
    in_maps = {content.label(result) for each in maps for result in each.by_source.values()}
    for shots, results in content.by_shots():
        by_old: dict[str, dict[str, tuple[ByTask, Estimate]]] = {}
        for label, result in results.items():
            try:
                old = _zero_shot(content, result)
            except ValueError as error:
                content.absent.append(
                    f"Gain of {label} over {ZERO_SHOT}, {examples(shots)}: {error}"
                )
                continue
            if old is None or old is result:
                continue
            like = _for_seeds(old, result)
            tasks = [task for task in result.scores if task in like.scores]
            if not tasks or not set(like.seeds) & set(result.seeds):
                content.absent.append(
                    f"Gain of {label} over {ZERO_SHOT}, {examples(shots)}: the two have no task "
                    "and seed in common."
                )
                continue
            gain = analysis.gains(result, like)
            if label not in in_maps:
                by_shots.setdefault(shots, {})[label] = gain
            mean = estimate(paired(result, like, tasks))
            by_old.setdefault(content.label(old), {})[label] = gain, mean
            olds[content.label(old)] = old
        for label, gains in by_old.items():
            name = f"Gain over {label}, {examples(shots)}"
            blocks += [page.heading(name), page.table(_rows(olds[label], gains), name)]
    if not by_shots:
        return blocks
    caption = (
        "Difference on each task, paired by seed; a single zero-shot score is paired with every "
        "seed."
    )
    return [_figure(content, by_shots, ZERO_SHOT, caption), *blocks]


def _zero_shot(content: Content, like: Result) -> Result | None:
    """Returns the zero-shot result on the same backbone as another result, preferably with the same
    number of examples, which zero-shot does not use; a zero-shot result itself; or None.

    Raises:
        ValueError: the only such results do not say which of several backbones they are of.
    """
    found = [result for result in content.results if result.method.lower() == ZERO_SHOT]
    if like in found:
        return like
    close = [old for old in found if not _backbones_differ(old, like)]
    others = [x for x in content.results if x not in found and _backbones_differ(x, like)]
    known = [old for old in close if all(_backbones_differ(old, other) for other in others)]
    if close and not known:
        raise ValueError(
            "the results are of several backbones, and the zero-shot result does not record its "
            "own."
        )
    same = [result for result in known if result.shots == like.shots]
    return next(iter([*same, *known]), None)


def _backbones_differ(one: Result, other: Result) -> bool:
    """Whether two results are of backbones with other names or, unless both record a name, other
    sizes. Methods on the same backbone can have models of different sizes: prompts in CLIP's image
    encoder need no text encoder, and a trained part of the model is not counted as frozen."""
    if one.backbone and other.backbone:
        return one.backbone != other.backbone
    sizes = analysis.model_size(one), analysis.model_size(other)
    return all(sizes) and not math.isclose(*sizes, rel_tol=0.1)


def _for_seeds(old: Result, new: Result) -> Result:
    """Returns a result with the seeds of another one, if it has only one value for each score."""
    if len(old.seeds) > 1:
        return old
    scores = {
        task: {metric: values * len(new.seeds) for metric, values in by_metric.items()}
        for task, by_metric in old.scores.items()
    }
    return dataclasses.replace(old, scores=scores, seeds=new.seeds)


def _rows(old: Result, gains: Mapping[str, tuple[ByTask, Estimate]]) -> tables.Rows:
    tasks = [task for task in old.scores if any(task in by_task for by_task, _ in gains.values())]
    scores = [tables.mean_and_std(old.values(task)) for task in tasks]
    mean = tables.mean_and_std(old.means(tasks))
    rows = [["", *map(short, tasks), "mean", "tasks below"], [ZERO_SHOT, *scores, mean, ""]]
    for label, (by_task, mean_gain) in gains.items():
        cells = ["" if t not in by_task else tables.with_interval(by_task[t]) for t in tasks]
        below = sum(gain.mean < 0 for gain in by_task.values())
        last = [tables.with_interval(mean_gain), f"{below} of {len(by_task)}"]
        rows.append([label, *cells, *last])
    return rows


def _figure(content: Content, by_shots: ByShots, over: str, caption: str) -> str:
    """Returns a figure of gains with their intervals, in panels with the same limits."""
    ends = [
        end
        for by_method in by_shots.values()
        for by_task in by_method.values()
        for gain in by_task.values()
        for end in ((gain.mean, gain.mean) if gain.n == 1 else (gain.low, gain.high))
    ]
    room = 0.04 * (max(ends) - min(ends)) + 0.5
    limits = min(ends) - room, max(ends) + room
    drawn = []
    for shots, by_method in by_shots.items():
        # Many methods in one panel cannot be distinguished.
        parts = [by_method]
        if len(by_method) > MOST_IN_A_PANEL:
            parts = [{label: gain} for label, gain in by_method.items()]
        drawn += [_panel(content, shots, part, limits, over) for part in parts]
    return content.figure(drawn, f"{caption} {INTERVALS}", content.styles, lines=False)


def _panel(
    content: Content,
    shots: int | None,
    by_method: Mapping[str, ByTask],
    limits: tuple[float, float],
    over: str,
) -> Drawn:
    tasks = list(dict.fromkeys(task for gain in by_method.values() for task in gain))
    series = []
    for label, gain in by_method.items():
        points = [(row, gain[task]) for row, task in enumerate(tasks) if task in gain]
        line = interval_line(content.styles[label], points)
        series.append(line._replace(x=line.y, y=line.x))
    title = examples(shots)
    alt = f"Gain over {over}, {title}, of {', '.join(by_method)}; the numbers are in a table."
    if len(by_method) == 1:
        title = f"{next(iter(by_method))}, {title}"
    panel = Panel(title, f"points above {over}", "", alt, limits=limits)
    return Drawn(figures.intervals(panel, list(map(short, tasks)), series), list(by_method))

"""Sections of what results say, with no look at the folders of runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from mpt_jax.experiments.report import analysis, figures, page, tables
from mpt_jax.experiments.report.analysis import BASELINE, examples, short
from mpt_jax.experiments.report.context import INTERVALS, Content, Drawn, interval_line
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.results import Estimate, Result

MEAN = "mean score"
MOST_IN_A_PANEL = 5


def scores(content: Content) -> list[str]:
    """Scores at each number of examples, differences from the reference, and the sources."""
    blocks = [
        page.paragraph(
            "Mean ± standard deviation over n seeds of each task's main metric. The interval is "
            "the 95% t-interval, over seeds, of the mean over tasks. Differences are paired by "
            "task and seed; the pairs of one task share its test examples, so their interval "
            "describes these tasks, not tasks at large."
        )
    ]
    if content.reference not in content.by_label:
        content.absent.append(
            f"Paired differences: no method is called {content.reference!r}; name another with "
            "--reference."
        )
    for shots, results in content.by_shots():
        chosen = list(results.values())
        parts = {f"Scores, {examples(shots)}": tables.score_rows(chosen, content.majority)}
        name = f"{content.reference} minus each, {examples(shots)}"
        parts[name] = tables.difference_rows(chosen, content.reference)
        for name, rows in parts.items():
            if len(rows) > 1:
                blocks += [page.heading(name), page.table(rows, name)]
    if sources := tables.trained(content.root):
        name = "Source tasks, after their stages"
        blocks += [page.heading(name), page.table(tables.source_rows(sources), name)]
    return blocks


def parameters(content: Content) -> list[str]:
    """Mean score over trained parameters, a panel for each number of examples."""
    drawn = []
    for shots, results in content.by_shots():
        trained = {label: result.parameters for label, result in results.items()}
        shown = analysis.set_apart({k: number for k, number in trained.items() if number > 0})
        series, words = [], []
        for label, at in shown.items():
            mean = content.mean(results[label])
            series.append(interval_line(content.styles[label], [(at, mean)]))
            words.append(f"{label}: {trained[label]:,.0f} parameters, {mean.mean:.1f}")
        title = examples(shots)
        alt = f"Mean score and trained parameters of a task, {title}. {'; '.join(words)}."
        panel = Panel(title, "trained parameters of a task", MEAN, alt, log="x", connected=False)
        if series:
            drawn.append(Drawn(figures.lines(panel, series), list(shown)))
    caption = (
        "Mean over the tasks that all methods have. Points of nearly the same number of "
        f"parameters are moved sideways a little, so that they hide each other less. {INTERVALS}"
    )
    return [content.figure(drawn, caption, content.styles, lines=False)] if drawn else []


def gains(content: Content) -> list[str]:
    """What each method gains over PT on each task."""
    found = {}
    for shots, results in content.by_shots():
        for label, result in results.items():
            old = analysis.from_nothing(content.results, result)
            if old is not None and old is not result and set(old.seeds) & set(result.seeds):
                found.setdefault(shots, {})[label] = analysis.gains(result, old)
    if not found:
        content.absent.append(f"Transfer gain: no method stands beside a {BASELINE} of its kind.")
        return []
    ends = [
        end
        for of_shots in found.values()
        for of_label in of_shots.values()
        for gain in of_label.values()
        for end in ((gain.mean, gain.mean) if gain.n == 1 else (gain.low, gain.high))
    ]
    room = 0.04 * (max(ends) - min(ends)) + 0.5
    limits = min(ends) - room, max(ends) + room
    drawn, blocks = [], []
    for shots, of_shots in found.items():
        name = f"Gain over {BASELINE}, {examples(shots)}"
        blocks += [page.heading(name), page.table(tables.gain_rows(of_shots), name)]
        # Many methods in one panel cannot be told apart.
        parts = [of_shots]
        if len(of_shots) > MOST_IN_A_PANEL:
            parts = [{label: gain} for label, gain in of_shots.items()]
        drawn += [_gain_panel(content, shots, part, limits) for part in parts]
    caption = f"Difference paired by seed, on each task. {INTERVALS}"
    return [content.figure(drawn, caption, content.styles, lines=False), *blocks]


def _gain_panel(
    content: Content,
    shots: int | None,
    found: Mapping[str, Mapping[str, Estimate]],
    limits: tuple[float, float],
) -> Drawn:
    tasks = list(dict.fromkeys(task for gain in found.values() for task in gain))
    series = []
    for label, gain in found.items():
        points = [(row, gain[task]) for row, task in enumerate(tasks) if task in gain]
        line = interval_line(content.styles[label], points)
        series.append(line._replace(x=line.y, y=line.x))
    title = examples(shots)
    alt = f"Gain over {BASELINE}, {title}, of {', '.join(found)}; its numbers are in a table."
    if len(found) == 1:
        title = f"{next(iter(found))}, {title}"
    panel = Panel(title, f"points above {BASELINE}", "", alt, limits=limits)
    return Drawn(figures.intervals(panel, list(map(short, tasks)), series), list(found))


def examples_needed(content: Content) -> list[str]:
    """Scores over numbers of examples, and how many one method needs to match another."""
    curves = {
        label: [(k, content.mean(result)) for k, result in sorted(few.items())]
        for label, cells in content.by_label.items()
        if len(few := {k: result for k, result in cells.items() if k is not None}) > 1
    }
    if not curves:
        content.absent.append("Examples needed: no method was run at two numbers of examples.")
        return []
    ticks = sorted({k for points in curves.values() for k, _ in points})
    series = [interval_line(content.styles[label], points) for label, points in curves.items()]
    ends = ", ".join(f"{k} {points[-1][1].mean:.1f}" for k, points in curves.items())
    alt = f"Mean score by number of training examples. At the most: {ends}."
    panel = Panel("", "training examples of a task", MEAN, alt, x_ticks=ticks, log="x")
    drawn = [Drawn(figures.lines(panel, series), list(curves))]
    blocks = [content.figure(drawn, INTERVALS, content.styles)]
    if len(curves) > 1:
        name = "Examples needed to match another method"
        blocks += [
            page.heading(name),
            page.paragraph(
                "The smallest number of examples at which a method's mean score reaches what the "
                "other has with k: linear in log k between the numbers that were run. ≤ marks the "
                "smallest of them, below which nothing is known; runs on all examples are left out."
            ),
            page.table(tables.matching_rows(content.by_label, content.tasks), name),
        ]
    return blocks


def affinity(content: Content) -> list[str]:
    """What PT gains where it starts from one source task's prompt: sources by targets."""
    panels = []
    for shots, results in content.by_shots():
        found = {
            label: (result, analysis.gains(result, old))
            for label, result in results.items()
            if result.start is not None
            and (old := analysis.from_nothing(content.results, result)) is not None
            and set(old.seeds) & set(result.seeds)
        }
        if not found:
            continue
        starts = [short(result.start or "") for result, _ in found.values()]
        rows = starts if len(set(starts)) == len(starts) else list(found)
        values = np.array(
            [[gain[task].mean for task in content.tasks] for _, gain in found.values()]
        )
        title = examples(shots)
        best = [
            f"{short(task)} {rows[int(np.argmax(column))]} {column.max():+.1f}"
            for task, column in zip(content.tasks, values.T, strict=True)
        ]
        alt = f"Gain by source and target, {title}. Best source: {', '.join(best)}."
        panel = Panel(title, "target", "source", alt)
        columns = list(map(short, content.tasks))
        scale = max(float(np.abs(values).max()), 1.0)
        panels.append(figures.heat_map(panel, rows, columns, values, scale, "+.1f"))
    if not panels:
        return []
    caption = (
        f"Mean gain over {BASELINE} from nothing, in points, of {BASELINE} that starts from the "
        "prompt of a source task; paired by seed."
    )
    return [page.figure(panels, caption, {})]


def lengths(content: Content) -> list[str]:
    """Mean score over prompt length, where a method was run with several."""
    fixed = lambda r: (analysis.family(r.method), r.start, analysis.model_size(r))  # noqa: E731
    prompted = [result for result in content.results if result.prompt_length]
    return _over(content, prompted, "prompt length", lambda r: r.prompt_length, fixed)


def sizes(content: Content) -> list[str]:
    """Mean score over model size, where a method was run on several backbones."""
    fixed = lambda r: (analysis.family(r.method), r.start, r.prompt_length)  # noqa: E731
    return _over(content, content.results, "model parameters", analysis.model_size, fixed)


def _over(
    content: Content,
    results: Sequence[Result],
    what: str,
    value: Callable[[Result], float],
    fixed: Callable[[Result], Hashable],
) -> list[str]:
    drawn, looks = [], {}
    for shots in analysis.shots_of(results):
        chosen = [result for result in results if result.shots == shots]
        series = {}
        for group in analysis.varying(chosen, value, fixed).values():
            method, start = analysis.family(group[0].method), group[0].start
            name = method if start is None else f"{method} from {short(start)}"
            name = content.label(group[0]) if name in series else name
            # What varies shares the style of the method's first result.
            kin = next(
                label
                for label, cells in content.by_label.items()
                for result in cells.values()
                if (analysis.family(result.method), result.start) == (method, start)
            )
            looks[name] = content.styles[kin]
            series[name] = [(value(result), content.mean(result)) for result in group]
        if series:
            title = examples(shots)
            words = [
                f"{name} " + ", ".join(f"{at:,.0f}: {mean.mean:.1f}" for at, mean in points)
                for name, points in series.items()
            ]
            alt = f"Mean score by {what}, {title}. {'; '.join(words)}."
            ticks = sorted({at for points in series.values() for at, _ in points})
            shown = [interval_line(looks[name], points) for name, points in series.items()]
            panel = Panel(title, what, MEAN, alt, ticks, log="x")
            drawn.append(Drawn(figures.lines(panel, shown), list(series)))
    if not drawn:
        return []
    return [content.figure(drawn, f"Mean score by {what}. {INTERVALS}", looks)]

"""Report sections computed from results.json, as HTML blocks. They do not need the run folders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from mpt_jax.artifacts.model_card import CONSTANT
from mpt_jax.experiments.report import analysis, figures, page, tables
from mpt_jax.experiments.report.analysis import BASELINE, examples, short
from mpt_jax.experiments.report.context import INTERVALS, Content, Drawn, interval_line
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.results import Estimate, Result

MEAN = "mean score"
MOST_IN_A_PANEL = 5


def scores(content: Content) -> list[str]:
    """Returns tables of scores, of the reference minus each method, and of source-task scores."""
    blocks = [
        page.paragraph(
            "Mean ± standard deviation over n seeds of each task's main metric. The interval is "
            "the 95% t-interval, over seeds, of the mean over tasks. Differences are paired by "
            "seed, each the mean over tasks. All seeds share a task's test examples, so their "
            "interval describes these tasks, not tasks at large; the interval over tasks, each the "
            "mean over seeds, follows it."
        )
    ]
    if content.reference not in content.by_label:
        content.absent.append(
            f"Paired differences: no method is called {content.reference!r}. Choose one with "
            "--reference."
        )
    for shots, results in content.by_shots():
        shown = list(results.values())
        parts = {f"Scores, {examples(shots)}": tables.score_rows(shown, content.majority)}
        name = f"{content.reference} minus each, {examples(shots)}"
        parts[name] = tables.difference_rows(shown, content.reference)
        for name, rows in parts.items():
            if len(rows) > 1:
                blocks += [page.heading(name), page.table(rows, name)]
        if constant := _constant(results):
            blocks.append(page.paragraph(constant))
    if sources := tables.trained(content.root):
        name = "Source tasks, after their stages"
        blocks += [page.heading(name), page.table(tables.source_rows(sources), name)]
    return blocks


def _constant(results: Mapping[str, Result]) -> str:
    """Returns a sentence that names the scores of constant predictions; '' if there are none."""
    found = [
        f"{label} on {short(task)} ({sum(scores[CONSTANT]):.0f} of {len(result.seeds)} seeds)"
        for label, result in results.items()
        for task, scores in result.scores.items()
        if any(scores.get(CONSTANT, ()))
    ]
    if not found:
        return ""
    return (
        "Every prediction was the same, so the score is that of a constant answer: "
        f"{'; '.join(found)}."
    )


def parameters(content: Content) -> list[str]:
    """Returns plots of mean score against trainable parameters, one per number of examples."""
    drawn = []
    for shots, results in content.by_shots():
        trained = {label: result.parameters for label, result in results.items()}
        shown = analysis.set_apart({k: number for k, number in trained.items() if number > 0})
        series, words = [], []
        for label, x in shown.items():
            mean = content.mean(results[label])
            series.append(interval_line(content.styles[label], [(x, mean)]))
            words.append(f"{label}: {trained[label]:,.0f} parameters, {mean.mean:.1f}")
        title = examples(shots)
        alt = f"Mean score and trained parameters of a task, {title}. {'; '.join(words)}."
        panel = Panel(title, "trained parameters of a task", MEAN, alt, log="x", connected=False)
        if series:
            drawn.append(Drawn(figures.lines(panel, series), list(shown)))
    caption = (
        "Mean over the tasks that all methods have. Points with nearly equal numbers of parameters "
        f"are shifted sideways a little, so that all of them are visible. {INTERVALS}"
    )
    return [content.figure(drawn, caption, content.styles, lines=False)] if drawn else []


def gains(content: Content) -> list[str]:
    """Returns a figure and tables of the gain of each method over PT on each task; [] if no method
    has a comparable PT result."""
    by_shots = {}
    for shots, results in content.by_shots():
        for label, result in results.items():
            old = analysis.from_nothing(content.results, result)
            if old is not None and old is not result and set(old.seeds) & set(result.seeds):
                by_shots.setdefault(shots, {})[label] = analysis.gains(result, old)
    if not by_shots:
        content.absent.append(f"Transfer gain: no method was run with a comparable {BASELINE}.")
        return []
    ends = [
        end
        for by_method in by_shots.values()
        for by_task in by_method.values()
        for gain in by_task.values()
        for end in ((gain.mean, gain.mean) if gain.n == 1 else (gain.low, gain.high))
    ]
    room = 0.04 * (max(ends) - min(ends)) + 0.5
    limits = min(ends) - room, max(ends) + room
    drawn, blocks = [], []
    for shots, by_method in by_shots.items():
        name = f"Gain over {BASELINE}, {examples(shots)}"
        blocks += [page.heading(name), page.table(tables.gain_rows(by_method), name)]
        # Many methods in one panel cannot be distinguished.
        parts = [by_method]
        if len(by_method) > MOST_IN_A_PANEL:
            parts = [{label: gain} for label, gain in by_method.items()]
        drawn += [_gain_panel(content, shots, part, limits) for part in parts]
    caption = f"Difference paired by seed, on each task. {INTERVALS}"
    return [content.figure(drawn, caption, content.styles, lines=False), *blocks]


def _gain_panel(
    content: Content,
    shots: int | None,
    by_method: Mapping[str, Mapping[str, Estimate]],
    limits: tuple[float, float],
) -> Drawn:
    tasks = list(dict.fromkeys(task for gain in by_method.values() for task in gain))
    series = []
    for label, gain in by_method.items():
        points = [(row, gain[task]) for row, task in enumerate(tasks) if task in gain]
        line = interval_line(content.styles[label], points)
        series.append(line._replace(x=line.y, y=line.x))
    title = examples(shots)
    alt = f"Gain over {BASELINE}, {title}, of {', '.join(by_method)}; the numbers are in a table."
    if len(by_method) == 1:
        title = f"{next(iter(by_method))}, {title}"
    panel = Panel(title, f"points above {BASELINE}", "", alt, limits=limits)
    return Drawn(figures.intervals(panel, list(map(short, tasks)), series), list(by_method))


def examples_needed(content: Content) -> list[str]:
    """Returns a figure of mean scores by number of examples, and a table of the examples that each
    method needs to match the others; [] if no method was run at two numbers of examples."""
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
                "The smallest number of examples at which a method's mean score reaches the "
                "other's score with k examples, interpolated linearly in log k. ≤ marks the "
                "smallest number that was run. Runs on all examples are left out."
            ),
            page.table(tables.matching_rows(content.by_label, content.tasks), name),
        ]
    return blocks


def affinity(content: Content) -> list[str]:
    """Returns heat maps, sources by targets, of PT's gain from a source task's prompt; [] if PT was
    not run from one."""
    panels = []
    for shots, results in content.by_shots():
        by_label = {
            label: (result, analysis.gains(result, old))
            for label, result in results.items()
            if result.start is not None
            and (old := analysis.from_nothing(content.results, result)) is not None
            and set(old.seeds) & set(result.seeds)
        }
        if not by_label:
            continue
        starts = [short(result.start or "") for result, _ in by_label.values()]
        rows = starts if len(set(starts)) == len(starts) else list(by_label)
        values = np.array(
            [[gain[task].mean for task in content.tasks] for _, gain in by_label.values()]
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
        f"Mean gain, in points, of {BASELINE} that starts from a source task's prompt over "
        f"{BASELINE} without a source; paired by seed."
    )
    return [page.figure(panels, caption, {})]


def lengths(content: Content) -> list[str]:
    """Returns a figure of mean scores by prompt length, for methods run with several lengths; [] if
    there are none."""
    fixed = lambda r: (analysis.family(r.method), r.start, analysis.model_size(r))  # noqa: E731
    prompted = [result for result in content.results if result.prompt_length]
    return _over(content, prompted, "prompt length", lambda r: r.prompt_length, fixed)


def sizes(content: Content) -> list[str]:
    """Returns a figure of mean scores by model size, for methods run on several sizes of T5; [] if
    there are none."""
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
        selected = [result for result in results if result.shots == shots]
        series = {}
        for group in analysis.varying(selected, value, fixed).values():
            method, start = analysis.family(group[0].method), group[0].start
            name = method if start is None else f"{method} from {short(start)}"
            name = content.label(group[0]) if name in series else name
            # The series has the style of the method's first result.
            label_of_first = next(
                label
                for label, cells in content.by_label.items()
                for result in cells.values()
                if (analysis.family(result.method), result.start) == (method, start)
            )
            looks[name] = content.styles[label_of_first]
            series[name] = [(value(result), content.mean(result)) for result in group]
        if series:
            title = examples(shots)
            words = [
                f"{name} " + ", ".join(f"{x:,.0f}: {mean.mean:.1f}" for x, mean in points)
                for name, points in series.items()
            ]
            alt = f"Mean score by {what}, {title}. {'; '.join(words)}."
            ticks = sorted({x for points in series.values() for x, _ in points})
            shown = [interval_line(looks[name], points) for name, points in series.items()]
            panel = Panel(title, what, MEAN, alt, ticks, log="x")
            drawn.append(Drawn(figures.lines(panel, shown), list(series)))
    if not drawn:
        return []
    return [content.figure(drawn, f"Mean score by {what}. {INTERVALS}", looks)]

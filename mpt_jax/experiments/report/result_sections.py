"""Report sections computed from results.json, as HTML blocks. They do not need the run folders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from mpt_jax.artifacts.model_card import CONSTANT
from mpt_jax.experiments.report import analysis, figures, page, tables
from mpt_jax.experiments.report.analysis import examples, short
from mpt_jax.experiments.report.context import INTERVALS, Content, Drawn, interval_line
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.results import Result

MEAN = "mean score"


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

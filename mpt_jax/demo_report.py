"""The demo's table, and a self-contained HTML page with learning curves and prompt similarities."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from mpt_jax import artefacts
from mpt_jax.reporting import METRICS
from mpt_jax.results import RANKED, Result, estimate, main_metric, paired

matplotlib.use("Agg")  # before pyplot: a machine without a screen has no other backend
from matplotlib import pyplot  # noqa: E402

STYLE = """
:root { color-scheme: light dark; --line: #9998; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right }
td { white-space: nowrap } th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: white; border-radius: 4px }
"""


def write_report(
    root: Path,
    results: Sequence[Result],
    sources: Sequence[str],
    majority: Mapping[str, float],
    seconds: float,
) -> str:
    """Writes root/report.html and returns the tables as text.

    Args:
        root: holds pt_source and mpt_source.
        results: of every method and number of examples.
        sources: the source tasks, in the order to show them.
        majority: task -> percent of its test rows that have the most frequent target.
        seconds: of the whole demo.
    """
    teachers = artefacts.load_artefact(root / "pt_source" / "artefact")
    students = artefacts.load_artefact(root / "mpt_source" / "artefact")
    tables = [("Source tasks (test)", source_table(teachers, students, sources))]
    for shots in dict.fromkeys(result.shots for result in results):
        chosen = [result for result in results if result.shots == shots]
        name = "all training examples" if shots is None else f"{shots} training examples"
        tables.append((f"Target tasks, {name} (test)", target_table(chosen, majority)))
        differences = [_difference(chosen, other) for other in chosen if _comparable(other)]
        if differences:
            title = "MPT minus each, paired by task and seed"
            heads = ["", "mean difference", "95% interval", "pairs"]
            tables.append((title, [heads, *differences]))
    figures = [
        ("Loss while training", learning_curves(root, results)),
        ("Teachers: cosine similarity of prompts", similarity(teachers)),
        ("MPT's source prompts: cosine similarity", similarity(students)),
    ]
    closing = f"Everything took {seconds:.0f} s. Artefacts and predictions: {root}"
    (root / "report.html").write_text(_page(tables, figures, closing))
    text = "\n\n".join(f"{title}\n{_text(rows)}" for title, rows in tables)
    return f"\n{text}\n\n{closing}\nReport: {root / 'report.html'}"


Rows = list[list[str]]


def source_table(
    teachers: artefacts.Artefact, students: artefacts.Artefact, sources: Sequence[str]
) -> Rows:
    """How well teachers and the distilled student do on the tasks they were trained on."""
    rows = [["", *(_short(task) for task in sources)]]
    for name, artefact in (("Teachers (PT)", teachers), ("MPT, one shared prompt", students)):
        scores = artefact.config["metrics"]["scores"]
        rows.append([name, *(f"{scores[task][main_metric(scores[task])]:.1f}" for task in sources)])
    return rows


def target_table(results: Sequence[Result], majority: Mapping[str, float]) -> Rows:
    """Mean and standard deviation over seeds of each task's main metric, by method; the last
    column but three ranks the labels instead of decoding."""
    tasks = list(results[0].scores)
    metrics = [main_metric(results[0].scores[task]) for task in tasks]
    heads = [f"{_short(t)} ({m})" for t, m in zip(tasks, metrics, strict=True)]
    rows = [["", *heads, "mean", "mean, labels ranked", "parameters per task", "seconds"]]
    shares = [majority[task] for task in tasks]
    guesses = [f"{share:.1f}" for share in shares]
    rows.append(["always the most frequent", *guesses, f"{np.mean(shares):.1f}", "", "0", ""])
    for result in results:
        ranked = [np.mean(s[RANKED]) for s in result.scores.values() if RANKED in s]
        values = [result.scores[t][m] for t, m in zip(tasks, metrics, strict=True)]
        mean = np.mean([np.mean(v) for v in values])
        cells = [_mean_and_std(v) for v in values]
        rows.append(
            [result.method, *cells, f"{mean:.1f}", f"{np.mean(ranked):.1f}" if ranked else ""]
            + [f"{result.parameters:,.0f}", f"{result.seconds:.0f}"]
        )
    return rows


def _comparable(result: Result) -> bool:
    return result.method != "MPT" and all(
        len(values) > 1 for metrics in result.scores.values() for values in metrics.values()
    )


def _difference(results: Sequence[Result], other: Result) -> list[str]:
    """MPT minus another method over pairs of (task, seed), with a 95% t-interval."""
    mpt = next(result for result in results if result.method == "MPT")
    found = estimate(paired(mpt, other))
    interval = f"{found.low:+.1f} .. {found.high:+.1f}"
    return [other.method, f"{found.mean:+.1f}", interval, str(found.n)]


def learning_curves(root: Path, results: Sequence[Result]) -> bytes:
    """The training loss of both source stages and of every method, as PNG."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for stage in ("pt_source", "mpt_source"):
        axes[0].plot(*_curve(root / stage), label=stage)
    for result in results:
        name = result.method if result.shots is None else f"{result.method}, k={result.shots}"
        axes[1].plot(*_curve(Path(result.model_dirs[0])), label=name)
    for axis, title in zip(axes, ("source stages", "target tasks"), strict=True):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("cross entropy, nats per token")
    return _png(figure)


def similarity(artefact: artefacts.Artefact) -> bytes:
    """Cosine similarity of the tasks' flattened prompts, as PNG."""
    prompts = artefact.folded().reshape(artefact.runs.num_rows, -1)
    unit = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    names = [_short(name) for name in artefact.runs.run_names]
    figure, axis = pyplot.subplots(figsize=(5.2, 4.4), layout="constrained")
    image = axis.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(unit @ unit.T):
        color = "white" if abs(value) > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image)
    return _png(figure)


def _curve(model_dir: Path) -> tuple[list[int], list[float]]:
    lines = (json.loads(line) for line in (model_dir / METRICS).read_text().splitlines())
    points = [(x["step"], x["loss"]) for x in lines if x["folder"] == "train" and "loss" in x]
    return [step for step, _ in points], [loss for _, loss in points]


def _short(name: str) -> str:
    return name.removeprefix("toy_")


def _mean_and_std(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _text(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _png(figure: pyplot.Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    pyplot.close(figure)
    return content.getvalue()


def _page(tables: list[tuple[str, Rows]], figures: list[tuple[str, bytes]], closing: str) -> str:
    parts = []
    for title, rows in tables:
        cells = [
            "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
            for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
        ]
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        parts.append(f"<h2>{html.escape(title)}</h2><div class=wide><table>{body}</table></div>")
    for title, png in figures:
        data = base64.b64encode(png).decode()
        parts.append(
            f"<h2>{html.escape(title)}</h2>"
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>MPT on the toy suite</title><style>{STYLE}</style></head><body>"
        "<h1>Multitask prompt tuning on the toy suite</h1>"
        f"{''.join(parts)}<p>{html.escape(closing)}</p></body></html>\n"
    )

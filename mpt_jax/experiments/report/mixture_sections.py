"""Report sections for methods that mix candidate prompts: mixing weights and their entropy.

If the prompt of a task is fixed, the weights are read from the artifact. If it depends on the input
text, the weights are means over training texts, as last written to metrics.jsonl.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.experiments.report import analysis, figures, page, run_reader, run_sections, tables
from mpt_jax.experiments.report.analysis import examples, short
from mpt_jax.experiments.report.context import Content
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.models.metrics import MIXTURE

ENTROPY, NATS = f"{MIXTURE}_entropy", "entropy, nats"
SERVED = (
    "Weight of each candidate in the prompts of a task, as stored in its artifact and served; mean "
    "over the runs (seeds) of the task. The last column is the entropy of a run's weights."
)
SEEN = (
    "Weight of each candidate in the prompts of a task. They depend on the text: means over the "
    "training texts of the last steps in metrics.jsonl, and over the runs (seeds) of the task. The "
    "last column is the mean entropy of the weights of each text."
)


class Mixture(NamedTuple):
    """Weights of the candidate prompts in the prompt of one run, and their entropy."""

    task: str
    weights: dict[str, float]
    entropy: float


class Map(NamedTuple):
    """Mixtures of a result's runs, by task.

    Attributes:
        title: The label of the result.
        reads_text: Whether the weights depend on the input text.
        columns: The names of the candidates, then the name of the entropy.
        values: Task -> weights and entropy of its runs [runs, columns].
    """

    title: str
    reads_text: bool
    columns: list[str]
    values: dict[str, np.ndarray]

    @property
    def means(self) -> np.ndarray:
        """Means over the runs of each task [tasks, columns]."""
        return np.stack([rows.mean(0) for rows in self.values.values()])


def weights(content: Content) -> list[str]:
    """Returns heat maps of the weights, tasks by candidates, and tables of their spread over runs;
    [] without weights. Fixed weights and weights that depend on the text have separate figures."""
    maps = [
        mixture
        for shots, results in content.by_shots()
        for label, result in results.items()
        if (mixture := _map(content, f"{label}, {examples(shots)}", content.folders(result)))
    ]
    blocks = []
    for reads_text, caption in ((False, SERVED), (True, SEEN)):
        shown = [mixture for mixture in maps if mixture.reads_text == reads_text]
        if shown:
            scale = max(float(mixture.means[:, :-1].max()) for mixture in shown)
            blocks.append(
                page.figure([_heat_map(mixture, scale) for mixture in shown], caption, {})
            )
        blocks += [block for mixture in shown for block in _spread(mixture)]
    return blocks


def entropies(content: Content) -> list[str]:
    """Returns a figure of the entropy of the weights during training; [] if it was not recorded."""
    drawn, looks = [], content.styles
    for shots, results in content.by_shots():
        runs = {
            label: [
                c for path in content.folders(result) for c in run_reader.training(path, ENTROPY)
            ]
            for label, result in results.items()
        }
        drawn += run_sections.curve_panels(runs, examples(shots), NATS, looks, "")
    caption = (
        "Entropy of the weights during training, mean over the runs (task, seed) of a method. If "
        "training samples weights, the entropy is that of the samples."
    )
    return [content.figure(drawn, caption, looks)] if drawn else []


def _map(content: Content, title: str, paths: Sequence[Path]) -> Map | None:
    """Returns the mixtures of the runs in `paths`. Returns None if the runs do not mix prompts, or
    if their weights were not recorded, which is noted in the report."""
    by_task: dict[str, list[Mixture]] = collections.defaultdict(list)
    candidates: dict[str, None] = {}
    reads_text = False
    for path in paths:
        artifact = run_reader.artifact(path)
        if artifact is None or not artifact.method.candidates:
            continue
        candidates |= dict.fromkeys(artifact.method.candidates)
        reads_text |= artifact.method.reads_text
        for mixture in _seen(path, artifact) if artifact.method.reads_text else _served(artifact):
            by_task[mixture.task].append(mixture)
    if candidates and not by_task:
        content.absent.append(
            f"Weights of candidates, {title}: they depend on the text, and no run recorded them in "
            "metrics.jsonl."
        )
    if not by_task:
        return None
    values = {
        task: np.array(
            [[*(run.weights.get(name, 0.0) for name in candidates), run.entropy] for run in runs]
        )
        for task, runs in by_task.items()
    }
    return Map(title, reads_text, [*candidates, NATS], values)


def _served(artifact: Artifact) -> list[Mixture]:
    by_run, names = artifact.weights().astype(np.float64), artifact.method.candidates
    rows = zip(
        artifact.runs.task_names,
        by_run.tolist(),
        analysis.entropy(by_run),
        strict=True,
    )
    return [
        Mixture(task, dict(zip(names, row, strict=True)), float(entropy))
        for task, row, entropy in rows
    ]


def _seen(path: Path, artifact: Artifact) -> list[Mixture]:
    """Returns the mixtures of the artifact's runs whose weights are in the folder's
    metrics.jsonl."""
    logged, mixtures = run_reader.last(path), []
    for task, run in zip(artifact.runs.task_names, artifact.runs.run_names, strict=True):
        keys = {name: f"{MIXTURE}/{name}/{run}" for name in artifact.method.candidates}
        if all(key in logged for key in (*keys.values(), f"{ENTROPY}/{run}")):
            weights_of_run = {name: logged[key] for name, key in keys.items()}
            mixtures.append(Mixture(task, weights_of_run, logged[f"{ENTROPY}/{run}"]))
    return mixtures


def _heat_map(mixture: Map, scale: float) -> str:
    columns, means = list(map(short, mixture.columns)), mixture.means
    largest = ", ".join(
        f"{short(task)} {columns[np.argmax(row[:-1])]} {row[:-1].max():.2f}"
        for task, row in zip(mixture.values, means, strict=True)
    )
    low, high = means[:, -1].min(), means[:, -1].max()
    alt = (
        f"Weights of candidates, {mixture.title}. Largest: {largest}. Entropy {low:.2f} to "
        f"{high:.2f} nats."
    )
    rows = list(map(short, mixture.values))
    panel = Panel(mixture.title, "", "", alt)
    return figures.heat_map(panel, rows, columns, means, scale, ".2f", beside=1)


def _spread(mixture: Map) -> list[str]:
    """Returns a table of means and standard deviations over runs; [] if each task has one run."""
    if all(len(runs) == 1 for runs in mixture.values.values()):
        return []
    rows = [["", *map(short, mixture.columns), "n"]]
    for task, runs in mixture.values.items():
        cells = [tables.mean_and_std(column.tolist(), ".2f") for column in runs.T]
        rows.append([short(task), *cells, str(len(runs))])
    heading = f"{mixture.title}: mean ± standard deviation over runs"
    return [page.heading(heading), page.table(rows, heading)]

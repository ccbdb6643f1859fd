"""Sections of methods that mix prompts from candidates: the weight of each, and their entropy.

Where a task has one prompt, its weights are those of the artifact, which are served. Where prompts
depend on the text there are none but of texts: the means over those of training, as last written
to metrics.jsonl.
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
    "Weight of each candidate in the prompts of a task, as its artifact has them and they are "
    "served; mean over the runs (seeds) of the task. Beside them the entropy of a run's weights."
)
SEEN = (
    "Weight of each candidate in the prompts of a task. They depend on the text: means over the "
    "training texts of the last steps that metrics.jsonl tells of, and over the runs (seeds) of "
    "the task. The entropy beside them is the mean of each text's own."
)


class Mixture(NamedTuple):
    """What the prompts of one run are mixed from: candidate -> weight, and their entropy."""

    task: str
    weights: dict[str, float]
    entropy: float


class Map(NamedTuple):
    """The mixtures of a result's runs, by task.

    Attributes:
        title: what the result is called.
        reads_text: whether they depend on the text.
        columns: the candidates, and the entropy.
        values: task -> [runs, columns].
    """

    title: str
    reads_text: bool
    columns: list[str]
    values: dict[str, np.ndarray]

    @property
    def means(self) -> np.ndarray:
        """[tasks, columns], over runs."""
        return np.stack([rows.mean(0) for rows in self.values.values()])


def weights(content: Content) -> list[str]:
    """Heat maps of tasks by candidates, those that are served and those by the text apart."""
    maps = [
        found
        for shots, results in content.by_shots()
        for label, result in results.items()
        if (found := _map(content, f"{label}, {examples(shots)}", content.folders(result)))
    ]
    blocks = []
    for reads_text, caption in ((False, SERVED), (True, SEEN)):
        shown = [found for found in maps if found.reads_text == reads_text]
        if shown:
            scale = max(float(found.means[:, :-1].max()) for found in shown)
            blocks.append(page.figure([_heat_map(found, scale) for found in shown], caption, {}))
        blocks += [block for found in shown for block in _spread(found)]
    return blocks


def entropies(content: Content) -> list[str]:
    """Entropy of the weights while training."""
    drawn, looks = [], run_sections.unmarked(content.styles)
    for shots, results in content.by_shots():
        runs = {
            label: [
                c for path in content.folders(result) for c in run_reader.training(path, ENTROPY)
            ]
            for label, result in results.items()
        }
        drawn += run_sections.curve_panels(runs, examples(shots), NATS, looks, "")
    caption = (
        "Entropy of the weights while training, mean over the runs (task, seed) of a method; where "
        "training draws weights at random, of the drawn ones."
    )
    return [content.figure(drawn, caption, looks)] if drawn else []


def _map(content: Content, title: str, paths: Sequence[Path]) -> Map | None:
    """What the runs of some folders are mixed from; None where they are not mixed, and, with a
    word on it, where nothing tells."""
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
            f"Weights of candidates, {title}: they depend on the text, and none of its runs has "
            "them in a metrics.jsonl."
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
    found, names = artifact.weights().astype(np.float64), artifact.method.candidates
    rows = zip(artifact.runs.task_names, found.tolist(), analysis.entropy(found), strict=True)
    return [
        Mixture(task, dict(zip(names, row, strict=True)), float(entropy))
        for task, row, entropy in rows
    ]


def _seen(path: Path, artifact: Artifact) -> list[Mixture]:
    """Of the runs of a folder that its metrics tell of."""
    logged, found = run_reader.last(path), []
    for task, run in zip(artifact.runs.task_names, artifact.runs.run_names, strict=True):
        keys = {name: f"{MIXTURE}/{name}/{run}" for name in artifact.method.candidates}
        if all(key in logged for key in (*keys.values(), f"{ENTROPY}/{run}")):
            own = {name: logged[key] for name, key in keys.items()}
            found.append(Mixture(task, own, logged[f"{ENTROPY}/{run}"]))
    return found


def _heat_map(found: Map, scale: float) -> str:
    columns, means = list(map(short, found.columns)), found.means
    largest = ", ".join(
        f"{short(task)} {columns[np.argmax(row[:-1])]} {row[:-1].max():.2f}"
        for task, row in zip(found.values, means, strict=True)
    )
    low, high = means[:, -1].min(), means[:, -1].max()
    alt = (
        f"Weights of candidates, {found.title}. Largest: {largest}. Entropy {low:.2f} to "
        f"{high:.2f} nats."
    )
    rows = list(map(short, found.values))
    panel = Panel(found.title, "", "", alt)
    return figures.heat_map(panel, rows, columns, means, scale, ".2f", beside=1)


def _spread(found: Map) -> list[str]:
    """A table of means and standard deviations, where a task has several runs."""
    if all(len(runs) == 1 for runs in found.values.values()):
        return []
    rows = [["", *map(short, found.columns), "n"]]
    for task, runs in found.values.items():
        cells = [tables.mean_and_std(column.tolist(), ".2f") for column in runs.T]
        rows.append([short(task), *cells, str(len(runs))])
    heading = f"{found.title}: mean ± standard deviation over runs"
    return [page.heading(heading), page.table(rows, heading)]

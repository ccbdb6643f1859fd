"""Report sections read from run folders, as HTML blocks: curves, prompt similarity, provenance."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.experiments.report import analysis, figures, page, run_reader, tables
from mpt_jax.experiments.report.analysis import examples, short
from mpt_jax.experiments.report.context import Content, Drawn
from mpt_jax.experiments.report.figures import Line, Panel, Style

LOSS = "cross entropy, nats"
# Name in the report -> key in run.jsonl.
FACTS = {
    "MPT-JAX": "mpt_jax",
    "Git revision": "git_revision",
    "Python": "python",
    "Packages": "packages",
    "Devices": "devices",
    "Processes": "processes",
    "Platform": "platform",
    "Seed of values and data order": "seed",
}


def losses(content: Content) -> list[str]:
    """Returns plots of the training loss of the source stages and of every method."""
    stages = {
        name: run_reader.training(path) for name, path in run_reader.sources(content.root).items()
    }
    looks = {
        name: Style(figures.SERIES.format(i + 1), figures.MARKERS[i], figures.DASHES[i])
        for i, name in enumerate(stages)
    }
    unit = loss_unit(run_reader.sources(content.root).values())
    drawn = curve_panels(stages, "source stages", unit, looks, "y")
    blocks = [content.figure(drawn, "Training loss of the source stages.", looks)] if drawn else []
    drawn, looks = [], content.styles
    for shots, results in content.by_shots():
        runs = {
            label: [c for path in content.folders(result) for c in run_reader.training(path)]
            for label, result in results.items()
        }
        content.say_absent(f"Loss, {examples(shots)}", runs, "no metrics.jsonl among its runs")
        unit = loss_unit(path for result in results.values() for path in content.folders(result))
        drawn += curve_panels(runs, examples(shots), unit, looks, "y")
    caption = "Training loss on target tasks; each run (task, seed) of a method counts the same."
    return [*blocks, content.figure(drawn, caption, looks)] if drawn else blocks


def loss_unit(model_dirs: Iterable[Path]) -> str:
    """Returns the axis label of the loss of some jobs, which is per token for texts and per image
    for images."""
    of_images = {run_reader.is_of_images(path) for path in model_dirs}
    units = ["token"] * (False in of_images) + ["image"] * (True in of_images)
    return f"{LOSS} per {' or '.join(units)}"


def scores_by_step(content: Content) -> list[str]:
    """Returns plots of scores by step, for runs evaluated more than once; [] if there are none."""
    drawn, looks = [], content.styles
    for shots, results in content.by_shots():
        runs = {
            label: [
                curve
                for path in content.folders(result)
                for curve in run_reader.scores(path)
                if len(curve) > 1
            ]
            for label, result in results.items()
        }
        drawn += curve_panels(runs, examples(shots), "mean score", looks, "")
    if not drawn:
        content.absent.append("Score by step: no available run was evaluated more than once.")
        return []
    caption = "Score during training, mean over the runs (task, seed) of a method."
    return [content.figure(drawn, caption, looks)]


def curve_panels(
    runs: Mapping[str, Iterable[run_reader.Curve]],
    title: str,
    y: str,
    looks: Mapping[str, Style],
    log: str,
) -> list[Drawn]:
    """Returns the mean curve of each method, in one panel for each number of training steps."""
    by_length: dict[int, dict[str, run_reader.Curve]] = collections.defaultdict(dict)
    for label, curves in runs.items():
        for last, curve in analysis.mean_curves(curves).items():
            by_length[last][label] = curve
    drawn = []
    for last, by_label in sorted(by_length.items()):
        series = [
            Line(looks[label], list(curve), list(curve.values()))
            for label, curve in by_label.items()
        ]
        name = title if len(by_length) == 1 else f"{title}, {last:,} steps"
        ends = ", ".join(f"{label} {curve[last]:.3g}" for label, curve in by_label.items())
        alt = f"{y} by step, {name}. At the last step: {ends}."
        panel = Panel(name, "step", y, alt, log=log)
        drawn.append(Drawn(figures.lines(panel, series), list(by_label)))
    return drawn


def source_prompts(content: Content) -> list[str]:
    """Returns heat maps of the similarity between source prompts; [] without source artifacts."""
    sources = tables.trained(content.root)
    if not sources:
        content.absent.append(
            f"Similarity of source prompts: neither {content.root} nor its parent folder has a "
            "source stage with an artifact."
        )
        return []
    panels = []
    for name, artifact in sources.items():
        prompts = _plain(content, name, [artifact])
        if prompts is not None:
            panels.append(_similarity(name, prompts, artifact.runs.task_names))
    caption = "Cosine similarity of flattened prompts, source tasks."
    return [page.figure(panels, caption, {})] if panels else []


def target_prompts(content: Content) -> list[str]:
    """Returns a heat map of the similarity between one method's target prompts; [] without any.

    The method is the reference if its prompts are available and can be compared. Otherwise it is
    the first method for which this holds. Runs with the largest k are preferred to runs on all
    examples, because they have several seeds.
    """
    few = [k for k in analysis.shots_of(content.results) if k is not None]
    for label in dict.fromkeys([content.reference, *content.by_label]):
        cells = content.by_label.get(label, {})
        for shots in [k for k in (*reversed(few), None) if k in cells]:
            result = cells[shots]
            loaded = [run_reader.artifact(path) for path in content.folders(result)]
            kept: list[Artifact] = [artifact for artifact in loaded if artifact is not None]
            title = f"{label}, {examples(shots)}"
            prompts = _plain(content, title, kept) if kept else None
            if prompts is not None:
                tasks = [task for artifact in kept for task in artifact.runs.task_names]
                caption = (
                    "Cosine similarity of flattened prompts, target tasks: mean over pairs of "
                    "runs. The diagonal compares runs of one task with different seeds; it is 1 "
                    "for a task with one run."
                )
                return [page.figure([_similarity(title, prompts, tasks)], caption, {})]
    content.absent.append(
        "Similarity of target prompts: no available run has an artifact whose prompts can be "
        "compared."
    )
    return []


def _plain(content: Content, title: str, artifacts: Iterable[Artifact]) -> np.ndarray | None:
    """Returns the flattened prompts of artifacts [K, D]. If they cannot be compared, adds a note to
    the report and returns None."""
    try:
        return analysis.flat_prompts(artifacts)
    except ValueError as error:
        content.absent.append(f"Similarity of prompts, {title}: {error}")
        return None


def _similarity(title: str, prompts: np.ndarray, tasks: Iterable[str]) -> str:
    names, similar = analysis.cosines_by_task(prompts, list(tasks))
    shown = list(map(short, names))
    apart = similar[~np.eye(len(names), dtype=bool)]
    alt = f"Cosine similarity of prompts, {title}, {len(names)} tasks."
    if len(apart):
        alt += f" Between tasks: {apart.min():.2f} to {apart.max():.2f}."
    return figures.heat_map(Panel(title, "", "", alt), shown, shown, similar, 1.0, ".2f")


def provenance(content: Content) -> list[str]:
    """Returns the seeds and start times of the runs, and the `FACTS` that they recorded."""
    paths = [*run_reader.sources(content.root).values()]
    for result in content.results:
        here = content.folders(result)
        paths += here
        if len(here) < len(result.model_dirs):
            content.absent.append(
                f"{content.label(result)}, {examples(result.shots)}: "
                f"{len(result.model_dirs) - len(here)} of its {len(result.model_dirs)} run folders "
                f"are not below {content.root.resolve().parent}."
            )
    records = [record for path in paths for record in run_reader.records(path)]
    seeds = sorted({seed for result in content.results for seed in result.seeds})
    pairs = {"Draws of examples (seeds)": ", ".join(map(str, seeds))}
    if not records:
        content.absent.append("Versions, devices, revision: no available run has a run.jsonl.")
        return [page.facts(pairs)]
    for name, key in FACTS.items():
        pairs[name] = _values(record.get(key) for record in records)
    started = sorted(record["started"] for record in records)
    pairs["Runs started"] = f"{started[0]} to {started[-1]}"
    lead = f"From the records of {len(paths)} run folders; if they differ, all values are listed."
    return [page.paragraph(lead), page.facts(pairs)]


def _values(values: Iterable[Any]) -> str:
    """Returns the distinct values as text."""
    return "; ".join(dict.fromkeys(in_words(value) for value in values))


def in_words(value: Any) -> str:
    """Returns a value of a record as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(version)}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "not recorded" if value is None else str(value)

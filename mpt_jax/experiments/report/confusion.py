"""Confusion matrices of image tasks, counted from the predictions that an evaluation wrote.

Counts are sparse, and large tasks are drawn in part, so neither memory nor the page grows with the
square of the number of classes.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float

from mpt_jax.core import schema
from mpt_jax.core.comparison import abbreviate
from mpt_jax.experiments.report import figures, page, run_reader
from mpt_jax.experiments.report.figures import Panel

MOST_CLASSES = 30  # of a figure
MOST_FIGURES = 12  # of a page
MOST_CONFUSIONS = 10  # rows of the table of confusions
MOST_LETTERS = 24  # of a class name beside a figure
OTHER = "other classes"
CAPTION = (
    "Share of the images of a class (row, with their number) that are predicted as each class "
    "(column), in percent. Cells without images are empty."
)

Counts = Mapping[tuple[int, int], int]  # (class, predicted class) -> images


class Answer(msgspec.Struct):
    """The schema of a line of predictions, with only the fields that are counted."""

    target: schema.Count
    score: list[float] | None = None
    prediction: str | None = None


class Confusion(NamedTuple):
    """Predictions of one run at one step.

    Attributes:
        run: The name of the run.
        step: The step of the evaluation.
        names: The class names of the task, in label order.
        counts: The number of images of each class that were predicted as each class; pairs without
            images are absent.
    """

    run: str
    step: int
    names: Sequence[str]
    counts: Counts

    @property
    def images(self) -> int:
        """The number of evaluated images."""
        return sum(self.counts.values())

    def errors(self) -> list[tuple[int, int]]:
        """Returns the pairs of different classes, the most frequent confusion first."""
        wrong = [pair for pair in self.counts if pair[0] != pair[1]]
        return sorted(wrong, key=lambda pair: (-self.counts[pair], pair))

    def most_confused(self, most: int) -> list[int]:
        """Returns the `most` classes with the most errors, in label order: images of the class with
        another prediction, and images of others that are predicted as the class."""
        if len(self.names) <= most:
            return list(range(len(self.names)))
        errors: collections.Counter[int] = collections.Counter()
        for pair in self.errors():
            for number in pair:
                errors[number] += self.counts[pair]
        ranked = sorted(errors, key=lambda number: (-errors[number], number))
        rest = (number for number in range(len(self.names)) if number not in errors)
        while len(ranked) < most:
            ranked.append(next(rest))
        return sorted(ranked[:most])


def of_run(model_dir: Path, run: str, names: Sequence[str]) -> Confusion | str:
    """Returns the confusion of a single-label run at its last evaluation, or why there is none.

    Args:
        model_dir: The MODEL_DIR, or the output folder of an evaluation.
        run: The name of the run.
        names: The class names of its task, in label order.

    Raises:
        ValueError: the file of predictions is damaged, or does not fit the classes.
    """
    found = _last_file(model_dir, run)
    if found is None:
        return "no predictions are stored, see JSON_WRITE_N_RESULTS"
    step, path = found
    ids = {name: number for number, name in enumerate(names)}
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for what, line in run_reader.lines(path):
        answer = schema.check(line, Answer, what, run_reader.ADVICE)
        scores = (answer.score or [])[: len(names)]
        if any(map(math.isnan, scores)):
            return f"a score in {path} is NaN"
        if scores:
            predicted = int(np.argmax(scores))
        elif answer.prediction in ids:
            predicted = ids[answer.prediction]
        else:
            raise ValueError(
                f"{what} has neither scores nor one of the {len(names)} class names as its "
                f"prediction. {run_reader.ADVICE}"
            )
        if answer.target >= len(names):
            raise ValueError(
                f"{what} has the target {answer.target}, but ids of {len(names)} classes are 0 to "
                f"{len(names) - 1}. {run_reader.ADVICE}"
            )
        counts[answer.target, predicted] += 1
    return Confusion(run, step, names, counts) if counts else f"{path} is empty"


def _last_file(model_dir: Path, run: str) -> tuple[int, Path] | None:
    """Returns the last step with predictions of a run, and their file."""
    files = {}
    for path in (model_dir / run_reader.EVALUATIONS).glob("*.jsonl"):
        if match := re.fullmatch(r"(.+)-(\d{6,})\.jsonl", path.name):
            if match[1] == run:
                files[int(match[2])] = path
    return (max(files), files[max(files)]) if files else None


def of_model_dir(model_dir: Path, absent: list[str]) -> list[str]:
    """Returns a figure and a table for each single-label image task of a MODEL_DIR; [] for texts.

    Args:
        model_dir: The MODEL_DIR.
        absent: Notes about missing data, which this function extends.
    """
    classes, why = _classes(model_dir)
    if why:
        absent.append(f"Confusion matrices: {why}")
    found, missing = [], []
    for run, names in classes.items():
        confusion = of_run(model_dir, run, names)
        if isinstance(confusion, str):
            missing.append(f"{run} ({confusion})")
        else:
            found.append(confusion)
    if missing:
        absent.append(f"Confusion matrices of {'; '.join(missing)}.")
    if left := [confusion.run for confusion in found[MOST_FIGURES:]]:
        shown = abbreviate(left)
        absent.append(f"Confusion matrices of {shown}: a page shows {MOST_FIGURES} of them.")
    return [block for confusion in found[:MOST_FIGURES] for block in blocks(confusion)]


def _classes(model_dir: Path) -> tuple[dict[str, list[str]], str]:
    """Returns the class names of each single-label run, and why they are unknown; '' if they are
    known, or if the job is of texts."""
    artifact = run_reader.artifact(model_dir)
    if artifact is None:
        unnamed = f"{model_dir} has no artifact, which names the classes."
        return {}, unnamed if run_reader.is_of_images(model_dir) else ""
    tasks = (artifact.config.get("images") or {}).get("tasks", {})
    return {
        run: tasks[task]["names"]
        for run, task in zip(artifact.runs.run_names, artifact.runs.task_names, strict=True)
        if task in tasks and not tasks[task]["multi_label"]
    }, ""


def matrix(confusion: Confusion, shown: Sequence[int]) -> Float[np.ndarray, "R C"]:
    """Returns the shares in percent of the images of each shown class that are predicted as each
    shown class and, in a last column, as any other class. Cells without images are NaN."""
    place = {number: i for i, number in enumerate(shown)}
    counts = np.zeros((len(shown), len(shown) + 1))
    for (target, predicted), number in confusion.counts.items():
        if target in place:
            counts[place[target], place.get(predicted, len(shown))] += number
    totals = counts.sum(1, keepdims=True)
    return np.where(counts > 0, 100 * counts / np.maximum(totals, 1), np.nan)


def blocks(confusion: Confusion) -> list[str]:
    """Returns the figure of a confusion matrix, and the table of its most frequent errors."""
    total, names = confusion.images, list(map(shortened, confusion.names))
    shown = confusion.most_confused(MOST_CLASSES)
    every = len(shown) == len(names)
    values = matrix(confusion, shown)
    sizes: collections.Counter[int] = collections.Counter()
    for (target, _), number in confusion.counts.items():
        sizes[target] += number
    correct = sum(number for (a, b), number in confusion.counts.items() if a == b)
    title = f"{confusion.run}, step {confusion.step:,}"
    errors = confusion.errors()[:MOST_CONFUSIONS]
    said = [f"{names[a]} as {names[b]} {confusion.counts[a, b]:,}" for a, b in errors[:3]]
    alt = f"Confusion matrix of {title}: {correct:,} of {total:,} images are correct."
    alt += f" Most frequent errors: {', '.join(said)}." if said else ""
    rows = [f"{names[number]} ({sizes[number]:,})" for number in shown]
    columns = [names[number] for number in shown] + [OTHER] * (not every)
    svg = figures.heat_map(
        Panel(title, "predicted", "class", alt),
        rows,
        columns,
        values[:, : len(columns)],
        100.0,
        ".0f",
        beside=int(not every),
    )
    caption = CAPTION
    if not every:
        caption += f" The {len(shown)} of {len(names):,} classes with the most errors are shown."
    drawn = [page.heading(title), page.figure([svg], caption, {})]
    if not errors:
        return drawn
    table = [["class", "predicted", "images", "of the class"]]
    for a, b in errors:
        number = confusion.counts[a, b]
        full = confusion.names[a], confusion.names[b]
        table.append([*full, f"{number:,}", f"{100 * number / sizes[a]:.0f}%"])
    return [*drawn, page.table(table, f"Most frequent errors of {title}")]


def shortened(name: str) -> str:
    """Returns a class name that fits beside a figure."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"

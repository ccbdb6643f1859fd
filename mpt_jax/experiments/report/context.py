"""The content of a report, and helpers shared by its sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpt_jax.experiments.report import analysis, figures, page, run_reader, tables
from mpt_jax.experiments.report.figures import Line, Style
from mpt_jax.experiments.results import Estimate, Result, estimate

INTERVALS = "Bars are 95% t-intervals over seeds; results with a single seed have none."


class Drawn(NamedTuple):
    """An SVG panel and the labels of its series."""

    svg: str
    labels: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Content:
    """Results with their labels and styles.

    Attributes:
        root: The folder of results.json.
        results: All results.
        reference: The method that other methods are subtracted from.
        majority: Task -> majority-class share in percent, for tasks with a known share.
        by_label: Label -> shots -> result.
        tasks: The tasks that all results have.
        styles: Label -> style.
        absent: Notes about missing data, which sections add.
    """

    root: Path
    results: Sequence[Result]
    reference: str
    majority: Mapping[str, float]
    by_label: analysis.ByLabel
    tasks: tuple[str, ...]
    styles: Mapping[str, Style]
    absent: list[str] = dataclasses.field(default_factory=list)

    def label(self, result: Result) -> str:
        """Returns the label of a result."""
        return next(label for label, cells in self.by_label.items() if result in cells.values())

    def by_shots(self) -> Iterator[tuple[int | None, dict[str, Result]]]:
        """Yields each number of examples with its results by label."""
        for shots in analysis.shots_of(self.results):
            yield (
                shots,
                {k: cells[shots] for k, cells in self.by_label.items() if shots in cells},
            )

    def mean(self, result: Result) -> Estimate:
        """Returns the estimate, over seeds, of the mean over the common tasks."""
        return estimate(result.means(self.tasks))

    def folders(self, result: Result) -> list[Path]:
        """Returns the existing run folders of a result (`run_reader.own`)."""
        return run_reader.own(self.root, result)

    def say_absent(self, what: str, found: Mapping[str, Sequence], why: str) -> None:
        """Adds a note that lists the labels without data, and why the data are missing."""
        if missing := [label for label, some in found.items() if not some]:
            self.absent.append(f"{what}: {'; '.join(missing)} ({why}).")

    def figure(
        self, drawn: Sequence[Drawn], caption: str, looks: Mapping[str, Style], lines: bool = True
    ) -> str:
        """Returns a figure: panels, a caption and a legend of the series."""
        shown = {label for panel in drawn for label in panel.labels}
        legend = {k: figures.swatch(look, lines) for k, look in looks.items() if k in shown}
        return page.figure([panel.svg for panel in drawn], caption, legend)


def content(
    root: Path, results: Sequence[Result], reference: str, majority: Mapping[str, float]
) -> Content:
    """Returns the results with labels and styles.

    Raises:
        ValueError: there are no results, they have no task in common, two of them have the
            same label and number of examples, or the reference is unknown.
    """
    if not results:
        raise ValueError(
            f"The results.json in {root} contains no results. Finish `mpt-jax demo` or "
            "`mpt-jax paper` first, or pass another folder."
        )
    by_label = analysis.by_label(results)
    if reference not in by_label and reference != tables.REFERENCE:
        raise ValueError(
            f"No method is called {reference!r}. Set --reference to one of "
            f"{', '.join(map(repr, by_label))}."
        )
    tasks = analysis.common_tasks(results)
    return Content(root, results, reference, majority, by_label, tasks, figures.styles(by_label))


def interval_line(style: Style, points: Iterable[tuple[int | float, Estimate]]) -> Line:
    """Returns a series of (x, estimate) points: means with their intervals."""
    x, estimates = zip(*points, strict=True)
    means = [estimate.mean for estimate in estimates]
    spread = np.array([[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]])
    return Line(style, x, means, spread)

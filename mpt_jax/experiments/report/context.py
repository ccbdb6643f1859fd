"""What a report is made from, and what its sections share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpt_jax.experiments.report import analysis, figures, page, run_reader, tables
from mpt_jax.experiments.report.figures import Line, Style
from mpt_jax.experiments.results import Estimate, Result, estimate

INTERVALS = "Bars are 95% t-intervals over seeds; there is none where there is one seed."


class Drawn(NamedTuple):
    """A panel, and the labels of what it shows."""

    svg: str
    labels: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Content:
    """Results, how they are called and how they look.

    Attributes:
        root: where results.json lies.
        results: what was run.
        reference: the method that the others are subtracted from.
        majority: task -> percent of its rows that have the most frequent target, if known.
        by_label: the results by label and number of examples.
        tasks: those that all results have.
        styles: of every label.
        absent: gathers what there is nothing to show of.
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
        """What a result is called."""
        return next(label for label, cells in self.by_label.items() if result in cells.values())

    def by_shots(self) -> Iterator[tuple[int | None, dict[str, Result]]]:
        """Each number of examples, with its results by label."""
        for shots in analysis.shots_of(self.results):
            yield (
                shots,
                {k: cells[shots] for k, cells in self.by_label.items() if shots in cells},
            )

    def mean(self, result: Result) -> Estimate:
        """Of the mean over the common tasks, over seeds."""
        return estimate(result.means(self.tasks))

    def folders(self, result: Result) -> list[Path]:
        """The folders of its runs that are there."""
        return run_reader.own(self.root, result)

    def say_absent(self, what: str, found: Mapping[str, Sequence], why: str) -> None:
        """Notes the labels for which nothing was found."""
        if missing := [label for label, some in found.items() if not some]:
            self.absent.append(f"{what}: {'; '.join(missing)} ({why}).")

    def figure(
        self, drawn: Sequence[Drawn], caption: str, looks: Mapping[str, Style], lines: bool = True
    ) -> str:
        """Panels under a legend of what is in them."""
        shown = {label for panel in drawn for label in panel.labels}
        legend = {k: figures.swatch(look, lines) for k, look in looks.items() if k in shown}
        return page.figure([panel.svg for panel in drawn], caption, legend)


def content(
    root: Path, results: Sequence[Result], reference: str, majority: Mapping[str, float]
) -> Content:
    """Names and styles of results.

    Raises:
        ValueError: there are none, they cannot be compared, or none is the reference that was
            asked for.
    """
    if not results:
        raise ValueError(f"The results of {root} are an empty list, so there is nothing to report.")
    by_label = analysis.by_label(results)
    if reference not in by_label and reference != tables.REFERENCE:
        raise ValueError(f"No result is called {reference!r}; there are {list(by_label)}.")
    tasks = analysis.common_tasks(results)
    return Content(root, results, reference, majority, by_label, tasks, figures.styles(by_label))


def interval_line(style: Style, points: Iterable[tuple[int | float, Estimate]]) -> Line:
    """A series of means with their intervals."""
    at, found = zip(*points, strict=True)
    means = [estimate.mean for estimate in found]
    spread = np.array([[e.mean - e.low for e in found], [e.high - e.mean for e in found]])
    return Line(style, at, means, spread)

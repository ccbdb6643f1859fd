"""Which sections a report has: those that there are runs for, and a word on the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpt_jax.report import of_mixtures, of_results, of_runs, page, tables
from mpt_jax.report.content import Content, content
from mpt_jax.report.page import Section
from mpt_jax.results import Result

FILE = "report.html"


def write(
    root: Path,
    results: Sequence[Result],
    out: Path | None = None,
    reference: str = tables.REFERENCE,
    majority: Mapping[str, float] | None = None,
) -> Path:
    """Writes the report of a folder and returns where it is.

    Args:
        root: where results.json lies; source stages lie there or beside it.
        results: what was run.
        out: the file, if not root/report.html.
        reference: the method that the others are subtracted from.
        majority: task -> percent of its rows that have the most frequent target, if known.

    Raises:
        ValueError: results that cannot be compared, an unknown reference, a damaged file.
    """
    found = sections(content(root, results, reference, majority or {}))
    out = out or root / FILE
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"Prompt tuning: {root.resolve().name}"
    out.write_text(page.document(title, found), encoding="utf-8")
    return out


def sections(given: Content) -> list[Section]:
    """All that there is something to show in, in the order of the page."""
    found = [
        Section("Scores", of_results.scores(given)),
        Section("Learning curves", of_runs.losses(given) + of_runs.scores_by_step(given)),
        Section(
            "Similarity of prompts", of_runs.source_prompts(given) + of_runs.target_prompts(given)
        ),
        Section(
            "What prompts are mixed from",
            of_mixtures.weights(given) + of_mixtures.entropies(given),
        ),
        Section("Score and trained parameters", of_results.parameters(given)),
        Section("Transfer gain", of_results.gains(given)),
        Section("Examples needed", of_results.examples_needed(given)),
        Section("From source to target", of_results.affinity(given)),
        Section(
            "Prompt length and model size", of_results.lengths(given) + of_results.sizes(given)
        ),
        Section("Where this is from", of_runs.provenance(given)),
    ]
    if given.absent:
        found.append(Section("What is not shown", [page.points(given.absent)]))
    return [section for section in found if section.blocks]

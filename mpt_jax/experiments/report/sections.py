"""Assembly of the report from the sections that have data, and notes about missing data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpt_jax.experiments.report import (
    gain_sections,
    mixture_sections,
    page,
    result_sections,
    run_sections,
    tables,
    transfer_sections,
)
from mpt_jax.experiments.report.context import Content, content
from mpt_jax.experiments.report.page import Section
from mpt_jax.experiments.results import Result

FILE = "report.html"


def write(
    root: Path,
    results: Sequence[Result],
    out: Path | None = None,
    reference: str = tables.REFERENCE,
    majority: Mapping[str, float] | None = None,
) -> Path:
    """Writes the report of a folder and returns its path.

    Args:
        root: The folder of results.json. Source stages are in it or in its parent folder.
        results: All results.
        out: The output file; None for report.html in `root`.
        reference: The method that other methods are subtracted from.
        majority: Task -> majority-class share in percent, for tasks with a known share.

    Raises:
        ValueError: the results cannot be compared, the reference is unknown, or a file is damaged.
    """
    page_sections = sections(content(root, results, reference, majority or {}))
    out = out or root / FILE
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"Prompt tuning: {root.resolve().name}"
    out.write_text(page.document(title, page_sections), encoding="utf-8")
    return out


def sections(given: Content) -> list[Section]:
    """Returns the sections that have content, in the order of the page."""
    candidates = [
        Section("Scores", result_sections.scores(given)),
        Section("Learning curves", run_sections.losses(given) + run_sections.scores_by_step(given)),
        Section(
            "Similarity of prompts",
            run_sections.source_prompts(given) + run_sections.target_prompts(given),
        ),
        Section(
            "What prompts are mixed from",
            mixture_sections.weights(given) + mixture_sections.entropies(given),
        ),
        Section("Score and trained parameters", result_sections.parameters(given)),
        Section("Zero-shot and tuned", gain_sections.over_zero_shot(given)),
        Section("Transfer gain", gain_sections.over_baseline(given)),
        Section("Examples needed", result_sections.examples_needed(given)),
        Section("From source to target", transfer_sections.affinity(given)),
        Section(
            "Prompt length and model size",
            result_sections.lengths(given) + result_sections.sizes(given),
        ),
        Section("Provenance", run_sections.provenance(given)),
    ]
    if given.absent:
        candidates.append(Section("What is not shown", [page.points(given.absent)]))
    return [section for section in candidates if section.blocks]

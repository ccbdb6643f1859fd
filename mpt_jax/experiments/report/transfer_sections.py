"""Report sections about transfer from single sources: gains, rankings, groups, similarity."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core.tree import flatten
from mpt_jax.experiments.report import analysis, figures, page, run_reader, transfer
from mpt_jax.experiments.report.analysis import examples, short
from mpt_jax.experiments.report.context import Content
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.report.transfer import Transfer

MOST_RANKS = 5  # columns of a ranking
GROUPS = (
    "Targets with similar gains, by average linkage: groups are merged while the mean cosine "
    f"between the gains of their targets exceeds {transfer.SIMILAR}. The sources are ranked by "
    "their mean gain over the group."
)


def affinity(content: Content) -> list[str]:
    """Returns, of each method that starts from at least two sources, a heat map of the gains,
    sources by targets, and their analysis; [] if no method does."""
    found = transfer.of_results(content.results)
    if not found:
        return []
    panels = [_heat_map(each, _title(each, found)) for each in found]
    blocks = [page.figure(panels, _caption(found), {})]
    for each in found:
        blocks += _details(content, each, _title(each, found))
    return blocks


def _title(each: Transfer, found: Sequence[Transfer]) -> str:
    """Returns the number of examples, after the method if methods differ."""
    same = len({other.method for other in found}) == 1
    return examples(each.shots) if same else f"{each.method}, {examples(each.shots)}"


def _caption(found: Sequence[Transfer]) -> str:
    """Returns what gains are relative to."""
    pairs = dict.fromkeys((each.method, each.old and each.old.method) for each in found)
    parts = [
        f"{method} minus {old} without a source, paired by seed"
        if old
        else f"{method} minus its mean over the sources"
        for method, old in pairs
    ]
    own = any(set(each.sources) & set(each.targets) for each in found)
    note = " Tasks that are their own source do not enter means, rankings or groups." if own else ""
    return f"Mean gain in points, by source and target: {'; '.join(parts)}.{note}"


def _heat_map(each: Transfer, title: str) -> str:
    rows, columns = list(map(short, each.sources)), list(map(short, each.targets))
    best = [
        f"{task} {rows[order[0]]} {column[order[0]]:+.1f}"
        for task, column in zip(columns, each.gains_from_others.T, strict=True)
        if (order := transfer.ranking(column))
    ]
    alt = f"Gain by source and target, {title}. Best source: {', '.join(best)}."
    scale = float(np.max(np.nan_to_num(np.abs(each.gains)), initial=1.0))
    panel = Panel(title, "target", "source", alt)
    return figures.heat_map(panel, rows, columns, each.gains, scale, "+.1f")


def _details(content: Content, each: Transfer, title: str) -> list[str]:
    name = f"Ranking of sources, {title}"
    blocks = [page.heading(name), page.table(_ranks(each), name)]
    if len(each.targets) > 1:
        name = f"Groups of targets, {title}"
        similar = transfer.row_cosines(each.gains_from_others.T)
        groups = transfer.grouped(similar)
        order = [row for group in groups for row in group]
        shown = [short(each.targets[row]) for row in order]
        alt = f"Cosine similarity of the gains of targets, {title}, in {len(groups)} groups."
        panel = Panel(title, "", "", alt)
        svg = figures.heat_map(panel, shown, shown, similar[np.ix_(order, order)], 1.0, ".2f")
        caption = "Cosine similarity between the gains of targets over sources, in groups."
        blocks += [page.heading(name), page.paragraph(GROUPS)]
        blocks += [page.table(_group_rows(each, groups), name), page.figure([svg], caption, {})]
    return blocks + _prompts(content, each, title)


def _ranks(each: Transfer) -> list[list[str]]:
    """Returns a table of the best sources of each target, and the worst one."""
    gains = each.gains_from_others
    columns = {short(task): column for task, column in zip(each.targets, gains.T, strict=True)}
    columns["mean over targets"] = transfer.known_mean(gains, 1)
    ranks = min(MOST_RANKS, len(each.sources) - 1)
    rows = [["", *(f"{rank}." for rank in range(1, ranks + 1)), "last"]]
    for task, column in columns.items():
        order = transfer.ranking(column)
        named = [f"{short(each.sources[i])} {column[i]:+.1f}" for i in order]
        last = named.pop() if len(named) > 1 else ""
        rows.append([task, *(named + [""] * ranks)[:ranks], last])
    return rows


def _group_rows(each: Transfer, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    rows = [["group", "targets", "sources that help it most"]]
    for number, group in enumerate(groups, 1):
        mean = transfer.known_mean(each.gains_from_others[:, list(group)], 1)
        best = [f"{short(each.sources[i])} {mean[i]:+.1f}" for i in transfer.ranking(mean)[:3]]
        targets = ", ".join(short(each.targets[row]) for row in group)
        rows.append([str(number), targets, ", ".join(best)])
    return rows


# --- Similarity of prompts -----------------------------------------------------------------------


def _prompts(content: Content, each: Transfer, title: str) -> list[str]:
    """Returns a paragraph about the correlation of gains with the similarity of prompts; [] without
    the prompts, which is noted in the report."""
    name = f"Gain and similarity of prompts, {title}"
    try:
        found = _source_prompts(content, each), _target_prompts(content, each)
        widths = {prompts.shape[1] for by_task in found for prompts in by_task.values()}
        if not found[0] or len(widths) > 1:
            raise ValueError(
                "no artifact has prompts of all sources that can be compared with those of targets"
            )
    except ValueError as error:
        content.absent.append(f"{name}: {str(error).rstrip('.')}.")
        return []
    own, theirs = found
    targets = [task for task in each.targets if task in theirs or task in own]
    by_target = {task: own.get(task, theirs.get(task)) for task in targets}
    similar = transfer.similarities(own, {k: x for k, x in by_target.items() if x is not None})
    gains = each.gains[:, [each.targets.index(task) for task in targets]]
    same = [source for source in each.sources if source in targets]
    square = len(same) == len(targets) == len(each.sources)
    if square:
        order = [targets.index(source) for source in each.sources]
        similar, gains = similar[:, order], gains[:, order]
    result = transfer.agreement(np.where(np.isnan(similar), np.nan, gains), similar, square)
    return [page.heading(name), page.paragraph(_sentence(result))]


def _sentence(found: transfer.Agreement) -> str:
    what = (
        "Spearman's rank correlation between the gain from a source and the cosine of its prompt "
        "with that of the target (trained without a source)"
    )
    if math.isnan(found.rho):
        return f"{what} is undefined: n = {found.n} pairs that differ are too few."
    return (
        f"{what} is {found.rho:.2f}, n = {found.n} pairs of different tasks, p = {found.p:.3g} "
        "(two-sided, by permuting the tasks, since pairs that share one are not independent)."
    )


def _source_prompts(content: Content, each: Transfer) -> dict[str, np.ndarray]:
    """Returns source -> flattened prompts, from the artifact that the results started from; {} if
    it is not found. Runs that do not record it may have started from any with all sources."""
    started = {
        (artifact.config.get("started_from") or {}).get("artifact_sha256")
        for result in each.by_source.values()
        for path in content.folders(result)
        if (artifact := run_reader.artifact(path)) is not None
    }
    own = {path.resolve() for result in content.results for path in content.folders(result)}
    for folder in run_reader.stages(content.root):
        if folder.resolve() in own or not run_reader.has_tasks(folder, each.sources):
            continue
        artifact = run_reader.artifact(folder)
        assert artifact is not None  # `has_tasks` read its config.json
        if not started - {None} or artifacts.digest(flatten(artifact.params)) in started:
            prompts = _by_task([artifact])
            return {source: prompts[source] for source in each.sources}
    return {}


def _target_prompts(content: Content, each: Transfer) -> dict[str, np.ndarray]:
    """Returns target -> flattened prompts of the runs without a source."""
    paths: list[Path] = content.folders(each.old) if each.old is not None else []
    found = [run_reader.artifact(path) for path in paths]
    return _by_task([artifact for artifact in found if artifact is not None])


def _by_task(found: Sequence[Artifact]) -> dict[str, np.ndarray]:
    if not found:
        return {}
    rows = analysis.flat_prompts(found)
    prompts = collections.defaultdict(list)
    tasks = [task for artifact in found for task in artifact.runs.task_names]
    for task, row in zip(tasks, rows, strict=True):
        prompts[task].append(row)
    return {task: np.stack(rows) for task, rows in prompts.items()}

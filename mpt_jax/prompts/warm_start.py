"""Choice of the source artifact's rows that each run starts from, and their weighted mean.

Every `start_from` setting is converted to weights [K, S] of S source rows for K runs:

    'average'           all rows, equally weighted
    a run's name        the row of that run
    'same'              the row with the run's own name
    'same_or_average'   the row with the run's own name; if there is none, as 'average'
    a table             run -> {source run: weight}, or run -> 'average' or one source run
    NearestSource       the table computed from task embeddings (`spot`)

The method decides what is averaged: MPT averages factors, prompt tuning whole prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.core.runs import Runs, entry_of_run
from mpt_jax.core.shapes import Array
from mpt_jax.prompts.base import PromptMethod, source_rows
from mpt_jax.prompts.spot import NearestSource, SourceTable

FIRST = "first"  # the first of a method's `sources`

StartFrom = str | SourceTable | NearestSource


def source_weights(start_from: StartFrom, source_runs: Runs, runs: Runs) -> np.ndarray:
    """Returns the weight of each row of a source artifact in the initial value of each run.

    Args:
        start_from: the setting; see the module docstring.
        source_runs: the S runs of the artifact.
        runs: the K runs of the bank.

    Returns:
        Weights [K, S], not negative and not all zero for any run. They need not add up to one.

    Raises:
        ValueError: a name or run is unknown; a table has no entry for a run; weights are negative,
            not finite or all zero; `'same_or_average'` is set and the artifact has none of the
            runs; or the embeddings of a `NearestSource` have not been read.
    """
    if isinstance(start_from, Mapping):
        return np.stack([_table_row(start_from, source_runs, run) for run in runs.run_names])
    if isinstance(start_from, NearestSource):
        raise ValueError(
            f"The task embeddings in {start_from.source_embeddings} and "
            f"{start_from.target_embeddings} have not been read. Call NearestSource.choose, and "
            "pass the table of weights that it returns."
        )
    one_hot = np.eye(source_runs.num_rows)
    equal = np.ones(source_runs.num_rows)
    if start_from == "same":
        return np.stack([one_hot[source_runs.row(run)] for run in runs.run_names])
    if start_from == "same_or_average":
        known = [run in source_runs.run_names for run in runs.run_names]
        _report_new(runs, known, source_runs)
        return np.stack(
            [
                one_hot[source_runs.row(run)] if is_known else equal
                for run, is_known in zip(runs.run_names, known, strict=True)
            ]
        )
    weights = np.zeros(source_runs.num_rows)
    weights[source_rows(source_runs, start_from)] = 1
    return np.stack([weights] * runs.num_rows)


def named_sources(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of source prompts as a tuple.

    Raises:
        ValueError: `names` is empty, is a string instead of a list, or repeats a name.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(
            f"sources must be a non-empty list of distinct names, got {names!r}. Correct "
            "SOURCE_TASKS (for CrossPT, SOURCES)."
        )
    return tuple(names)


def group_weights(weights: np.ndarray, runs: Runs) -> np.ndarray:
    """Returns the weight [G, S] of each source row in the initial value of each group: the mean
    over the group's runs of their weights [K, S], each of which adds up to one."""
    relative = weights / weights.sum(-1, keepdims=True)
    groups = np.asarray(runs.group_of_row)
    return np.stack([relative[groups == group].mean(0) for group in range(runs.num_groups)])


def weighted_mean(weights: np.ndarray, rows: np.ndarray | Array) -> Array:
    """Returns means [K, ...] of rows [S, ...] with weights [K, S].

    A mean of a single row equals that row exactly.
    """
    values = np.asarray(rows, np.float32)
    means = []
    for row in np.asarray(weights, np.float32):
        chosen = np.flatnonzero(row)
        relative = row[chosen] / row.max()  # 1 for equal weights, so a single row stays exact
        weighted = relative.reshape(-1, *[1] * (values.ndim - 1)) * values[chosen]
        means.append(weighted.sum(0) * (1 / relative.sum()))
    return jnp.asarray(np.stack(means))


def shared_groups(weights: np.ndarray, source_runs: Runs, runs: Runs) -> list[int]:
    """Returns, for each of G groups, the group of the artifact that provides its shared parameters.

    All source rows that the runs of one group start from must be in the same group of the artifact.

    Args:
        weights: [K, S], from `source_weights`.
        source_runs: the S runs of the artifact.
        runs: the K runs of the bank.

    Raises:
        ValueError: a group's runs start from several groups of the artifact.
    """
    groups = []
    for group in range(runs.num_groups):
        rows = [row for row, number in enumerate(runs.group_of_row) if number == group]
        sources = [s for s in range(source_runs.num_rows) if weights[rows, s].any()]
        source_groups = sorted({source_runs.group_of_row[s] for s in sources})
        if len(source_groups) > 1:
            raise ValueError(
                f"The group of {', '.join(runs.run_names[row] for row in rows)} has one set of "
                f"shared parameters, but would start from runs in {len(source_groups)} groups of "
                "the initial artifact, whose shared parameters differ: "
                f"{', '.join(source_runs.run_names[s] for s in sources)}. Set START_FROM to runs "
                "of one group. If each run already starts from a single group, set GROUPS = "
                "'independent' instead."
            )
        groups += source_groups
    return groups


def check_own_prompts(
    method: PromptMethod, source_method: PromptMethod, source_runs: Runs, runs: Runs
) -> None:
    """Checks that each run of a bank gets the prompt that its `start_from` names, so that it can be
    evaluated. A method whose parameters are those of groups mixes the prompts of a group's runs.

    Args:
        method, runs: the method and the runs of the bank.
        source_method, source_runs: those of the artifact that it starts from.

    Raises:
        ValueError: runs of one group start from different prompts.
    """
    has_rows = any(axes[0] == "tasks" for axes in source_method.axes.values())
    names = range(source_runs.num_rows) if has_rows else source_runs.group_of_row
    for part in method.parts.values():
        start = getattr(part, "start_from", None)
        if {axes[0] for axes in part.axes.values()} != {"groups"} or not (
            isinstance(start, Mapping) or start == "same"
        ):
            continue
        weights = source_weights(start, source_runs, runs)
        relative = weights / weights.sum(-1, keepdims=True) @ np.eye(max(names) + 1)[list(names)]
        for row, group in enumerate(runs.group_of_row):
            first = runs.group_of_row.index(group)
            if not np.allclose(relative[row], relative[first]):
                raise ValueError(
                    f"The runs {runs.run_names[first]} and {runs.run_names[row]} are in one group "
                    f"and would share one prompt of the method {part.name!r}, but START_FROM gives "
                    "them different prompts of the initial artifact. Set GROUPS = 'independent'."
                )


def _table_row(table: SourceTable, source_runs: Runs, run: str) -> np.ndarray:
    entry = entry_of_run(table, run, "START_FROM")
    weights = np.zeros(source_runs.num_rows)
    if isinstance(entry, str):
        weights[source_rows(source_runs, entry)] = 1
        return weights
    for source, weight in entry.items():
        weights[source_runs.row(source)] = weight
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(
            f"START_FROM has invalid weights for {run!r}: {dict(entry)}. Use finite weights of at "
            "least 0, of which at least one is positive."
        )
    return weights


def _report_new(runs: Runs, known: list[bool], source_runs: Runs) -> None:
    if not any(known):
        raise ValueError(
            f"START_FROM = 'same_or_average' needs at least one run of this job in the initial "
            f"artifact, but none of {', '.join(runs.run_names)} is among its runs: "
            f"{', '.join(source_runs.run_names)}. If all runs are new, set START_FROM to "
            "'average'; otherwise correct RUN_NAMES or INITIAL_ARTIFACT."
        )
    for run, is_known in zip(runs.run_names, known, strict=True):
        logging.info(
            "%s %s.",
            run,
            "starts from its own row of the artifact"
            if is_known
            else "is new and starts from the average",
        )

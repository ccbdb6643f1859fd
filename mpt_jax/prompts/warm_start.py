"""Which rows of a source artifact every run starts from, and the mean of them.

All ways to say it come down to a table of weights [K, S], K runs from S rows:

    'average'           all rows alike
    a run's name        that row
    'same'              each run its namesake
    'same_or_average'   its namesake, or all rows alike where it has none
    a table             run -> {source run: weight}, or run -> 'average' or one source run
    NearestSource       the table that task embeddings give (`spot`)

What is averaged is the method's to say: MPT averages factors, prompt tuning whole prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.core.runs import Runs, look_up
from mpt_jax.core.shapes import Array
from mpt_jax.prompts.base import source_rows
from mpt_jax.prompts.spot import NearestSource, SourceTable

FIRST = "first"  # of the sources of a method that names them

StartFrom = str | SourceTable | NearestSource


def source_weights(start_from: StartFrom, source_runs: Runs, runs: Runs) -> np.ndarray:
    """How much of each row of a source artifact every run starts from.

    Args:
        start_from: see `StartFrom`.
        source_runs: the S rows of the artifact.
        runs: the K rows of the bank.

    Returns:
        [K, S], not negative, no row all zero; `mix` divides each row by its sum.

    Raises:
        ValueError: a name or a run that is not there; weights that are negative or all zero;
            `'same_or_average'` where no run has a namesake.
    """
    if isinstance(start_from, Mapping):
        return np.stack([_table_row(start_from, source_runs, run) for run in runs.run_names])
    if isinstance(start_from, NearestSource):
        raise ValueError(
            f"{start_from} reads task embeddings, and only train_state.fill does that: give the "
            "table of weights that comes of it."
        )
    one = np.eye(source_runs.num_rows)
    every = np.ones(source_runs.num_rows)
    if start_from == "same":
        return np.stack([one[source_runs.row(run)] for run in runs.run_names])
    if start_from == "same_or_average":
        known = [run in source_runs.run_names for run in runs.run_names]
        _report_new(runs, known, source_runs)
        return np.stack(
            [
                one[source_runs.row(run)] if is_known else every
                for run, is_known in zip(runs.run_names, known, strict=True)
            ]
        )
    chosen = np.zeros(source_runs.num_rows)
    chosen[source_rows(source_runs, start_from)] = 1
    return np.stack([chosen] * runs.num_rows)


def named_sources(names: Sequence[str]) -> tuple[str, ...]:
    """The names of source prompts, as a tuple.

    Raises:
        ValueError: none, one text in place of a list, or a name that stands twice.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"sources must be a list of different names, got {names!r}.")
    return tuple(names)


def weighted_mean(weights: np.ndarray, rows: np.ndarray | Array) -> Array:
    """Weighted means [K, ...] of rows [S, ...] by weights [K, S]; what starts from one row alone is
    exactly that row."""
    values = np.asarray(rows, np.float32)
    made = []
    for row in np.asarray(weights, np.float32):
        chosen = np.flatnonzero(row)
        relative = row[chosen] / row.max()  # ones where rows count alike, so that one is itself
        each = relative.reshape(-1, *[1] * (values.ndim - 1)) * values[chosen]
        made.append(each.sum(0) * (1 / relative.sum()))
    return jnp.asarray(np.stack(made))


def shared_groups(weights: np.ndarray, source_runs: Runs, runs: Runs) -> list[int]:
    """The group [G] of the source artifact whose shared values each group takes: that of all the
    rows which it starts from.

    Args:
        weights: [K, S], as `source_weights` gives them.
        source_runs: the S rows of the artifact.
        runs: the K rows of the bank.

    Raises:
        ValueError: the rows that a group starts from belong to several groups.
    """
    chosen = []
    for group in range(runs.num_groups):
        rows = [row for row, of in enumerate(runs.group_of_row) if of == group]
        sources = [s for s in range(source_runs.num_rows) if weights[rows, s].any()]
        found = sorted({source_runs.group_of_row[s] for s in sources})
        if len(found) > 1:
            raise ValueError(
                f"{', '.join(runs.run_names[row] for row in rows)} would share one prompt, but "
                "start from rows that were learned with the different shared prompts of "
                f"{len(found)} groups of the artifact "
                f"({', '.join(source_runs.run_names[s] for s in sources)}). Start them from rows "
                "of one group (start_from), or make them independent (GROUPS)."
            )
        chosen += found
    return chosen


def _table_row(table: SourceTable, source_runs: Runs, run: str) -> np.ndarray:
    chosen = look_up("run in the table start_from", run, table)
    weights = np.zeros(source_runs.num_rows)
    if isinstance(chosen, str):
        weights[source_rows(source_runs, chosen)] = 1
        return weights
    for source, weight in chosen.items():
        weights[source_runs.row(source)] = weight
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(
            f"start_from gives {run!r} the weights {dict(chosen)}: they must not be negative, "
            "and one of them must be more than zero."
        )
    return weights


def _report_new(runs: Runs, known: list[bool], source_runs: Runs) -> None:
    if not any(known):
        raise ValueError(
            f"None of the runs {', '.join(runs.run_names)} is in the artifact, which holds "
            f"{', '.join(source_runs.run_names)}: 'same_or_average' keeps rows of a name. For new "
            "tasks alone set start_from to 'average'."
        )
    for run, is_known in zip(runs.run_names, known, strict=True):
        logging.info(
            "%s %s.", run, "keeps its own row" if is_known else "is new and starts from the average"
        )

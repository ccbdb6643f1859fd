"""Record of a job's data: the source of each task, and the rows and digest of each split it uses.

The record is part of a job's fingerprint, and is written to artifacts and to the record of best
steps, so that scores of different data are never compared. Making it reads no data that a job would
not read anyway: a TFDS data set is recorded by name, version and number of rows, and only sources
with a method `sha256(split)`, such as files and listed images, are recorded with a digest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import seqio

from mpt_jax.core.runs import data_name
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.task_lookup import explain_missing_data

# {data of a run (`runs.data_name`): {"source": ..., "template": {...}, "splits": {split: {"rows":
# ..., "sha256": ...}}}}; sources without a template or a digest lack these keys.
DataRecord = dict[str, dict[str, Any]]


def of_job(configs: Iterable[DatasetConfig | None]) -> DataRecord:
    """Returns the record of the data of a job, as JSON values.

    Args:
        configs: the settings of its datasets, for training and evaluation; None is ignored.

    Raises:
        ValueError: rows of a file cannot be used, or data is not on this machine.
    """
    record: DataRecord = {}
    of_split = functools.cache(_of_split)  # the runs of a fleet draw from a few sources
    for cfg in filter(None, configs):
        for task in seqio.get_subtasks(cfg.provider()):
            name = data_name(task.name)
            splits = record[name]["splits"] if name in record else {}
            if cfg.split in splits:
                continue
            with explain_missing_data(task, cfg.split):
                # A few-shot source has the source that it draws from, and its name has the draw.
                source = task.source.source if hasattr(task.source, "draw") else task.source
                # A run may draw its validation images from train.
                split = getattr(task.source, "origin", str)(cfg.split)
                if split in (source.splits or ()):
                    entry = record.setdefault(name, {**_of_source(source), "splits": {}})
                    entry["splits"][cfg.split] = of_split(source, split, cfg.use_cached)
    return record


def _of_source(source: Any) -> dict[str, Any]:
    """Returns a source's name, or its class if it has no name, and its text template, if any."""
    while hasattr(source, "source"):  # of a division or a selection
        source = source.source
    tfds = getattr(getattr(source, "tfds_dataset", None), "name", None)
    # Paths are left out, since a folder may be moved.
    name = getattr(source, "data", None) or tfds or type(source).__name__
    template = getattr(source, "template", None)
    return {"source": name} | ({"template": dict(template)} if template else {})


def _of_split(source: Any, split: str, use_cached: bool) -> dict[str, Any]:
    if use_cached:  # the source itself may not be on this machine
        return {"rows": None}
    counts = (getattr(source, name, None) for name in ("num_prepared_rows", "num_rows"))
    rows = next(filter(None, counts), source.num_input_examples)(split)
    digest = source.sha256(split) if hasattr(source, "sha256") else None
    record = {"rows": None if rows is None else int(rows)}
    return record | ({} if digest is None else {"sha256": digest})

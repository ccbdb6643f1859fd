"""What lies in the folders of runs, as far as the report reads it.

A folder may lack any of its files: a run under T5X writes no metrics.jsonl, full fine-tuning no
artifact, and a results.json that was copied has no folders beside it. What is absent is empty here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core.old_names import existing_folder
from mpt_jax.experiments.results import Result, main_metric

METRICS, RECORD, ARTIFACT = "metrics.jsonl", "run.jsonl", "artifact"
# The source stages: of the demo below its root, of the paper's tables beside them. Where a table
# trains a source stage for each seed, the first is shown.
TEACHERS = ("pt_source", "teachers")
STUDENTS = ("mpt_source", "mpt_source_s0")

Curve = Mapping[int, float]  # step -> value


def own(root: Path, result: Result) -> list[Path]:
    """The folders of a result's runs that are there: below `root`, or beside it where tables share
    them."""
    found = [Path(name) for name in result.model_dirs]
    inside = root.resolve().parent
    return [path for path in found if path.is_dir() and path.resolve().is_relative_to(inside)]


def sources(root: Path) -> dict[str, Path]:
    """Name -> folder of the source stages, teachers first: below `root`, else beside it."""
    for base in (root, root.resolve().parent):
        found = {}
        for name, folders in (("Teachers (PT)", TEACHERS), ("MPT, one shared prompt", STUDENTS)):
            there = [base / folder for folder in folders if (base / folder).is_dir()]
            if there:
                found[name] = there[0]
        if found:
            return found
    return {}


def training(model_dir: Path, metric: str = "loss") -> list[Curve]:
    """A metric of training by step, of each run."""
    found: dict[str, dict[int, float]] = {}
    for line in _lines(model_dir / METRICS):
        if line["folder"] != "train":
            continue
        runs = [name for name in line if name.startswith(f"{metric}/")]
        for name in runs or [metric] * (metric in line):
            found.setdefault(name, {})[line["step"]] = line[name]
    return list(found.values())


def last(model_dir: Path) -> dict[str, float]:
    """The value of every metric of training where it was last written: runs that end first are in
    no later line."""
    found: dict[str, float] = {}
    for line in _lines(model_dir / METRICS):
        if line.pop("folder") == "train":
            found |= {name: float(value) for name, value in line.items()}
    return found


def scores(model_dir: Path) -> list[Curve]:
    """Main metric by step, of each run."""
    found = []
    for path in sorted((model_dir / "inference_eval").glob("*-metrics.jsonl")):
        curve = {}
        for line in _lines(path):
            step = line.pop("step")
            curve[step] = float(line[main_metric(line)])
        found.append(curve)
    return found


def artifact(model_dir: Path) -> Artifact | None:
    """What a run handed on; None if it has no prompt artifact.

    Raises:
        ValueError: there is one and it is damaged.
    """
    path = existing_folder(model_dir / ARTIFACT)
    return artifacts.load_artifact(path) if path.is_dir() else None


def records(model_dir: Path) -> list[Mapping[str, Any]]:
    """What a run says of itself, one for each of its starts."""
    return list(_lines(model_dir / RECORD))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file; none if it is absent.

    Raises:
        ValueError: a line is damaged.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of {path} is damaged ({error}); remove it to go on without."
            ) from error

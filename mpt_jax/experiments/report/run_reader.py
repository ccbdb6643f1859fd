"""Reader of run folders for the report.

Files and folders may be missing: T5X writes no metrics.jsonl, full fine-tuning writes no artifact,
and results.json may have been copied without the run folders. The functions return empty values for
missing data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core import schema
from mpt_jax.core.old_names import FOLDERS, existing_folder
from mpt_jax.experiments.results import Result, main_metric

METRICS, RECORD, ARTIFACT = "metrics.jsonl", "run.jsonl", "artifact"
EVALUATIONS = "inference_eval"  # the folder of metrics and predictions
# Folders of source stages: below the root of a demo, and beside the folder of a paper's table. If a
# table trains a source stage for each seed, the first is shown.
TEACHERS = ("pt_source", "teachers")
STUDENTS = ("mpt_source", "mpt_source_s0")

ADVICE = "Repair the line, or remove it to write the report without it."

Curve = Mapping[int, float]  # step -> value


class ArtifactTasks(msgspec.Struct):
    """The schema of an artifact's config.json, with only the field that `has_tasks` needs."""

    task_names: schema.Names


class Evaluated(msgspec.Struct):
    """The schema of a line of an evaluation's metrics; the other fields are numbers."""

    step: schema.Count


class Logged(Evaluated):
    """The schema of a line of metrics.jsonl; the other fields are numbers."""

    folder: str


def own(root: Path, result: Result) -> list[Path]:
    """Returns the run folders of a result that exist below the parent folder of `root`. Tables in
    the same parent folder can share runs."""
    folders = [Path(name) for name in result.model_dirs]
    parent = root.resolve().parent
    return [path for path in folders if path.is_dir() and path.resolve().is_relative_to(parent)]


def sources(root: Path) -> dict[str, Path]:
    """Returns name -> folder of the source stages, which are in `root` or in its parent folder."""
    for base in (root, root.resolve().parent):
        by_name = {}
        for name, folders in (("Teachers (PT)", TEACHERS), ("MPT, one shared prompt", STUDENTS)):
            existing = [base / folder for folder in folders if (base / folder).is_dir()]
            if existing:
                by_name[name] = existing[0]
        if by_name:
            return by_name
    return {}


def stages(root: Path) -> list[Path]:
    """Returns the folders with an artifact directly below `root` and below its parent folder."""
    return [
        path.parent.parent
        for base in (root, root.resolve().parent)
        for name in (ARTIFACT, *(old for old, new in FOLDERS.items() if new == ARTIFACT))
        for path in sorted(base.glob(f"*/{name}/config.json"))
    ]


def has_tasks(model_dir: Path, tasks: Sequence[str]) -> bool:
    """Whether the artifact in a MODEL_DIR has a run of each task.

    Raises:
        ValueError: its config.json is damaged.
    """
    path = existing_folder(model_dir / ARTIFACT) / "config.json"
    config = schema.load(path.read_bytes(), ArtifactTasks, f"{path}")
    return set(tasks) <= set(config.task_names)


def training(model_dir: Path, metric: str = "loss") -> list[Curve]:
    """Returns one curve of a training metric for each run, or a single curve if the metric is not
    logged by run."""
    return list(curves(model_dir, metric).values())


def curves(model_dir: Path, metric: str = "loss", folder: str = "train") -> dict[str, Curve]:
    """Returns `<metric>/<run>` -> curve, or `<metric>` -> curve if it is not logged by run.

    Reads the lines of one folder of the log, such as `train` or `training_eval/<mixture>`.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in _metrics(model_dir / METRICS, Logged):
        if line["folder"] != folder:
            continue
        runs = [name for name in line if name.startswith(f"{metric}/")]
        for name in runs or [metric] * (metric in line):
            curves.setdefault(name, {})[line["step"]] = line[name]
    return dict(curves)


def last(model_dir: Path) -> dict[str, float]:
    """Returns the last value of every training metric. All lines are read, because later lines
    lack the runs that finished early."""
    values: dict[str, float] = {}
    for line in _metrics(model_dir / METRICS, Logged):
        if line.pop("folder") == "train":
            values |= {name: float(value) for name, value in line.items()}
    return values


def scores(model_dir: Path) -> list[Curve]:
    """Returns one curve of the main metric for each run. All curves of a job have the same steps:
    an ended run is not evaluated again, and keeps its last score."""
    curves = [
        {step: scores[main_metric(scores)] for step, scores in by_step.items()}
        for by_step in evaluations(model_dir).values()
        if by_step
    ]
    steps = sorted(set().union(*curves))
    return [
        curve | {step: curve[max(curve)] for step in steps if step > max(curve)} for curve in curves
    ]


def evaluations(model_dir: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Returns run -> step -> metric -> value of all evaluations."""
    by_run: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted((model_dir / EVALUATIONS).glob("*-metrics.jsonl")):
        by_step = by_run[path.name.removesuffix("-metrics.jsonl")] = {}
        for line in _metrics(path, Evaluated):
            step = line.pop("step")
            by_step[step] = {name: float(value) for name, value in line.items()}
    return by_run


def artifact(model_dir: Path) -> Artifact | None:
    """Loads the artifact in a MODEL_DIR, or returns None if there is none.

    Raises:
        ValueError: the artifact is damaged.
    """
    path = existing_folder(model_dir / ARTIFACT)
    return artifacts.load_artifact(path) if path.is_dir() else None


def records(model_dir: Path) -> list[Mapping[str, Any]]:
    """Returns the records in run.jsonl, one for each start of the job."""
    return [line for _, line in lines(model_dir / RECORD)]


def is_of_images(model_dir: Path) -> bool:
    """Whether the records in run.jsonl are those of a job for images."""
    return any("image_transform_sha256" in record for record in records(model_dir))


def _metrics(path: Path, kind: type[Evaluated]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of metrics: the fields of `kind`, and numbers.

    Raises:
        ValueError: a line is not valid JSON, lacks a field, or a value is not a number.
    """
    for what, line in lines(path):
        schema.check(line, kind, what, ADVICE)
        metrics = {name: x for name, x in line.items() if name not in kind.__struct_fields__}
        schema.check(metrics, dict[str, float], what, ADVICE)
        yield line


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name for errors, object) for each line of a JSON Lines file, which is read one line
    at a time. A missing file counts as empty.

    Raises:
        ValueError: a line is not valid JSON, too long, or not an object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(schema.MOST_BYTES + 1), b""), 1):
            what = f"Line {number} of {path}"
            yield what, schema.load(line, dict[str, Any], what, ADVICE)

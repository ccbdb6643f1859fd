"""Stages of sequences of tasks (MULTI-LANE), one for each task; all seeds train in one job.

A score is one of `sequence_metrics`, over all tasks of a sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from mpt_jax.evaluation.finalize import ARTIFACT
from mpt_jax.experiments import results, sequence_metrics
from mpt_jax.experiments.paper.chains import Cell
from mpt_jax.experiments.paper.suites import Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.paper.variants import Variant
from mpt_jax.experiments.results import Result
from mpt_jax.experiments.stages import Run, Stage, quoted


@dataclasses.dataclass(frozen=True)
class SequenceCell(Cell):
    """A variant of a table of sequences.

    Attributes:
        name: The suite's name of the sequences.
        sequences: The tasks of the sequence of each seed.
    """

    name: str
    sequences: tuple[tuple[str, ...], ...]

    def collect(self, root: Path, suite: Suite) -> Result:
        """Returns the metrics of each sequence."""
        del suite
        job = self.jobs[-1]
        by_seed = [self._scores(root, tasks) for tasks in self.sequences]
        scores = {m: [getattr(x, m) for x in by_seed] for m in sequence_metrics.METRICS}
        record = results.read_record(root / job.name)
        saved = results.read_artifact_config(root / job.name / ARTIFACT)
        trained = record["trainable_parameters"]
        return Result(
            self.variant.name,
            None,
            {self.name: scores},
            parameters=trained / len(self.sequences),
            seconds=sum(results.training_seconds(root / x.name) for x in self.jobs),
            model_dirs=tuple(str(root / x.name) for x in self.jobs),
            seeds=tuple(range(len(self.sequences))),
            stored=sum(math.prod(shape) for shape in saved.shapes.values()) / len(self.sequences),
            backbone_parameters=record["parameters"] - trained,
            backbone=saved.backbone,
        )

    def _scores(self, root: Path, tasks: Sequence[str]) -> sequence_metrics.SequenceScores:
        steps = [tasks] if len(self.jobs) == 1 else [tasks[: i + 1] for i in range(len(tasks))]
        found = [
            results.read_scores(root / job.name, seen)
            for job, seen in zip(self.jobs, steps, strict=True)
        ]
        if len(self.jobs) == 1:  # all tasks at once
            return sequence_metrics.of_joint(found[0])
        return sequence_metrics.of_stages(found)[1]


def cells(table: Table, suite: Suite, root: Path) -> list[Cell]:
    """Returns the cells of a table of sequences; stages are below `root`."""
    suite.register()
    (name,) = table.tasks
    sequences = tuple(tuple(suite.sequence(name, seed)) for seed in range(table.seeds))
    return [_cell(variant, suite, root, name, sequences) for variant in table.variants]


def _cell(
    variant: Variant,
    suite: Suite,
    root: Path,
    name: str,
    sequences: tuple[tuple[str, ...], ...],
) -> SequenceCell:
    length, jobs = len(sequences[0]), []
    for step in [length] if variant.joint else range(1, length + 1):
        bindings = [
            *variant.bindings,
            f"SEQUENCES = {quoted(sequences)}",
            f"STEP = {step}",
            f"TASK_MODULES = {quoted(suite.modules)}",
            "infer_eval/utils.DatasetConfig.split = %EVAL_SPLIT",
        ]
        if jobs:
            bindings.append(f"INITIAL_ARTIFACT = {quoted(str(root / jobs[-1].name / ARTIFACT))}")
        seen = [task for tasks in sequences for task in tasks[:step]]
        runs = tuple(Run(task, 0, task) for task in seen)
        folder = f"{variant.folder}/{name}_s0-{len(sequences) - 1}/stage_{step}"
        files = (*variant.files, *suite.files)
        steps = suite.sequence_steps and suite.sequence_steps * (length if variant.joint else 1)
        jobs.append(Stage(folder, files, tuple(bindings), runs, steps))
    return SequenceCell(variant, None, (), tuple(jobs), (), tuple(jobs), name, sequences)

"""Stages as command lines, and jobs that train one run for each target task and seed.

A *stage* is one command line with a separate folder below a root. It runs in this process, or is
printed for a scheduler. In both cases, the files in its folder show whether it is finished. A *job*
is a stage that trains several runs (target task x seed) at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from mpt_jax.config import gin_utils
from mpt_jax.core.old_names import existing_folder
from mpt_jax.core.runs import Runs
from mpt_jax.data import task_lookup
from mpt_jax.evaluation import evaluator
from mpt_jax.evaluation.finalize import ARTIFACT, TRAINED_BACKBONE, all_ended
from mpt_jax.experiments import costs, results
from mpt_jax.tasks import few_shot

FOLDER_MACROS = {"train": "MODEL_DIR", "eval": "EVAL_OUTPUT_DIR"}


class Run(NamedTuple):
    """One adaptation to a target task, trained on one draw of its examples."""

    task: str
    seed: int
    name: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """The command line of a stage.

    Attributes:
        name: The folder below the root, used as MODEL_DIR or EVAL_OUTPUT_DIR.
        files: The gin files, in order.
        bindings: The gin bindings, each as `NAME = value`.
        runs: The runs that the stage trains or evaluates; () for a source stage.
        steps: The number of training steps; None uses the value from the gin files.
        entry: The command: `'train'` or `'eval'`.
        sets_root: Whether to set the folder through ROOT and STAGE instead of `FOLDER_MACROS`, so
            that gin files find artifacts of earlier stages below the same root.
    """

    name: str
    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    steps: int | None = None
    entry: str = "train"
    sets_root: bool = False

    def arguments(self, root: Path) -> tuple[str, ...]:
        """Returns all bindings, including those of the folder and the number of steps."""
        steps = () if self.steps is None else (f"TRAIN_STEPS = {self.steps}",)
        folder = (f"{FOLDER_MACROS[self.entry]} = {quoted(str(root / self.name))}",)
        if self.sets_root:
            folder = (f"ROOT = {quoted(str(root))}", f"STAGE = {quoted(self.name)}")
        return (*folder, *steps, *self.bindings)

    def command(self, root: Path) -> str:
        """Returns the command line, quoted for a shell. It selects MPT-JAX's trainer, because T5X
        writes a different run record and keeps the last step instead of the best."""
        flags = [f"--gin_file={name}" for name in self.files]
        for binding in self.arguments(root):
            name, _, value = binding.partition(" = ")
            flags.append(f"--gin.{name}={value}")
        return shlex.join(["python", "-m", f"mpt_jax.{self.entry}", *flags])

    def run(self, root: Path) -> None:
        """Runs the stage in this process. An interrupted training stage resumes."""
        logging.info("=== %s", self.name)
        gin_utils.run_stage(self.files, self.arguments(root), self.entry)

    def is_done(self, root: Path) -> bool:
        """Whether the files in the stage's folder show that it is finished."""
        folder = root / self.name
        if self.entry == "eval":
            return all(
                (folder / "inference_eval" / f"{run.name}-metrics.jsonl").exists()
                for run in self.runs
            )
        exported = any(
            existing_folder(folder / name).is_dir() for name in (ARTIFACT, TRAINED_BACKBONE)
        )
        trained = self.steps is None or (folder / f"checkpoint_{self.steps}").is_dir()
        return exported and (trained or all_ended(folder))


@dataclasses.dataclass(frozen=True)
class Draws:
    """How few-shot runs draw their examples.

    Attributes:
        balanced: Whether to draw k // labels training examples of each label, instead of k from all
            examples. Tasks without labels draw from all.
        few_dev: Whether the validation split is cut to as many examples as the training split. A
            smaller split, such as CB's of 28, is kept whole.
        per_class: Whether k is the number of training examples of each class, as for images.
    """

    balanced: bool = False
    few_dev: bool = False
    per_class: bool = False

    def run_name(self, task: str, shots: int, seed: int) -> str:
        """Returns the name of a run's SeqIO task (`few_shot`).

        Raises:
            ValueError: the draw is balanced and the task has more labels than `shots`.
        """
        if self.per_class:
            return few_shot.Draw(task, shots, seed, per_class=True, dev=self.few_dev).name
        labels = evaluator.labels_of(task_lookup.find_task(task)) if self.balanced else ()
        if len(labels) > shots:
            raise ValueError(
                f"A balanced draw has an example of each label, but k = {shots} is less than the "
                f"{len(labels)} labels of {task}. Drop --balanced, or choose a table with a larger "
                "k."
            )
        k = shots // len(labels) if labels else shots
        dev = self.few_dev
        if dev:
            published = task_lookup.find_task(task).num_input_examples("validation")
            dev = published is None or published >= shots
        return few_shot.Draw(task, k, seed, per_class=bool(labels), dev=dev).name


def target_runs(
    tasks: Sequence[str], seeds: Sequence[int], shots: int | None, draws: Draws = Draws()
) -> tuple[Run, ...]:
    """Returns a run for every task and seed, named like its few-shot SeqIO task (`few_shot`). With
    all examples and one seed, a run has the name of the task."""
    if shots is not None:
        name = lambda task, seed: draws.run_name(task, shots, seed)  # noqa: E731
    else:
        name = lambda task, seed: task if len(seeds) == 1 else f"{task}_s{seed}"  # noqa: E731
    return tuple(Run(task, seed, name(task, seed)) for task in tasks for seed in seeds)


# Quotes a string for gin and Python. Double quotes survive a shell better.
quoted = json.dumps


def target_bindings(
    runs: Sequence[Run], rows: int | float, groups: str | Sequence[int] = "independent"
) -> list[str]:
    """Returns the bindings of a job's runs: tasks, names, groups and batch size.

    Args:
        runs: The runs, in the order of the bank rows.
        rows: The number of examples of each run in a step; the mean over runs if runs share a
            group.
        groups: The groups of runs that share parameters, as in `Runs.groups`.
    """
    table = Runs([run.task for run in runs], [run.name for run in runs], groups)
    return [
        f"TARGET_TASKS = {quoted([run.task for run in runs])}",
        f"RUN_NAMES = {quoted([run.name for run in runs])}",
        f"GROUPS = {quoted(groups)}",
        f"BATCH_SIZE = {round(rows * len(runs) / table.num_groups)}",
    ]


def collect(
    root: Path,
    method: str,
    shots: int | None,
    jobs: Sequence[Stage],
    scored: Sequence[Stage] = (),
    sources: Sequence[Stage] = (),
    start: str | None = None,
) -> results.Result:
    """Collects the results of finished jobs. Scores of jobs that repeat a run with another random
    seed are averaged.

    Args:
        root: The folder of all stages.
        method: The name in tables.
        shots: The number of training examples of each task; None for all.
        jobs: The training stages; () for a method without training.
        scored: The stages with the scores; () if these are the jobs.
        sources: The source stages that the jobs need.
        start: The source task whose prompt initialized all prompts, if any.

    Raises:
        FileNotFoundError: a run was not evaluated.
        ValueError: the tasks were run with different seeds.
    """
    seeds, repeats = _scores(root, method, scored or jobs)
    if not jobs:
        scores = {task: results.over_repeats(found) for task, found in repeats.items()}
        return results.Result(method, shots, scores, 0.0, 0.0, (), seeds)
    records = [results.read_record(root / job.name) for job in jobs]
    saved = results.read_artifact_config(root / jobs[0].name / ARTIFACT)
    num_trainable, num_runs = records[0]["trainable_parameters"], len(jobs[0].runs)
    stored = sum(math.prod(shape) for shape in saved.shapes.values()) or num_trainable
    operations = [costs.training_operations(record) for record in records]
    return results.Result(
        method=method,
        shots=shots,
        scores={task: results.over_repeats(scores) for task, scores in repeats.items()},
        repeat_stds={task: results.repeat_stds(scores) for task, scores in repeats.items()},
        parameters=num_trainable / num_runs,
        stored=stored / num_runs,
        operations=math.fsum(operations) if all(operations) else 0.0,
        seconds=math.fsum(results.training_seconds(root / job.name) for job in jobs),
        source_seconds=_source_seconds([root / stage.name for stage in sources]),
        model_dirs=tuple(str(root / job.name) for job in jobs),
        seeds=seeds,
        prompt_length=records[0].get(
            "prompt_length", records[0]["method_config"].get("prompt_length", 0)
        ),
        backbone_parameters=records[0]["parameters"] - num_trainable,
        start=start,
        backbone=saved.backbone,
    )


def _scores(
    root: Path, method: str, scored: Sequence[Stage]
) -> tuple[tuple[int, ...], dict[str, list[dict[str, list[float]]]]]:
    """Returns the seeds in order, and task -> for each seed, metric -> one value per repeat.

    Raises:
        FileNotFoundError: a run was not evaluated.
        ValueError: the tasks were run with different seeds.
    """
    by_task: dict[str, dict[int, list[Mapping[str, float]]]] = {}
    for stage in scored:
        scores = results.read_scores(root / stage.name, [run.name for run in stage.runs])
        for run in stage.runs:
            by_task.setdefault(run.task, {}).setdefault(run.seed, []).append(scores[run.name])
    seeds = {tuple(sorted(by_seed)) for by_seed in by_task.values()}
    if len(seeds) != 1:
        listed = "; ".join(
            f"{task}: {', '.join(map(str, sorted(by_seed)))}" for task, by_seed in by_task.items()
        )
        raise ValueError(
            f"The tasks of {method!r} were run with different seeds ({listed}). Run every task "
            "with the same seeds."
        )
    order = seeds.pop()
    repeats = {
        task: [results.by_name(by_seed[seed]) for seed in order]
        for task, by_seed in by_task.items()
    }
    return order, repeats


def _source_seconds(folders: Sequence[Path]) -> float | None:
    """Returns the training time of source stages; None if a folder was removed."""
    if not all((folder / "metrics.jsonl").exists() for folder in folders):
        return None
    return math.fsum(results.training_seconds(folder) for folder in folders)

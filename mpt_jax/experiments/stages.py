"""Stages as commands, and the jobs that adapt a grid of target tasks and seeds.

A *stage* is one command line with a folder of its own below a root. It runs here, in this process,
or is printed for a scheduler; either way what it leaves says whether it is done. A *job* is a stage
that trains several runs (target x seed) at once.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from mpt_jax.config import gin_utils
from mpt_jax.core.old_names import existing_folder
from mpt_jax.core.runs import Runs
from mpt_jax.evaluation.finalize import ARTIFACT, TRAINED_BACKBONE, all_ended
from mpt_jax.experiments import results

FOLDER_MACROS = {"train": "MODEL_DIR", "eval": "EVAL_OUTPUT_DIR"}


class Run(NamedTuple):
    """One adaptation: a target task learned from one draw of its examples."""

    task: str
    seed: int
    name: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: its folder below the root, MODEL_DIR or EVAL_OUTPUT_DIR.
        files: gin files, in order.
        bindings: as after `--gin.`, `NAME = value`.
        runs: those it trains or evaluates; () for a source stage.
        steps: how many a training stage takes.
        entry: `'train'` or `'eval'`.
    """

    name: str
    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    steps: int | None = None
    entry: str = "train"

    def arguments(self, root: Path) -> tuple[str, ...]:
        """All bindings, with the folder."""
        steps = () if self.steps is None else (f"TRAIN_STEPS = {self.steps}",)
        return (
            f"{FOLDER_MACROS[self.entry]} = {quoted(str(root / self.name))}",
            *steps,
            *self.bindings,
        )

    def command(self, root: Path) -> str:
        """The command line, for a shell. It names our trainer: T5X leaves another record of a run,
        and its last step instead of its best."""
        given = [f"--gin_file={name}" for name in self.files]
        for binding in self.arguments(root):
            name, _, value = binding.partition(" = ")
            given.append(f"--gin.{name}={value}")
        return shlex.join(["python", "-m", f"mpt_jax.{self.entry}", *given])

    def run(self, root: Path) -> None:
        """Runs it here; a training stage goes on where an interrupted one stopped."""
        logging.info("=== %s", self.name)
        gin_utils.run_stage(self.files, self.arguments(root), self.entry)

    def is_done(self, root: Path) -> bool:
        """Whether it ran to its end."""
        folder = root / self.name
        if self.entry == "eval":
            return all(
                (folder / "inference_eval" / f"{run.name}-metrics.jsonl").exists()
                for run in self.runs
            )
        handed_on = any(
            existing_folder(folder / name).is_dir() for name in (ARTIFACT, TRAINED_BACKBONE)
        )
        trained = self.steps is None or (folder / f"checkpoint_{self.steps}").is_dir()
        return handed_on and (trained or all_ended(folder))


def target_runs(tasks: Sequence[str], seeds: Sequence[int], shots: int | None) -> tuple[Run, ...]:
    """The runs of every task and seed; their names are those of the SeqIO tasks they train on. A
    single run on all examples goes by the task's own name."""
    few = "" if shots is None else f"_k{shots}"
    alone = shots is None and len(seeds) == 1
    name = lambda task, seed: task if alone else f"{task}{few}_s{seed}"  # noqa: E731
    return tuple(Run(task, seed, name(task, seed)) for task in tasks for seed in seeds)


# Strings as gin and Python read them, in double quotes, which survive a shell better.
quoted = json.dumps


def target_bindings(
    runs: Sequence[Run], rows: int | float, groups: str | Sequence[int] = "independent"
) -> list[str]:
    """What a job of these runs binds.

    Args:
        runs: in the order of the bank's rows.
        rows: examples of each run in a step, on average where runs share a group.
        groups: which runs learn together, as `Runs` has it.
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
    start: str | None = None,
) -> results.Result:
    """What finished jobs reached.

    Args:
        root: holds their folders.
        method: name in tables.
        shots: training examples of each task; None for all.
        jobs: the training stages.
        scored: the stages that evaluated them, if not they themselves.
        start: the source task that they started from, if it was one.

    Raises:
        FileNotFoundError: a run was not evaluated.
        ValueError: tasks have different seeds.
    """
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for stage in scored or jobs:
        scores = results.read_scores(root / stage.name, [run.name for run in stage.runs])
        for run in stage.runs:
            found.setdefault(run.task, {})[run.seed] = scores[run.name]
    seeds = {tuple(sorted(by_seed)) for by_seed in found.values()}
    if len(seeds) != 1:
        raise ValueError(f"The tasks of {method!r} have different seeds: {sorted(seeds)}.")
    order = seeds.pop()
    record = results.read_record(root / jobs[0].name)
    config = existing_folder(root / jobs[0].name / ARTIFACT) / "config.json"
    learned = record["trainable_parameters"]
    return results.Result(
        method=method,
        shots=shots,
        scores={
            task: {name: [by_seed[s][name] for s in order] for name in by_seed[order[0]]}
            for task, by_seed in found.items()
        },
        parameters=learned / len(jobs[0].runs),
        seconds=sum(results.training_seconds(root / job.name) for job in jobs),
        model_dirs=tuple(str(root / job.name) for job in jobs),
        seeds=order,
        prompt_length=record.get("prompt_length", record["method_config"].get("prompt_length", 0)),
        backbone_parameters=record["parameters"] - learned,
        start=start,
        backbone=json.loads(config.read_text())["backbone"] if config.exists() else "",
    )

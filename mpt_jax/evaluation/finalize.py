"""Writes the final prompt artifacts and a per-run summary when a job ends.

    MODEL_DIR/artifact           all runs
    MODEL_DIR/artifacts/<run>    each run separately, if a job has several groups
    MODEL_DIR/backbone           the backbone, if it was trained
    MODEL_DIR/fleet.json         each run's state (finished, failed or trained), steps and score

The artifact of a failed run has the prompt of the run's best step. A run that failed before its
first evaluation has no artifact.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import msgspec
import numpy as np
import seqio
from absl import logging
from etils import epath

from mpt_jax import convert
from mpt_jax.artifacts import artifacts, model_card, provenance
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.core import schema
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs, data_name
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, merge, unflatten
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.models.model import Model
from mpt_jax.runtime.files import write_atomic
from mpt_jax.training.initialization import InitialParams
from mpt_jax.training.partitioning import to_host
from mpt_jax.training.selection import SelectBest
from mpt_jax.training.state import num_trainable_params
from mpt_jax.training.trainer import Trainer

ARTIFACT, ARTIFACTS, FLEET = "artifact", "artifacts", "fleet.json"
TRAINED_BACKBONE = "backbone"
FINISHED, FAILED, TRAINED = "finished", "failed", "trained"


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """Outcome of one run.

    Attributes:
        run, task: the names of the run and its task.
        state: `'failed'` if a loss or gradient of the run was not finite; `'finished'` if its
            schedule ended or its patience ran out; `'trained'` if it trained until the job ended.
        step: the job's step at which the run stopped training. In a job that was never extended,
            this is the number of steps that the run took.
        best_step: the step of the run's artifact; None if it has no artifact.
        score: the score at `best_step`; None if the job does not select the best step.
    """

    run: str
    task: str
    state: Literal["finished", "failed", "trained"]
    step: int
    best_step: int | None
    score: float | None


class Fleet(msgspec.Struct):
    """The schema of fleet.json."""

    runs: list[RunOutcome]


@dataclasses.dataclass(frozen=True)
class EndedJob:
    """A job that has taken its last step.

    Attributes:
        trainer: the trainer, which has the last state.
        best: the action that kept the best parameters; None if the job does not select the best
            step.
        scores: metrics of each run, from the last evaluation.
        initial: the job's initial parameters.
        backbone: the name of the backbone.
        data_cfg: the settings of the training data.
        evaluated: {run: number of examples that it was evaluated on}.
        evaluated_split: the split of those examples.
        not_evaluated: {run: the split that its task lacks}, see `PeriodicEvaluator`.
        data: the record of the job's data, see `mpt_jax.data.records`.
        all_failed: whether the job stops because every run has failed. The step at which the last
            runs fail is not taken, so the trainer's state does not record these failures.
    """

    trainer: Trainer
    best: SelectBest | None
    scores: Mapping[str, Mapping[str, float]]
    initial: InitialParams
    backbone: str
    data_cfg: DatasetConfig
    evaluated: Mapping[str, int]
    evaluated_split: str
    not_evaluated: Mapping[str, str]
    data: Mapping[str, Any]
    all_failed: bool = False

    def best_params(self) -> dict[str, Any]:
        """Returns all parameters, at each group's best step if it has one, else at the last
        step."""
        state = self.trainer.state
        if self.best is None:
            return state.params
        return merge(self.best.parameters(state), state.frozen)

    def best_step(self) -> int:
        """Returns the step of `best_params`; with several groups, the latest of their steps."""
        steps = self.best.best_step if self.best else [-1]
        return max(step if step >= 0 else self.trainer.step for step in steps)

    def best_scores(self) -> Mapping[str, Mapping[str, float]]:
        """Returns {run: {metric: value}} for `best_params`."""
        return self.best.scores if self.best else self.scores


def finalize_run(model_dir: str, job: EndedJob) -> None:
    """Writes the prompt artifacts of a job, and its backbone if it was trained.

    The parameters are those of each group's best step if the job selects it, else of the last step.
    """
    params = to_host(job.best_params())  # all processes take part
    if jax.process_index() != 0:
        return
    backbone = {name: params[name] for name in params if name not in ("prompt", "teacher")}
    pattern = job.trainer.model.backbone_pattern
    trained = any(re.fullmatch(pattern, name) for name in flatten(job.trainer.state.trainable))
    if "prompt" in params:
        job = _with_trained_backbone(job, backbone) if trained else job
        write_artifacts(model_dir, job, params["prompt"])
    if trained:
        folder = epath.Path(model_dir) / TRAINED_BACKBONE
        folder.rmtree(missing_ok=True)  # from an earlier end of this job
        config = job.trainer.model.backbone_config
        saved = convert.save_backbone(folder, backbone, config, job.best_step())
        logging.info("Saved the trained backbone to %s.", saved)


def _with_trained_backbone(job: EndedJob, backbone: Params) -> EndedJob:
    """Returns the job with the digests of its trained backbone. Its prompts work only with that
    backbone, not with the one that training started from."""
    embedding = artifacts.embedding_digest(job.trainer.model.embedding(backbone))
    off = job.initial.backbone_sha256 is None
    weights = None if off else backbone_digest(backbone)
    initial = dataclasses.replace(job.initial, embedding_sha256=embedding, backbone_sha256=weights)
    return dataclasses.replace(job, initial=initial)


def outcomes(job: EndedJob) -> list[RunOutcome]:
    """Returns the outcome of each run of a job."""
    trainer, best = job.trainer, job.best
    runs, results, last = trainer.model.runs, [], int(trainer.state.step)
    scores = best.best_group_scores() if best else [math.nan] * runs.num_groups
    for run, task, group in zip(runs.run_names, runs.task_names, runs.group_of_row, strict=True):
        failed, ended = job.all_failed or bool(trainer.failed[group]), int(trainer.ended[group])
        step = ended if ended >= 0 else last
        best_step = best.best_step[group] if best else -1
        if best_step < 0:
            best_step = None if failed else step
        score = None if math.isnan(scores[group]) else scores[group]
        state = FAILED if failed else FINISHED if ended >= 0 else TRAINED
        results.append(RunOutcome(run, task, state, step, best_step, score))
    return results


def report(model_dir: str, found: Sequence[RunOutcome]) -> None:
    """Writes MODEL_DIR/fleet.json, and logs which runs stopped training before the job ended."""
    runs = [dataclasses.asdict(outcome) for outcome in found]
    path = epath.Path(model_dir) / FLEET
    write_atomic(path, json.dumps({"runs": runs}, indent=1) + "\n")
    for outcome in found:
        run, step, best_step = outcome.run, outcome.step, outcome.best_step
        kept = (
            "It has no artifact" if best_step is None else f"Its artifact is from step {best_step}"
        )
        if outcome.state == FAILED:
            logging.error("Run %s failed at step %d. %s.", run, step, kept)
        elif outcome.state == FINISHED and len(found) > 1:
            logging.info("Run %s finished at step %d. %s.", run, step, kept)
    if len(found) > 1:
        counts = {
            state: sum(outcome.state == state for outcome in found)
            for state in (TRAINED, FINISHED, FAILED)
        }
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        logging.info("%d runs: %s (%s).", len(found), summary, path)


def all_ended(model_dir: str | os.PathLike[str]) -> bool:
    """Whether a job ended because all of its runs stopped training. False if all runs failed,
    because such a job ends with an error."""
    path = epath.Path(model_dir) / FLEET
    if not path.exists():
        return False
    advice = "Copy it again, or remove it and rerun the command of the job to write it again."
    states = {run.state for run in schema.load(path.read_bytes(), Fleet, f"{path}", advice).runs}
    return TRAINED not in states and FINISHED in states


def take(
    model: Model, prompt: Params, rows: Sequence[int]
) -> tuple[dict[str, Any], Runs, list[int]]:
    """Extracts the parameters of some runs of a job.

    Args:
        model: the job's model.
        prompt: the method's parameters.
        rows: the bank rows of the runs to extract.

    Returns:
        The parameters of these runs, their `Runs`, and the indices of their groups in the job.
    """
    runs = model.runs
    groups = sorted({runs.group_of_row[row] for row in rows})
    indices = {"tasks": list(rows), "groups": groups}
    leaves = {
        name: np.asarray(leaf)[indices[model.rows[f"prompt/{name}"]]]
        if f"prompt/{name}" in model.rows
        else leaf
        for name, leaf in flatten(prompt).items()
    }
    taken = Runs(
        [runs.task_names[row] for row in rows],
        [runs.run_names[row] for row in rows],
        [groups.index(runs.group_of_row[row]) for row in rows],
    )
    return unflatten(leaves), taken, groups


def card_facts(job: EndedJob) -> model_card.Facts:
    """Returns the facts that model cards state beyond the configurations of the artifacts."""
    trainer, provider = job.trainer, job.data_cfg.provider()
    return model_card.Facts(
        data={task.name: model_card.data_of(task) for task in seqio.get_subtasks(provider)},
        trained_on=getattr(provider, "overlong", {}),
        evaluated=job.evaluated,
        evaluated_split=job.evaluated_split,
        not_evaluated=job.not_evaluated,
        num_trainable=num_trainable_params(trainer.model, trainer.state.trainable),
        git_revision=provenance.git_revision(),
        packages=provenance.package_versions(),
    )


def write_artifacts(model_dir: str, job: EndedJob, prompt: Params) -> None:
    """Writes the artifacts and the summary of a job; called in one process only.

    Args:
        model_dir: MODEL_DIR.
        job: the ended job.
        prompt: the method's parameters, from each group's best step.
    """
    facts = card_facts(job)
    results = outcomes(job)
    report(model_dir, results)
    kept = [row for row, outcome in enumerate(results) if outcome.best_step is not None]
    folders = {ARTIFACT: kept} if kept else {}
    if job.trainer.model.runs.num_groups > 1:
        folders |= {f"{ARTIFACTS}/{results[row].run}": [row] for row in kept}
    for folder, rows in folders.items():
        _write(epath.Path(model_dir) / folder, job, prompt, facts, {r: results[r] for r in rows})
    if job.not_evaluated:
        logging.info(
            "These runs were not evaluated, so their scores did not select a best step: %s.",
            abbreviate(list(job.not_evaluated)),
        )
    if kept:
        logging.info("Prompt artifact: %s", epath.Path(model_dir) / ARTIFACT)


def _write(
    folder: epath.Path,
    job: EndedJob,
    prompt: Params,
    facts: model_card.Facts,
    kept: Mapping[int, RunOutcome],
) -> None:
    """Writes one artifact with the bank rows in `kept`. Only the artifact of all runs has the facts
    of all runs, since a job may have thousands of artifacts."""
    model, best, initial = job.trainer.model, job.best, job.initial
    params, runs, groups = take(model, prompt, list(kept))
    select = lambda table: {run: table[run] for run in runs.run_names if run in table}  # noqa: E731
    metrics: dict[str, Any] = {"scores": select(job.best_scores())}
    if best is not None:
        of_group = {model.runs.group_of_row[row]: outcome for row, outcome in kept.items()}
        metrics |= {
            "best_step": [of_group[group].best_step for group in groups],
            "best_score": [of_group[group].score for group in groups],
        }
    if len(kept) < model.runs.num_rows:
        facts = dataclasses.replace(
            facts,
            data=select(facts.data),
            trained_on=select(facts.trained_on),
            evaluated=select(facts.evaluated),
            not_evaluated=select(facts.not_evaluated),
            num_trainable=num_trainable_params(model, {"prompt": params}),
        )
    artifacts.save_artifact(
        folder,
        model.prompt,
        params,
        runs,
        digests=initial.digests,
        backbone=job.backbone,
        backbone_config=backbone_config(model.backbone_config),
        step=max(outcome.best_step or 0 for outcome in kept.values()),
        metrics=metrics,
        data={n: job.data[n] for n in map(data_name, runs.run_names) if n in job.data},
        started_from=initial.started_from,
        images=_of_tasks(model.input_settings, runs.task_names),
        include_folded=True,
        facts=facts,
    )


def _of_tasks(images: Mapping[str, Any] | None, tasks: Sequence[str]) -> dict[str, Any] | None:
    """Returns the record of a model's inputs with the classes of some tasks only."""
    if images is None:
        return None
    return {**images, "tasks": {task: images["tasks"][task] for task in dict.fromkeys(tasks)}}

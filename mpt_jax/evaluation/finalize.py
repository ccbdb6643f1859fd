"""Writes the final prompt artifacts and a per-run summary when a job ends.

    MODEL_DIR/artifact           all runs
    MODEL_DIR/artifacts/<run>    each run separately, if a job has several groups
    MODEL_DIR/backbone           the backbone, if it was trained
    MODEL_DIR/fleet.json         of every run: finished, failed or trained; step, best step, score

A failed run leaves its best step if it was evaluated before it failed, otherwise nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
from absl import logging
from etils import epath

from mpt_jax import convert
from mpt_jax.artifacts import artifacts, model_card, provenance
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, merge, unflatten
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.models.encoder_decoder import BACKBONE, PromptedEncoderDecoder
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
    """How one run fared.

    Attributes:
        run, task: its names.
        state: `'failed'` where a number was not finite; `'finished'` where its schedule or its
            patience ended; `'trained'` where it trained until the job ended.
        step: the job's step when it left the training; of a job that was never extended, how many
            steps it took.
        best_step: the step that its artifact is from; None where it hands on nothing.
        score: at that step; None where steps are not selected.
    """

    run: str
    task: str
    state: str
    step: int
    best_step: int | None
    score: float | None


@dataclasses.dataclass(frozen=True)
class EndedJob:
    """A job that has taken its last step.

    Attributes:
        trainer: holds the last state.
        best: has the best parameters; None if the job selects no steps.
        scores: of each run, from the last evaluation.
        initial: what the job started from.
        backbone: its name.
        data_cfg: what it trained on.
        evaluated: run -> number of examples that it was evaluated on.
        evaluated_split: their split.
        all_failed: whether the job stops because every run has failed. The last of them fail at a
            step that is not taken, so the state does not record it.
    """

    trainer: Trainer
    best: SelectBest | None
    scores: Mapping[str, Mapping[str, float]]
    initial: InitialParams
    backbone: str
    data_cfg: DatasetConfig
    evaluated: Mapping[str, int]
    evaluated_split: str
    all_failed: bool = False

    def best_params(self) -> dict[str, Any]:
        """Every parameter: of each group's best step if steps are selected, else the last."""
        if self.best is None:
            return self.trainer.state.params
        assert self.best.trainable is not None  # what `best` means
        return merge(self.best.trainable, self.trainer.state.frozen)

    def best_step(self) -> int:
        """The step that `best_params` are from; with several groups, of the latest of them."""
        return max(self.best.best_step) if self.best else self.trainer.step

    def best_scores(self) -> Mapping[str, Mapping[str, float]]:
        """Run -> metric -> value of `best_params`."""
        return self.best.scores if self.best else self.scores


def finalize_run(model_dir: str, job: EndedJob) -> None:
    """Writes the prompt artifacts of a job, and its backbone if that was trained. If every run
    failed, writes each group's best earlier step."""
    params = to_host(job.best_params())  # all processes take part
    if jax.process_index() != 0:
        return
    if "prompt" in params:
        write_artifacts(model_dir, job, params["prompt"])
    if any(re.fullmatch(BACKBONE, name) for name in flatten(job.trainer.state.trainable)):
        backbone = {name: params[name] for name in params if name not in ("prompt", "teacher")}
        folder = epath.Path(model_dir) / TRAINED_BACKBONE
        folder.rmtree(missing_ok=True)  # of an earlier end of this job
        logging.info("Trained backbone: %s", convert.save_t5x(folder, backbone, job.best_step()))


def outcomes(job: EndedJob) -> list[RunOutcome]:
    """How each run of a job fared."""
    trainer, best = job.trainer, job.best
    runs, found, last = trainer.model.runs, [], int(trainer.state.step)
    scores = best.best_group_scores() if best else [math.nan] * runs.num_groups
    for run, task, group in zip(runs.run_names, runs.task_names, runs.group_of_row, strict=True):
        failed, ended = job.all_failed or bool(trainer.failed[group]), int(trainer.ended[group])
        step = ended if ended >= 0 else last
        chosen = best.best_step[group] if best else -1
        if chosen < 0:
            chosen = None if failed else step
        score = None if math.isnan(scores[group]) else scores[group]
        state = FAILED if failed else FINISHED if ended >= 0 else TRAINED
        found.append(RunOutcome(run, task, state, step, chosen, score))
    return found


def report(model_dir: str, found: Sequence[RunOutcome]) -> None:
    """Writes MODEL_DIR/fleet.json, and logs the runs that did not train until the job ended."""
    runs = [dataclasses.asdict(ending) for ending in found]
    path = epath.Path(model_dir) / FLEET
    write_atomic(path, json.dumps({"runs": runs}, indent=1) + "\n")
    for ending in found:
        kept = "nothing" if ending.best_step is None else f"its step {ending.best_step}"
        if ending.state == FAILED:
            logging.error("%s failed at step %d; it leaves %s.", ending.run, ending.step, kept)
        elif ending.state == FINISHED and len(found) > 1:
            logging.info("%s finished at step %d; it leaves %s.", ending.run, ending.step, kept)
    if len(found) > 1:
        counts = {
            state: sum(ending.state == state for ending in found)
            for state in (TRAINED, FINISHED, FAILED)
        }
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        logging.info("%d runs: %s (%s).", len(found), told, path)


def all_ended(model_dir: str | os.PathLike[str]) -> bool:
    """Whether a job has ended because none of its runs would learn any more. One whose runs have
    all failed has ended in an error."""
    path = epath.Path(model_dir) / FLEET
    if not path.exists():
        return False
    states = {run["state"] for run in json.loads(path.read_text())["runs"]}
    return TRAINED not in states and FINISHED in states


def take(
    model: PromptedEncoderDecoder, prompt: Params, rows: Sequence[int]
) -> tuple[dict[str, Any], Runs, list[int]]:
    """Some runs of a job by themselves.

    Args:
        model: whose prompts.
        prompt: the method's parameters.
        rows: which rows of the bank.

    Returns:
        Their parameters, a table of them, and the groups of the job that they come from.
    """
    runs = model.runs
    groups = sorted({runs.group_of_row[row] for row in rows})
    chosen = {"tasks": list(rows), "groups": groups}
    leaves = {
        name: np.asarray(leaf)[chosen[model.rows[f"prompt/{name}"]]]
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
    """What model cards say about a job beside its artifacts' configurations."""
    trainer, provider = job.trainer, job.data_cfg.provider()
    return model_card.Facts(
        data={task.name: model_card.data_of(task) for task in seqio.get_subtasks(provider)},
        trained_on=getattr(provider, "overlong", {}),
        evaluated=job.evaluated,
        evaluated_split=job.evaluated_split,
        trained_numbers=num_trainable_params(trainer.model, trainer.state.trainable),
        git_revision=provenance.git_revision(),
        packages=provenance.package_versions(),
    )


def write_artifacts(model_dir: str, job: EndedJob, prompt: Params) -> None:
    """Writes the artifacts and the summary of a job; for one process.

    Args:
        model_dir: MODEL_DIR.
        job: which has ended.
        prompt: the method's parameters, of each run's best step.
    """
    facts = card_facts(job)
    found = outcomes(job)
    report(model_dir, found)
    kept = [row for row, ending in enumerate(found) if ending.best_step is not None]
    folders = {ARTIFACT: kept} if kept else {}
    if job.trainer.model.runs.num_groups > 1:
        folders |= {f"{ARTIFACTS}/{found[row].run}": [row] for row in kept}
    for folder, rows in folders.items():
        path, step = epath.Path(model_dir) / folder, max(found[row].best_step or 0 for row in rows)
        _write(path, job, prompt, facts, rows, step)
    if kept:
        logging.info("Prompt artifact: %s", epath.Path(model_dir) / ARTIFACT)


def _write(
    folder: epath.Path,
    job: EndedJob,
    prompt: Params,
    facts: model_card.Facts,
    rows: Sequence[int],
    step: int,
) -> None:
    """Writes one artifact. A job may have thousands, so all runs of the job are read only for the
    artifact that holds them all."""
    model, best, initial = job.trainer.model, job.best, job.initial
    params, runs, groups = take(model, prompt, rows)
    of_runs = lambda table: {run: table[run] for run in runs.run_names if run in table}  # noqa: E731
    metrics: dict[str, Any] = {"scores": of_runs(job.best_scores())}
    if best is not None:
        metrics |= {
            "best_step": [best.best_step[group] for group in groups],
            "best_score": [best.best_score(group) for group in groups],
        }
    if len(rows) < model.runs.num_rows:
        facts = dataclasses.replace(
            facts,
            data=of_runs(facts.data),
            trained_on=of_runs(facts.trained_on),
            evaluated=of_runs(facts.evaluated),
            trained_numbers=num_trainable_params(model, {"prompt": params}),
        )
    artifacts.save_artifact(
        folder,
        model.prompt,
        params,
        runs,
        embedding_sha256=initial.embedding_sha256,
        vocabulary_sha256=initial.vocabulary_sha256,
        backbone=job.backbone,
        step=step,
        metrics=metrics,
        started_from=initial.started_from,
        include_folded=True,
        facts=facts,
    )

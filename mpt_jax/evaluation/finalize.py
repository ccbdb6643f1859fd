"""What the runs of a job leave to others when it ends: their prompts, and how each of them fared.

    MODEL_DIR/artefact           all runs
    MODEL_DIR/artefacts/<run>    each run by itself, where a job has several groups
    MODEL_DIR/fleet.json         of every run: finished, failed or trained; step, best step, score

A run that failed hands on its best step if it was evaluated before it failed, otherwise nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mpt_jax.artifacts import artifacts, model_card
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.evaluation.periodic_eval import Evaluation
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.runtime.files import write_atomic
from mpt_jax.training.initialization import Loaded
from mpt_jax.training.state import num_trainable_params

ARTEFACT, ARTEFACTS, FLEET = "artefact", "artefacts", "fleet.json"
FINISHED, FAILED, TRAINED = "finished", "failed", "trained"


@dataclasses.dataclass(frozen=True)
class Ending:
    """How one run fared.

    Attributes:
        run, task: its names.
        state: `'failed'` where a number was not finite; `'finished'` where its schedule or its
            patience ended; `'trained'` where it trained until the job ended.
        step: the job's step when it left the training; of a job that was never extended, how many
            steps it took.
        best_step: the step that its artefact is from; None where it hands on nothing.
        score: at that step; None where steps are not selected.
    """

    run: str
    task: str
    state: str
    step: int
    best_step: int | None
    score: float | None


def endings(evaluator: Evaluation, all_failed: bool = False) -> list[Ending]:
    """How each run of a job fared.

    Args:
        evaluator: of the job.
        all_failed: whether the job stops because no run is left that has not failed. The last of
            them fail by a step that is not taken, so the state does not say so.
    """
    trainer, best = evaluator.trainer, evaluator.best
    runs, found, last = trainer.model.runs, [], int(trainer.state.step)
    scores = best.best_group_scores() if best else [math.nan] * runs.num_groups
    for run, task, group in zip(runs.run_names, runs.task_names, runs.group_of_row, strict=True):
        failed, ended = all_failed or bool(trainer.failed[group]), int(trainer.ended[group])
        step = ended if ended >= 0 else last
        chosen = best.best_step[group] if best else -1
        if chosen < 0:
            chosen = None if failed else step
        score = None if math.isnan(scores[group]) else scores[group]
        state = FAILED if failed else FINISHED if ended >= 0 else TRAINED
        found.append(Ending(run, task, state, step, chosen, score))
    return found


def report(model_dir: str, found: Sequence[Ending]) -> None:
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


def write_artefacts(
    model_dir: str,
    evaluator: Evaluation,
    prompt: Params,
    loaded: Loaded,
    backbone: str,
    facts: model_card.Facts,
    all_failed: bool = False,
) -> None:
    """Writes the artefacts of a job that has ended, and its report; for one process.

    Args:
        model_dir: MODEL_DIR.
        evaluator: knows the best step of every run.
        prompt: the method's parameters, of each run's best step.
        loaded: what the job started from.
        backbone: its name.
        facts: what model cards say.
        all_failed: see `endings`.
    """
    found = endings(evaluator, all_failed)
    report(model_dir, found)
    kept = [row for row, ending in enumerate(found) if ending.best_step is not None]
    folders = {ARTEFACT: kept} if kept else {}
    if evaluator.trainer.model.runs.num_groups > 1:
        folders |= {f"{ARTEFACTS}/{found[row].run}": [row] for row in kept}
    for folder, rows in folders.items():
        path, step = epath.Path(model_dir) / folder, max(found[row].best_step or 0 for row in rows)
        _write(path, evaluator, prompt, loaded, backbone, facts, rows, step)
    if kept:
        logging.info("Prompt artefact: %s", epath.Path(model_dir) / ARTEFACT)


def _write(  # noqa: PLR0913 - what an artefact is made of
    folder: epath.Path,
    evaluator: Evaluation,
    prompt: Params,
    loaded: Loaded,
    backbone: str,
    facts: model_card.Facts,
    rows: Sequence[int],
    step: int,
) -> None:
    """One artefact. A job may have thousands, so that nothing here reads all runs of the job but
    where they all are written."""
    model, best = evaluator.trainer.model, evaluator.best
    params, runs, groups = take(model, prompt, rows)
    of_runs = lambda table: {run: table[run] for run in runs.run_names if run in table}  # noqa: E731
    metrics: dict[str, Any] = {"scores": of_runs(evaluator.best_scores())}
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
    artifacts.save_artefact(
        folder,
        model.prompt,
        params,
        runs,
        embedding_sha256=loaded.embedding_sha256,
        vocabulary_sha256=loaded.vocabulary_sha256,
        backbone=backbone,
        step=step,
        metrics=metrics,
        started_from=loaded.started_from,
        include_folded=True,
        facts=facts,
    )

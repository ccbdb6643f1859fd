"""Prompts of the teachers of a job with distillation, from prompt artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.models.model import Model
from mpt_jax.prompts.base import params_of_parts
from mpt_jax.prompts.materialize import materialize


class Job(NamedTuple):
    """What artifacts of teachers are compared with.

    Attributes:
        model: the model.
        embedding_sha256: the digest of the backbone's token embedding.
        backbone_sha256: the digest of all its weights; None if it was switched off.
        vocabulary_sha256: the digest of the input vocabulary; None if unknown.
    """

    model: Model
    embedding_sha256: str
    backbone_sha256: str | None
    vocabulary_sha256: str | None


def prompts_of(job: Job, paths: Sequence[str], command: str) -> dict[str, np.ndarray]:
    """Returns the plain prompts [K, P, H] of the teachers of all bank rows, by part of the method
    (`PromptMethod.parts`): one for texts, or one for each site of images.

    Args:
        job: the job's model and digests.
        paths: the folders of the artifacts.
        command: the command that trains the teachers, for errors.

    Raises:
        FileNotFoundError: an artifact of teachers is missing.
        ValueError: no artifact is named; an artifact has another backbone, vocabulary or prompt
            length, or prompts at other sites; or a run has no teacher or several.
    """
    if not paths:
        raise ValueError(
            "The objective distills from teachers, but Origins.teachers names no artifact. Set "
            f"TEACHERS to one or several prompt artifacts. To make one, run: {command}."
        )
    known: list[_Teacher] = []
    for path in paths:
        try:
            artifact = artifacts.load_artifact(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} Set TEACHERS to existing artifacts. To train the teachers, run: "
                f"{command}."
            ) from error
        _check(job, artifact)
        prompts = {
            part: np.asarray(materialize(method, params, artifact.runs))
            for part, (method, params) in params_of_parts(
                artifact.method, artifact.params, artifact.runs
            ).items()
        }
        names = zip(artifact.runs.run_names, artifact.runs.task_names, strict=True)
        for row, (run, task) in enumerate(names):
            own = {part: of_rows[row] for part, of_rows in prompts.items()}
            known.append(_Teacher(run, task, str(path), own))
    chosen = _choose(job.model.runs, known, command)
    return {part: np.stack([teacher.prompts[part] for teacher in chosen]) for part in prompts}


def _check(job: Job, artifact: artifacts.Artifact) -> None:
    """Raises ValueError if an artifact is not compatible with a job."""
    model = job.model
    model.check_teacher(artifact.method)
    compatibility.check_compatible(
        artifact,
        job.embedding_sha256,
        job.backbone_sha256,
        backbone_config(model.backbone_config),
        job.vocabulary_sha256,
        model.prompt.prompt_length,
        model.input_digests_of(artifact.runs.task_names),
    )


class _Teacher(NamedTuple):
    run: str
    task: str
    path: str
    prompts: Mapping[str, np.ndarray]  # [P, H] by part


def _choose(runs: Runs, known: Sequence[_Teacher], command: str) -> list[_Teacher]:
    """Returns a teacher for every bank row: the teacher with the same run name, or else the only
    teacher of the run's task.

    Raises:
        ValueError: a run has no such teacher, or several.
    """
    candidates: dict[str, list[_Teacher]] = {}
    for run, task in zip(runs.run_names, runs.task_names, strict=True):
        namesakes = [teacher for teacher in known if teacher.run == run]
        candidates[run] = namesakes or [teacher for teacher in known if teacher.task == task]
    tasks = dict(zip(runs.run_names, runs.task_names, strict=True))
    if missing := [tasks[run] for run, teachers in candidates.items() if not teachers]:
        raise ValueError(
            f"No teacher for the tasks {abbreviate(list(dict.fromkeys(missing)))}. The artifacts "
            f"{abbreviate(sorted({t.path for t in known}))} have teachers only for "
            f"{abbreviate(sorted({t.task for t in known}))}. Train the missing teachers "
            f"({command}) and add their artifact to TEACHERS, or remove the tasks without a "
            "teacher from SOURCE_TASKS (in a target stage: TARGET_TASKS)."
        )
    several = {run: teachers for run, teachers in candidates.items() if len(teachers) > 1}
    if several:
        names = [
            f"{run} ({', '.join(f'{t.run} in {t.path}' for t in teachers)})"
            for run, teachers in several.items()
        ]
        raise ValueError(
            f"Several teachers match the same run: {abbreviate(names)}. Set RUN_NAMES so that each "
            "run has the name of a single teacher, or set TEACHERS to artifacts that together hold "
            "one teacher for each task."
        )
    return [teachers[0] for teachers in candidates.values()]

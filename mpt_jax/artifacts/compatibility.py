"""Compatibility checks of artifacts with a backbone, a vocabulary and each other, and a merge of
compatible artifacts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.prompt_tuning import PromptTuning


def check_compatible(
    artifact: Artifact, embedding_sha256: str, vocabulary_sha256: str | None, prompt_length: int
) -> None:
    """Checks that an artifact was trained with this backbone, vocabulary and prompt length.

    Raises:
        ValueError: one of them differs; the message shows both values.
    """
    expected = artifact.config["embedding_sha256"]
    if expected != embedding_sha256:
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained on another backbone, "
            f"{artifact.config['backbone']}: its embedding has sha256 {expected}, but the loaded "
            f"backbone's embedding has sha256 {embedding_sha256}. Set "
            "INITIAL_CHECKPOINT_PATH (in serving: --backbone) to the backbone of the artifact."
        )
    vocabulary = artifact.config["vocabulary_sha256"]
    if None not in (vocabulary, vocabulary_sha256) and vocabulary != vocabulary_sha256:
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained with another vocabulary: sha256 "
            f"{vocabulary}, but the loaded vocabulary has sha256 {vocabulary_sha256}. Set "
            "VOCABULARY (in serving: --vocabulary) to the vocabulary of the artifact. If it is the "
            "same file, the number of sentinels differs: set vocabularies.load.extra_ids (in "
            "serving: --extra-ids) to the number in the job that wrote the artifact."
        )
    if artifact.prompt_length != prompt_length:
        raise ValueError(
            f"The prompt artifact {artifact.path} has prompts of {artifact.prompt_length} "
            f"positions, but this job needs {prompt_length}. Use the same PROMPT_LENGTH in this "
            "job and in the job that wrote the artifact."
        )


def check_mutually_compatible(found: Sequence[Artifact], folded: bool = False) -> None:
    """Checks that artifacts can be served together, or that training can start from all of them.

    Args:
        found: the artifacts, at least one.
        folded: whether their methods and prompt lengths may differ.

    Raises:
        ValueError: the artifacts disagree; the message lists each value with its artifacts.
    """
    facts = {
        "backbone (sha256 of its embedding)": lambda x: x.config["embedding_sha256"],
        "vocabulary (sha256)": lambda x: x.config["vocabulary_sha256"],
    }
    if not folded:
        facts["prompt length"] = lambda x: x.prompt_length
        facts["method"] = lambda x: f"{x.method.name} {json.dumps(x.method.config())}"
    for what, value_of in facts.items():
        folders: dict[Any, list[str]] = {}
        for artifact in found:
            value = value_of(artifact)
            if value is not None:  # no vocabulary was recorded
                folders.setdefault(value, []).append(artifact.path)
        if len(folders) > 1:
            values = "; ".join(
                f"{value} in {abbreviate(paths)}" for value, paths in folders.items()
            )
            may_differ = what in ("method", "prompt length")
            hint = "Use only artifacts that agree."
            if may_differ:
                hint = "Use --folded to combine their plain prompts."
            raise ValueError(
                f"These artifacts cannot be combined, since their {what} differs: {values}. {hint}"
            )


def representative(found: Sequence[Artifact]) -> Artifact:
    """Returns a representative artifact, preferring one that records a vocabulary."""
    with_vocabulary = [x for x in found if x.config["vocabulary_sha256"] is not None]
    return (with_vocabulary or found)[0]


def merge(found: Sequence[Artifact]) -> Artifact:
    """Merges initial artifacts into one artifact that holds the plain prompts of all rows.

    They must have the same backbone, vocabulary and prompt length. A single artifact is returned
    unchanged.

    Raises:
        ValueError: the artifacts disagree, or two rows have the same name, and the message names
            the artifacts; or prompts depend on the text, or have different lengths.
    """
    if len(found) == 1:
        return found[0]
    check_mutually_compatible(found, folded=True)
    lengths: dict[int, list[str]] = {}
    paths: dict[str, str] = {}
    for artifact in found:
        lengths.setdefault(artifact.prompt_length, []).append(artifact.path)
        for run in artifact.runs.run_names:
            if run in paths:
                raise ValueError(
                    f"{paths[run]} and {artifact.path} both hold a prompt of {run!r}. Leave one "
                    "artifact out of INITIAL_ARTIFACT."
                )
            paths[run] = artifact.path
    if len(lengths) > 1:
        values = "; ".join(f"{n} in {abbreviate(folders)}" for n, folders in lengths.items())
        raise ValueError(
            "Training cannot start from these artifacts together, since their prompt length "
            f"differs: {values}. Set INITIAL_ARTIFACT to artifacts with the same prompt length."
        )
    runs = Runs(
        [task for artifact in found for task in artifact.runs.task_names],
        [run for artifact in found for run in artifact.runs.run_names],
        "independent",
    )
    method = PromptTuning(found[0].prompt_length)
    table = jnp.concatenate([artifact.folded() for artifact in found])
    path = abbreviate([artifact.path for artifact in found])
    return Artifact(path, method, runs, {"table": table}, representative(found).config)

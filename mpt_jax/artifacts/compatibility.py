"""Whether artifacts fit a backbone, a vocabulary and each other, and several as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.prompt_tuning import PromptTuning

MOST_NAMED = 20  # names that an error lists, with the number of the others


def check_compatible(
    artifact: Artifact, embedding_sha256: str, vocabulary_sha256: str | None, prompt_length: int
) -> None:
    """Checks that an artifact was trained on this backbone, vocabulary and prompt length.

    Raises:
        ValueError: shows both values of what differs.
    """
    found = artifact.config["embedding_sha256"]
    if found != embedding_sha256:
        raise ValueError(
            f"The prompt artifact {artifact.path} belongs to another backbone: its embedding has "
            f"sha256 {found} ({artifact.config['backbone']}), this one's has {embedding_sha256}. "
            "Prompts only work with the backbone they were trained on."
        )
    vocabulary = artifact.config["vocabulary_sha256"]
    if None not in (vocabulary, vocabulary_sha256) and vocabulary != vocabulary_sha256:
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained with another vocabulary: sha256 "
            f"{vocabulary}, this run's is {vocabulary_sha256}."
        )
    if artifact.prompt_length != prompt_length:
        raise ValueError(
            f"The prompt artifact {artifact.path} has prompts of {artifact.prompt_length} "
            f"positions and this run's have {prompt_length}; they must agree (PROMPT_LENGTH)."
        )


def check_mutually_compatible(found: Sequence[Artifact], folded: bool = False) -> None:
    """Checks that artifacts can be served, or started from, together.

    Args:
        found: at least one.
        folded: whether their methods and lengths may differ.

    Raises:
        ValueError: names the artifacts by the value of what they disagree on.
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
            if value is not None:  # artifacts of a vocabulary that nobody recorded
                folders.setdefault(value, []).append(artifact.path)
        if len(folders) > 1:
            values = "; ".join(
                f"{value} in {abbreviate(paths)}" for value, paths in folders.items()
            )
            may_differ = what in ("method", "prompt length")
            hint = f" Plain prompts of several {what}s go together: fold them." * may_differ
            raise ValueError(
                f"These artifacts do not go together, their {what} differs: {values}.{hint}"
            )


def representative(found: Sequence[Artifact]) -> Artifact:
    """Of artifacts that agree, one whose `config` speaks for all: which knows its vocabulary, if
    any does."""
    known = [each for each in found if each.config["vocabulary_sha256"] is not None]
    return (known or found)[0]


def abbreviate(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def merge(found: Sequence[Artifact]) -> Artifact:
    """Artifacts of one backbone and one length as one, of plain prompts: the rows of all. One alone
    is returned as it is.

    Raises:
        ValueError: they disagree, or two rows have one name; names the artifacts.
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
                    f"{paths[run]} and {artifact.path} both hold a prompt of {run!r}; leave one "
                    "of them out."
                )
            paths[run] = artifact.path
    if len(lengths) > 1:
        told = "; ".join(f"{length} in {abbreviate(where)}" for length, where in lengths.items())
        raise ValueError(f"These artifacts cannot be started from together, P differs: {told}.")
    runs = Runs(
        [task for artifact in found for task in artifact.runs.task_names],
        [run for artifact in found for run in artifact.runs.run_names],
        "independent",
    )
    method = PromptTuning(found[0].prompt_length)
    table = jnp.concatenate([artifact.folded() for artifact in found])
    path = abbreviate([artifact.path for artifact in found])
    return Artifact(path, method, runs, {"table": table}, representative(found).config)

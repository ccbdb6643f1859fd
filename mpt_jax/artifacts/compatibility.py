"""Compatibility checks of artifacts with a backbone, a vocabulary and each other, and a merge of
compatible artifacts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from absl import logging

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.artifacts.backbone_digest import CONFIG_FIELD, FIELD
from mpt_jax.core.comparison import abbreviate, differences
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.prompt_tuning import PromptTuning


def check_compatible(
    artifact: Artifact,
    embedding_sha256: str,
    backbone_sha256: str | None,
    backbone_config: Mapping[str, Any],
    vocabulary_sha256: str | None,
    prompt_length: int,
    input_digests: Mapping[str, str] = MappingProxyType({}),
    may_differ: Collection[str] = (),
) -> None:
    """Checks that an artifact was trained with this backbone, vocabulary, prompt length and with
    inputs made in the same way. Logs a warning if it records no digest of the backbone's weights,
    or no configuration of the backbone, and if one of the `may_differ` of `input_digests` differs.

    Raises:
        ValueError: one of them differs; the message shows both values.
    """
    check_backbone(artifact, embedding_sha256, backbone_sha256, backbone_config)
    for warning in not_compared(*lacking([artifact]), backbone_sha256 is not None):
        logging.warning("%s", warning)
    check_vocabulary(artifact, vocabulary_sha256)
    if artifact.prompt_length != prompt_length:
        raise ValueError(
            f"The prompt artifact {artifact.path} has prompts of {artifact.prompt_length} "
            f"positions, but this job needs {prompt_length}. Use the same PROMPT_LENGTH (of CLIP: "
            "CONTEXT_LENGTH, IMAGE_TOKENS) in this job and in the job that wrote the artifact."
        )
    for name, expected in input_digests.items():
        if (recorded := artifact.config.get(name)) == expected:
            continue
        message = (
            f"The prompt artifact {artifact.path} was trained with other inputs: its {name} is "
            f"{recorded}, but that of this job is {expected}. Use the data and settings of the "
            "job that wrote the artifact (config.gin in its MODEL_DIR)"
        )
        if name not in may_differ:
            raise ValueError(f"{message}.")
        logging.warning("%s, unless the prompts should adapt to other inputs.", message)


def check_backbone(
    artifact: Artifact,
    embedding_sha256: str,
    backbone_sha256: str | None,
    backbone_config: Mapping[str, Any] | None = None,
) -> None:
    """Checks that an artifact was trained with this backbone. Compares the digests of the embedding
    and, if both sides have them, the digests of all weights and the configurations.

    Raises:
        ValueError: the backbone differs; the message shows both values.
    """
    what, expected, actual = "embedding", artifact.config["embedding_sha256"], embedding_sha256
    recorded = artifact.config.get(FIELD)
    if expected == actual and None not in (recorded, backbone_sha256):
        what, expected, actual = "weights", recorded, backbone_sha256
    if expected != actual:
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained on another backbone, "
            f"{artifact.config['backbone']}: the sha256 of its {what} is {expected}, but that of "
            f"the loaded backbone's {what} is {actual}. Set INITIAL_CHECKPOINT_PATH (in serving: "
            "--backbone) to the backbone of the artifact."
        )
    recorded = artifact.config.get(CONFIG_FIELD) or {}
    current = backbone_config or {}
    if changes := differences(recorded, current, [x for x in current if x in recorded]):
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained with another configuration of its "
            f"backbone ({changes}). Correct the backbone's config.json, or set T5_NAME or "
            "T5_CONFIG (of CLIP: CLIP_NAME or CLIP_CONFIG; in serving of T5: --config) to "
            "the configuration of the artifact."
        )


def embedding_only(record: str) -> str:
    """Returns the warning that only the embedding of a backbone could be compared with a record,
    since the record has no digest of the other weights."""
    return (
        f"{record} records no {FIELD} (from an earlier version, or written with the digest "
        "switched off), so only the backbone's embedding could be compared. A backbone with the "
        "same embedding but other weights would not be detected."
    )


def weights_only(record: str) -> str:
    """Returns the warning that the configuration of a backbone could not be compared with a record,
    since the record has none."""
    return (
        f"{record} records no {CONFIG_FIELD} (from an earlier version), so the backbone's "
        "configuration could not be compared. Another relative_attention_max_distance or "
        "mlp_activations would not be detected."
    )


def lacking(found: Sequence[Artifact]) -> tuple[list[str], list[str]]:
    """Returns the folders of the artifacts that do not record the digest of their backbone's
    weights, and the folders of the remaining ones that do not record its configuration."""
    digest = [x.path for x in found if x.config.get(FIELD) is None]
    config = [x.path for x in found if not x.config.get(CONFIG_FIELD) and x.path not in digest]
    return digest, config


def not_compared(digest: Sequence[str], config: Sequence[str], digested: bool) -> list[str]:
    """Returns the warnings about artifacts that do not record all of their backbone.

    Args:
        digest, config: the folders that `lacking` returns.
        digested: whether the digest of the loaded backbone's weights is known.
    """
    warnings = [embedding_only(abbreviate(digest))] if digest and digested else []
    return warnings + ([weights_only(abbreviate(config))] if config else [])


def check_vocabulary(artifact: Artifact, vocabulary_sha256: str | None) -> None:
    """Checks that an artifact was trained with this vocabulary. Passes if either is unknown.

    Raises:
        ValueError: the vocabulary differs; the message shows both values.
    """
    vocabulary = artifact.config["vocabulary_sha256"]
    if None not in (vocabulary, vocabulary_sha256) and vocabulary != vocabulary_sha256:
        raise ValueError(
            f"The prompt artifact {artifact.path} was trained with another vocabulary: sha256 "
            f"{vocabulary}, but the loaded vocabulary has sha256 {vocabulary_sha256}. Set "
            "VOCABULARY (in serving: --vocabulary) to the vocabulary of the artifact. If it is the "
            "same file, the number of sentinels differs: set vocabularies.load.extra_ids (in "
            "serving: --extra-ids) to the number in the job that wrote the artifact. Of CLIP: set "
            "CLIP_TOKENIZER (in serving: --backbone) to the folder with the tokenizer."
        )


def check_mutually_compatible(found: Sequence[Artifact], folded: bool = False) -> None:
    """Checks that artifacts can be served together, or that training can start from all of them.

    Args:
        found: the artifacts, at least one.
        folded: whether their methods and prompt lengths may differ, since only their plain prompts
            are used.

    Raises:
        ValueError: the artifacts disagree; the message lists each value with its artifacts.
    """
    facts = {
        "backbone (sha256 of its embedding)": lambda x: x.config["embedding_sha256"],
        "backbone (sha256 of its weights)": lambda x: x.config.get(FIELD),
        "configuration of the backbone": _config_text,
        "vocabulary (sha256)": lambda x: x.config["vocabulary_sha256"],
    }
    if not folded:
        facts["prompt length"] = lambda x: x.prompt_length
        facts["method"] = lambda x: f"{x.method.name} {json.dumps(x.method.config())}"
    for what, value_of in facts.items():
        folders: dict[Any, list[str]] = {}
        for artifact in found:
            value = value_of(artifact)
            if value is not None:  # not every artifact records all digests
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
    """Returns a representative of compatible artifacts: one that records a vocabulary, if any does,
    with the digest of the backbone's weights and its configuration, if any records them."""
    with_vocabulary = [x for x in found if x.config["vocabulary_sha256"] is not None]
    first = (with_vocabulary or found)[0]
    recorded = {
        field: x.config[field]
        for field in (FIELD, CONFIG_FIELD)
        for x in found
        if x.config.get(field) is not None
    }
    return dataclasses.replace(first, config={**first.config, **recorded})


def _config_text(artifact: Artifact) -> str | None:
    config = artifact.config.get(CONFIG_FIELD)
    return json.dumps(config, sort_keys=True) if config else None


def merge(found: Sequence[Artifact]) -> Artifact:
    """Merges initial artifacts into one artifact that holds the plain prompts of all rows.

    The artifacts must have the same backbone, vocabulary and prompt length. A single artifact is
    returned unchanged.

    Raises:
        ValueError: the artifacts disagree, or two rows have the same name, and the message names
            the artifacts; or prompts depend on the text, or have different lengths.
    """
    if len(found) == 1:
        return found[0]
    check_mutually_compatible(found, folded=True)
    digest, config = lacking(found)
    # If all lack the digest, so does the merged artifact, and `check_compatible` warns.
    for warning in not_compared(digest, config, True) if len(digest) < len(found) else []:
        logging.warning("%s", warning)
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

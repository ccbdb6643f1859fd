"""Names of the product that the record of its behavior depends on: all that a refactoring edits
here. What stands on the left is what the record was written with."""

from __future__ import annotations

# Names of the Python API that batches.py uses -> where they lie.
API = {
    "install": "mpt_jax.config.trainer_choice:install_fallback",
    "as_main": "mpt_jax.config.gin_utils:as_main",
    "parse": "mpt_jax.config.gin_utils:parse",
    "train_iterator": "mpt_jax.data.datasets:train_iterator",
    "eval_batches": "mpt_jax.data.datasets:eval_batches",
    "train_script": "mpt_jax.train",
}
# Command lines after `python`; mpt-jax is what pyproject.toml says.
COMMANDS = {
    "train": ["-m", "mpt_jax.train"],
    "eval": ["-m", "mpt_jax.eval"],
    "infer": ["-m", "mpt_jax.infer"],
    "t5x.train": ["-m", "t5x.train"],
}
# Macros and parameters that are bound here -> their names now.
BINDINGS: dict[str, str] = {"INITIAL_ARTEFACT": "INITIAL_ARTIFACT"}
# Parts of texts -> what they are now, before words are.
PHRASES: dict[str, str] = {
    "mpt_jax.artefacts.load_artefact": "mpt_jax.artifacts.artifacts.load_artifact",
    "'tasks.": "'mpt_jax.tasks.",
    "numbers that were trained": "trainable parameters",
    "<repository>/tasks/data/": "<repository>/mpt_jax/tasks/data/",
    "mpt_jax.export.load": "mpt_jax.serving.export.load",
    "The bank has toy_": "The bank has prompts for toy_",
    "need JAX and safetensors, and no MPT-JAX. Attention is by plain operations": (
        "need only JAX and safetensors, not MPT-JAX. Attention uses plain operations"
    ),
    "absent where words are bytes": "absent for byte vocabularies",
}
# Whole words of the record (letters, digits, _) -> what they are now: folders and files, keys,
# metrics, leaves, gin names, words of model cards.
RENAMED: dict[str, str] = {
    "artefact": "artifact",
    "artefacts": "artifacts",
    "Artefact": "Artifact",
    "artefact_command": "artifact_command",
    "artefact_sha256": "artifact_sha256",
    "INITIAL_ARTEFACT": "INITIAL_ARTIFACT",
    "SOURCE_ARTEFACT": "SOURCE_ARTIFACT",
    "NORMALISE": "NORMALIZE",
    "REPARAMETRISE": "REPARAMETERIZE",
    "normalise": "normalize",
    "reparametrise": "reparameterize",
    "WHOLE_BATCH": "GLOBAL_BATCH_SIZE",
    "whole_batch": "global_batch_size",
    "length_of": "prompt_length_of",
    "learnt": "learned",
    "Licence": "License",
    "licence": "license",
}
# Fields and bindings that later versions write in addition: of the identity of the backbone and the
# data, and of constant predictions.
ADDED = frozenset(
    {
        "backbone_config",
        "backbone_sha256",
        "config_sha256",
        "record_sha256",
        "config.t5_config.checkpoint",
        "constant_prediction",
        "data",
    }
)
# Bindings of config.gin with another default -> what it was and what it is.
DEFAULTS = {"T5_NAME": ("'t5_1_0_base'", "None")}
# Paragraphs of model cards that later versions write in addition: their first words.
ADDED_PARAGRAPHS = ("**Every prediction was the same for ",)

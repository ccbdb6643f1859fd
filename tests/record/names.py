"""Names of the product that the record of its behavior depends on: all that a refactoring edits
here. What stands on the left is what the record was written with."""

from __future__ import annotations

# Names of the Python API that batches.py uses -> where they lie.
API = {
    "install": "mpt_jax.config.trainer_choice:install_fallback",
    "as_main": "mpt_jax.config.gin_utils:as_main",
    "parse": "mpt_jax.config.gin_utils:parse",
    "train_iterator": "mpt_jax.data.datasets:train_iterator",
    "eval_batches": "mpt_jax.data.loss_batches:eval_batches",
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
PHRASES: dict[str, str] = {}
# Whole words of the record (letters, digits, _) -> what they are now: folders and files, keys,
# metrics, leaves, gin names, words of model cards.
RENAMED: dict[str, str] = {}
# Fields and bindings that later versions write in addition.
ADDED: frozenset[str] = frozenset()
# Bindings of config.gin with another default -> what it was and what it is.
DEFAULTS: dict[str, tuple[str, str]] = {}
# Paragraphs of model cards that later versions write in addition: their first words.
ADDED_PARAGRAPHS: tuple[str, ...] = ()

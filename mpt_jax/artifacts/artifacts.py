"""Prompt artifacts: what one stage hands the next, and what users deploy.

A folder of three files. `prompts.safetensors` holds the method's parameters under `factors/` and,
on request, the folded prompt of each row under `folded/`. `config.json` says what they belong to:
the method, the runs, the backbone (digest of its embedding) and the vocabulary, and the digest of
`prompts.safetensors`. Whoever reads an artifact checks the digests and refuses another backbone's,
or prompts that are not those that were written. `README.md` is its model card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load, save

import mpt_jax
from mpt_jax.artifacts import model_card
from mpt_jax.core.old_names import current_keys, existing_folder
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, match_exactly, unflatten
from mpt_jax.prompts.base import PromptMethod, get_method
from mpt_jax.prompts.materialize import materialize, plain_prompts, plain_weights
from mpt_jax.runtime.files import replace_folder

TENSORS = "prompts.safetensors"
CONFIG = "config.json"
FORMAT = 1
# What a reader needs of config.json; the rest is for people.
FIELDS = (
    "method",
    "method_config",
    "task_names",
    "run_names",
    "groups",
    "shapes",
    "backbone",
    "embedding_sha256",
    "vocabulary_sha256",
)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A read artifact.

    Attributes:
        path: where it was read.
        method: the prompt method, rebuilt from its configuration.
        runs: the bank's rows.
        params: the method's parameters, nested.
        config: everything `config.json` says.
    """

    path: str
    method: PromptMethod
    runs: Runs
    params: dict[str, Any]
    config: dict[str, Any]

    @property
    def prompt_length(self) -> int:
        """P, of the longest of its prompts."""
        return max(self.method.prompt_lengths(self.runs))

    def folded(self) -> np.ndarray:
        """[K, P, H], one plain prompt per row; raises what `prompts.base.fold` does."""
        return np.asarray(materialize(self.method, self.params, self.runs))

    def plain(self) -> list[np.ndarray]:
        """The plain prompt [P, H] of each row, of its own length; raises ValueError where prompts
        depend on the text."""
        return plain_prompts(self.method, self.params, self.runs)

    def weights(self) -> np.ndarray:
        """[K, J], of each candidate in each plain prompt; raises what `plain_weights` does."""
        return plain_weights(self.method, self.params, self.runs)


def embedding_digest(embedding: Any) -> str:
    """sha256 of a token embedding [V, H] rounded to bfloat16, so that a backbone has one digest in
    whichever precision it is loaded."""
    rounded = np.asarray(jnp.asarray(embedding, jnp.bfloat16)).view(np.uint16)
    return hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()


def vocabulary_digest(vocabulary: Any) -> str | None:
    """sha256 of a SentencePiece model; for other vocabularies their class and size; None if
    there is none."""
    if vocabulary is None:
        return None
    model = getattr(vocabulary, "sp_model", None)
    if model is None:
        model = f"{type(vocabulary).__name__}:{vocabulary.vocab_size}".encode()
    return hashlib.sha256(model).hexdigest()


def digest(leaves: Mapping[str, Any]) -> str:
    """sha256 of named arrays, as float32 whatever they are kept in."""
    found = hashlib.sha256()
    for name in sorted(leaves):
        value = np.ascontiguousarray(leaves[name], np.float32)
        found.update(f"{name} {value.shape} ".encode() + value.tobytes())
    return found.hexdigest()


def save_artifact(  # noqa: PLR0913 - each is one field of config.json
    path: str | os.PathLike[str],
    method: PromptMethod,
    params: Params,
    runs: Runs,
    *,
    embedding_sha256: str,
    vocabulary_sha256: str | None,
    backbone: str,
    step: int,
    metrics: Mapping[str, Any] | None = None,
    started_from: Mapping[str, Any] | None = None,
    include_folded: bool = False,
    facts: model_card.Facts | None = None,
) -> epath.Path:
    """Writes an artifact; a reader sees the old folder or the new one, never half of it.

    Args:
        path: the folder.
        method: the prompt method.
        params: its parameters.
        runs: the bank's rows.
        embedding_sha256: the backbone's `embedding_digest`.
        vocabulary_sha256: the `vocabulary_digest`.
        backbone: a name or path for people to read.
        step: the training step the parameters are from.
        metrics: what was measured of them, JSON values.
        started_from: digest of the artifact they started from, and which of its rows.
        include_folded: also writes each row's plain prompt, where it has one.
        facts: what the model card says beside these.
    """
    path = epath.Path(path)
    method, params = method.for_inference(unflatten(flatten(params)))
    tensors = {f"factors/{k}": np.asarray(v, np.float32) for k, v in flatten(params).items()}
    if include_folded and not method.reads_text:
        plain = plain_prompts(method, params, runs)
        tensors |= dict(zip((f"folded/{run}" for run in runs.run_names), plain, strict=True))
    prompts = save(tensors)
    config = {
        "format": FORMAT,
        "method": method.name,
        "method_config": method.config(),
        "task_names": list(runs.task_names),
        "run_names": list(runs.run_names),
        "groups": list(runs.group_of_row),
        "shapes": {name: list(np.shape(x)) for name, x in flatten(params).items()},
        "backbone": backbone,
        "embedding_sha256": embedding_sha256,
        "vocabulary_sha256": vocabulary_sha256,
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        "step": int(step),
        "metrics": dict(metrics or {}),
        "started_from": started_from and dict(started_from),
        "mixture": _mixture(method, params, runs),
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__},
    }
    with replace_folder(path) as new:
        (new / TENSORS).write_bytes(prompts)
        # Unsorted: of several metrics the first is the task's main one.
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        card = model_card.for_folder(path, config, facts or model_card.Facts())
        (new / model_card.NAME).write_bytes(card)
    return path


def _mixture(method: PromptMethod, params: Params, runs: Runs) -> dict[str, Any] | None:
    """Run -> candidate -> its weight, for people; None where nothing is mixed, or by the text."""
    if not method.candidates or method.reads_text:
        return None
    weights = plain_weights(method, params, runs).tolist()
    pairs = zip(runs.run_names, weights, strict=True)
    return {run: dict(zip(method.candidates, row, strict=True)) for run, row in pairs}


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Reads an artifact.

    Raises:
        FileNotFoundError: no artifact there.
        ValueError: unreadable, damaged, of a newer format, or not what its own config says.
    """
    path = existing_folder(path)
    if not (path / CONFIG).exists() or not (path / TENSORS).exists():
        raise FileNotFoundError(
            f"No prompt artifact at {path}: a folder with {CONFIG} and {TENSORS} was expected. A "
            "training run writes one to MODEL_DIR/artifact."
        )
    try:
        config = current_keys(json.loads((path / CONFIG).read_text()))
        prompts = (path / TENSORS).read_bytes()
        tensors = load(prompts)
    except (json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt artifact at {path} cannot be read: {error}.") from error
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} has artifact format {config.get('format')!r}; this version reads {FORMAT}."
        )
    missing = [field for field in FIELDS if field not in config]
    if missing:
        raise ValueError(f"{path / CONFIG} lacks {missing}, so it is not a whole artifact.")
    prefix = "factors/"
    leaves = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    match_exactly(
        {name: tuple(shape) for name, shape in config["shapes"].items()},
        {name: leaf.shape for name, leaf in leaves.items()},
        f"{path / TENSORS}",
    )
    _check_prompts(path, prompts, config)
    method = get_method(config["method"])(**config["method_config"])
    runs = Runs(config["task_names"], config["run_names"], config["groups"])
    params = unflatten({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    return Artifact(str(path), method, runs, params, config)


def _check_prompts(path: epath.Path, prompts: bytes, config: Mapping[str, Any]) -> None:
    """Raises ValueError for prompts that are not those config.json was written with."""
    if (expected := config.get("prompts_sha256")) is None:
        logging.warning(
            "%s has no prompts_sha256, as earlier versions wrote it: whether its prompts are whole "
            "cannot be checked.",
            path / CONFIG,
        )
    elif (found := hashlib.sha256(prompts).hexdigest()) != expected:
        raise ValueError(
            f"{path / TENSORS} was changed after it was written: its sha256 is {found}, and "
            f"{CONFIG} has {expected}. Copy the artifact again, or let its run write it once more "
            "(the same command does)."
        )

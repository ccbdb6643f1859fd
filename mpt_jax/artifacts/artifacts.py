"""Prompt artifacts: the output of a stage, read by the next stage or served to users.

An artifact is a folder of three files. `prompts.safetensors` holds the method's parameters under
`factors/` and, on request, the plain prompt of each row under `folded/`. `config.json` records the
method, the runs, and digests of the vocabulary, the backbone, `prompts.safetensors` and its own
other fields. Readers check the digests: they reject artifacts of another backbone or vocabulary,
and files that were changed after they were written. `README.md` is the model card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from absl import logging
from etils import epath
from safetensors.numpy import save

import mpt_jax
from mpt_jax.artifacts import model_card
from mpt_jax.core import schema
from mpt_jax.core.old_names import current_keys, existing_folder
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import check_floats, flatten, match_exactly, unflatten
from mpt_jax.prompts.base import (
    PromptContext,
    PromptMethod,
    method_from_config,
    params_of_parts,
)
from mpt_jax.prompts.materialize import materialize, plain_prompts, plain_weights
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.runtime.files import replace_folder
from mpt_jax.runtime.tensors import load_safetensors

TENSORS = "prompts.safetensors"
CONFIG = "config.json"
FORMAT = 1
SEAL = "config_sha256"  # the digest of the other fields of config.json
COPY_AGAIN = "Copy the artifact again, or repeat the command that wrote it."
UNDO = "Undo the change, copy the artifact again, or repeat the command that wrote it."


class Metrics(msgspec.Struct):
    """The schema of the metrics: only the fields that readers use.

    Attributes:
        scores: the metrics of each run, by name.
        best_step: the best step of each group.
    """

    scores: dict[str, dict[str, float]] | None = None
    best_step: list[int] | None = None


class Classes(msgspec.Struct):
    """The schema of the classes of an image task."""

    names: schema.Names
    templates: schema.Names
    multi_label: bool


class Head(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of how heads beside lanes read features (`classifier.PromptedClassifier`)."""

    normalize: bool
    temperature: Annotated[float, msgspec.Meta(gt=0)]

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise ValueError("temperature is not finite")


class ImageInputs(msgspec.Struct):
    """The schema of what says how images and class texts are made (`Model.input_settings`)."""

    transform: ImageTransform
    context_position: Literal["end", "middle", "front"]
    tasks: dict[str, Classes]
    head: Head | None = None


class ImageTransform(msgspec.Struct):
    """The schema of the settings of an image transform."""

    size: schema.Positive
    mode: Literal["crop", "squash"]
    resize_to: schema.Positive | None = None

    def __post_init__(self) -> None:
        if self.resize_to is not None and self.resize_to < self.size:
            raise ValueError("resize_to is less than size")


class Config(msgspec.Struct):
    """The schema of config.json: only the fields that readers use."""

    method: str
    method_config: dict[str, Any]
    task_names: schema.Names
    run_names: schema.Names
    groups: list[schema.Count]
    shapes: dict[str, list[schema.Count]]
    backbone: str
    embedding_sha256: str
    vocabulary_sha256: str | None
    backbone_sha256: str | None = None
    backbone_config: dict[str, Any] | None = None
    prompts_sha256: str | None = None
    step: schema.Count = 0
    metrics: Metrics = msgspec.field(default_factory=Metrics)
    data: dict[str, dict[str, Any]] | None = None
    images: ImageInputs | msgspec.UnsetType = msgspec.UNSET  # null is invalid


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact in memory.

    Attributes:
        path: the folder it was read from.
        method: the prompt method, rebuilt from its configuration.
        runs: the runs, one for each bank row.
        params: the method's parameters, as a nested tree.
        config: the contents of `config.json`.
    """

    path: str
    method: PromptMethod
    runs: Runs
    params: dict[str, Any]
    config: dict[str, Any]

    @property
    def prompt_length(self) -> int:
        """P, the length of the longest prompt."""
        return max(self.method.prompt_lengths(self.runs))

    def folded(self) -> np.ndarray:
        """Returns the plain prompt of each row, [K, P, H]. Raises as `materialize` does."""
        return np.asarray(materialize(self.method, self.params, self.runs))

    def plain(self) -> list[np.ndarray]:
        """Returns the plain prompt of each row, [P, H] with the prompt length P of that row. Raises
        ValueError if prompts depend on the text."""
        return plain_prompts(self.method, self.params, self.runs)

    def weights(self) -> np.ndarray:
        """Returns the weight of each candidate in each plain prompt, [K, J]. Raises as
        `plain_weights` does."""
        return plain_weights(self.method, self.params, self.runs)


def embedding_digest(embedding: Any) -> str:
    """Returns the sha256 of a token embedding [V, H] rounded to bfloat16, so that float32 and
    bfloat16 copies of a backbone have the same digest."""
    rounded = np.asarray(jnp.asarray(embedding, jnp.bfloat16)).view(np.uint16)
    return hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()


def vocabulary_digest(vocabulary: Any) -> str | None:
    """Returns the sha256 of a SentencePiece model, of the `identity` of a Hugging Face tokenizer
    (its files and special ids), or of the class name and size of any other vocabulary; None if
    there is no vocabulary."""
    if vocabulary is None:
        return None
    model = getattr(vocabulary, "sp_model", None) or getattr(vocabulary, "identity", None)
    if model is None:
        model = f"{type(vocabulary).__name__}:{vocabulary.vocab_size}".encode()
    return hashlib.sha256(model).hexdigest()


def digest(leaves: Mapping[str, Any]) -> str:
    """Returns the sha256 of the names, shapes and float32 values of arrays."""
    hasher = hashlib.sha256()
    for name in sorted(leaves):
        value = np.ascontiguousarray(leaves[name], np.float32)
        hasher.update(f"{name} {value.shape} ".encode() + value.tobytes())
    return hasher.hexdigest()


def save_artifact(  # noqa: PLR0913 - each is one field of config.json
    path: str | os.PathLike[str],
    method: PromptMethod,
    params: Params,
    runs: Runs,
    *,
    digests: Mapping[str, str | None],
    backbone: str,
    step: int,
    backbone_config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    started_from: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    include_folded: bool = False,
    facts: model_card.Facts | None = None,
) -> epath.Path:
    """Writes an artifact with its model card, in place of an existing one (`replace_folder`).

    Args:
        path: the artifact's folder.
        method: the prompt method.
        params: the method's parameters.
        runs: the runs, one for each bank row.
        digests: what readers compare, by the name of its field: `embedding_sha256` of the
            backbone's embedding (`embedding_digest`), `backbone_sha256` of all its weights
            (`backbone_digest`; None if it was switched off), `vocabulary_sha256`
            (`vocabulary_digest`; None if unknown), and the model's `input_digests`.
        backbone: the name or path of the backbone, for people to read.
        step: the training step of the parameters.
        backbone_config: the architecture of the backbone (`backbone_digest.backbone_config`); None
            if unknown.
        metrics: the metrics of the parameters, as JSON values.
        started_from: the digest of the artifact that training started from, and the rows used from
            it.
        data: the record of the data that training and evaluation used, as JSON values:
            {`core.runs.data_name` of a run: {'source', 'template', 'splits': {split: {'rows',
            'sha256'}}}}; None if unknown.
        images: how images and class texts are made (`Model.input_settings`); None for texts.
        include_folded: whether to also write the plain prompt of each row. Ignored if prompts
            depend on the text.
        facts: further facts for the model card.

    Returns:
        The artifact's folder.
    """
    path = epath.Path(path)
    method, params = method.for_inference(unflatten(flatten(params)))
    tensors = {f"factors/{k}": np.asarray(v, np.float32) for k, v in flatten(params).items()}
    if include_folded and not method.reads_input:
        tensors |= _plain_tensors(method, params, runs)
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
        "embedding_sha256": digests["embedding_sha256"],
        "backbone_sha256": digests["backbone_sha256"],
        "backbone_config": backbone_config and dict(backbone_config),
        "vocabulary_sha256": digests["vocabulary_sha256"],
        **digests,
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        "step": int(step),
        "metrics": dict(metrics or {}),
        "started_from": started_from and dict(started_from),
        "mixture": _mixture(method, params, runs),
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__},
    }
    if data:
        config["data"] = dict(data)
    if images:
        config["images"] = dict(images)
    config = schema.sealed(config, SEAL)
    with replace_folder(path) as new:
        (new / TENSORS).write_bytes(prompts)
        # Keys stay unsorted: the first of several metrics is the task's main one.
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        card = model_card.for_folder(path, config, facts or model_card.Facts())
        (new / model_card.NAME).write_bytes(card)
    return path


def _plain_tensors(method: PromptMethod, params: Params, runs: Runs) -> dict[str, np.ndarray]:
    """Returns the plain prompts of all rows, named `folded/<run>`, or `folded/<run>/<part>` for a
    method that consists of others."""
    tensors = {}
    for part, (own, values) in params_of_parts(method, params, runs).items():
        prompts = plain_prompts(own, values, runs)
        names = (f"folded/{run}/{part}".rstrip("/") for run in runs.run_names)
        tensors |= dict(zip(names, prompts, strict=True))
    return tensors


def _mixture(method: PromptMethod, params: Params, runs: Runs) -> dict[str, Any] | None:
    """Returns {run: {candidate: weight}} for people to read; None if the method mixes no candidates
    or its weights depend on the text."""
    if not method.candidates or method.reads_input:
        return None
    weights = plain_weights(method, params, runs).tolist()
    pairs = zip(runs.run_names, weights, strict=True)
    return {run: dict(zip(method.candidates, row, strict=True)) for run, row in pairs}


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Reads an artifact.

    Raises:
        FileNotFoundError: `path` holds no artifact.
        ValueError: the artifact cannot be read, is damaged or incomplete, has another format, does
            not match its `config.json`, or was changed after it was written.
    """
    path = existing_folder(path)
    if not (path / CONFIG).exists() or not (path / TENSORS).exists():
        raise FileNotFoundError(
            f"No prompt artifact at {path}: a folder with {CONFIG} and {TENSORS} was expected. A "
            "training job writes one to MODEL_DIR/artifact."
        )
    config = schema.parse((path / CONFIG).read_bytes(), f"{path / CONFIG}", COPY_AGAIN)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(
            f"{path} has artifact format {schema.short(found)}, but this version of MPT-JAX reads "
            f"format {FORMAT}. Use the version that wrote the artifact (see versions in {CONFIG})."
        )
    written, config = config, current_keys(config)
    checked = schema.check(config, Config, f"{path / CONFIG}", COPY_AGAIN)
    prompts = (path / TENSORS).read_bytes()
    tensors = load_safetensors(prompts, f"{path / TENSORS}", COPY_AGAIN)
    prefix = "factors/"
    leaves = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    match_exactly(
        {name: tuple(shape) for name, shape in checked.shapes.items()},
        {name: leaf.shape for name, leaf in leaves.items()},
        f"{path / TENSORS}",
        standard=f"its {CONFIG}",
        advice=COPY_AGAIN,
    )
    _check_digest(path, prompts, checked.prompts_sha256)
    method = method_from_config(checked.method, checked.method_config, f"{path / CONFIG}")
    if checked.images is not msgspec.UNSET and not isinstance(method, SitePrompts):
        raise ValueError(
            f"{path / CONFIG} has the field images, but the prompts of its method "
            f"{checked.method!r} are for texts. {COPY_AGAIN}"
        )
    runs = Runs(checked.task_names, checked.run_names, checked.groups)
    _check_params(path, method, runs, leaves)
    check_floats(leaves, f"{path / TENSORS}", COPY_AGAIN)
    # Last, since the other checks say what is wrong.
    schema.check_seal(written, SEAL, f"{path / CONFIG}", UNDO)
    params = unflatten({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    return Artifact(str(path), method, runs, params, config)


def _check_params(
    path: epath.Path, method: PromptMethod, runs: Runs, leaves: Mapping[str, np.ndarray]
) -> None:
    """Checks that arrays are the parameters of a method for these runs, without computing a prompt.

    Raises:
        ValueError: an array has another type or number of rows, or prompts of the method's length
            cannot be composed from the arrays.
    """
    sizes = {"groups": runs.num_groups, "tasks": runs.num_rows}
    for name, leaf in leaves.items():
        axes = method.axes.get(name, ())
        expected = [sizes.get(axis, size) for axis, size in zip(axes, leaf.shape, strict=False)]
        if len(axes) != leaf.ndim or list(leaf.shape) != expected or leaf.dtype.kind != "f":
            needed = f"needs floats [{', '.join(axes)}]" if axes else "has no such parameter"
            raise ValueError(
                f"{path / TENSORS} has {name} of type {leaf.dtype} and shape {leaf.shape}, but "
                f"the method {method.name!r} {needed}, with {runs.num_rows} tasks in "
                f"{runs.num_groups} groups. {COPY_AGAIN}"
            )
    for part, own in method.parts.items():
        prefix = f"{part}/" if part else ""
        named = {k.removeprefix(prefix): v for k, v in leaves.items() if k.startswith(prefix)}
        (_check_ranks if own.adapts else _check_composes)(path, own, runs, named)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in leaves.items()}
    with schema.damage(f"{path / TENSORS} does not match the settings in {CONFIG}", COPY_AGAIN):
        jax.eval_shape(lambda params: method.separated(params, runs)[1], unflatten(shapes))


def _check_ranks(
    path: epath.Path, method: Any, runs: Runs, leaves: Mapping[str, np.ndarray]
) -> None:
    """Raises ValueError if the factors of an adapter have another rank than its settings. The other
    sizes are those of a backbone, and are compared with it."""
    del runs
    for name, leaf in leaves.items():
        axes = method.axes[name]
        if "rank" in axes and leaf.shape[axes.index("rank")] != method.rank:
            raise ValueError(
                f"{path / TENSORS} does not match the settings of {method.name!r} in {CONFIG}: "
                f"{name} has rank {leaf.shape[axes.index('rank')]}, but the settings give "
                f"{method.rank}. {COPY_AGAIN}"
            )


def _check_composes(
    path: epath.Path, method: PromptMethod, runs: Runs, leaves: Mapping[str, np.ndarray]
) -> None:
    """Raises ValueError if prompts of the method's length cannot be composed from arrays."""
    width = next((x.shape[-1] for name, x in leaves.items() if method.axes[name][-1] == "embed"), 0)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in leaves.items()}
    joint = (x.shape[1] for name, x in leaves.items() if method.axes[name][1:2] == ("joint",))
    pooled: Any = jax.ShapeDtypeStruct((1, width), jnp.float32)
    features: Any = jax.ShapeDtypeStruct((1, next(joint, 0)), jnp.float32)
    what = f"{path / TENSORS} does not match the settings of {method.name!r} in {CONFIG}"
    with schema.damage(what, COPY_AGAIN):
        shape = jax.eval_shape(
            lambda params, given: method.compose(params, runs, jnp.zeros(1, jnp.int32), given),
            shapes,
            PromptContext(pooled, image_features=features),
        ).shape
        length = max(method.prompt_lengths(runs))
        if shape[1:] != (method.prompt_length, width) or length > method.prompt_length:
            raise ValueError(
                f"the arrays give prompts of shape {shape[1:]}, but the settings give "
                f"{(method.prompt_length, width)}"
            )


def _check_digest(path: epath.Path, prompts: bytes, expected: str | None) -> None:
    """Raises ValueError if the prompts do not have the digest that config.json records. Logs a
    warning if it records none."""
    if expected is None:
        logging.warning(
            "%s has no prompts_sha256, as in artifacts of earlier versions, so its prompts cannot "
            "be checked for damage.",
            path / CONFIG,
        )
    elif (actual := hashlib.sha256(prompts).hexdigest()) != expected:
        raise ValueError(
            f"{path / TENSORS} was changed after it was written: its sha256 is {actual}, but "
            f"{CONFIG} records {expected}. {COPY_AGAIN}"
        )

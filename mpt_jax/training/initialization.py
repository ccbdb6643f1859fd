"""Initial parameters of a job, each from its origin.

Two independent tables describe a parameter. Its *label* says whether it is trainable (and so
differentiated, optimized and saved). Its *origin* says where its initial value comes from:

    origin      which parameters                       source
    backbone    the frozen network                     Origins.backbone, a checkpoint
    teacher     teacher/*                              Origins.teachers, prompt artifacts; of a
                                                       zero-shot CLIP, the backbone
    artifact    prompt/*, if Origins.artifact is set   that artifact, transferred by the method
    init        prompt/*, and biases T5 lacks          the method's or module's initial values

A job takes trainable parameters from its last checkpoint if it has one, else from the origins in
the table. The backbone is initialized randomly only if `Origins.scratch = True`; a missing backbone
is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax import convert
from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Key
from mpt_jax.core.tree import flatten, match_exactly, unflatten
from mpt_jax.models.model import FROZEN, Model
from mpt_jax.prompts.base import Kernels, PromptMethod
from mpt_jax.prompts.spot import Embeddings, NearestSource
from mpt_jax.prompts.warm_start import StartFrom, check_own_prompts
from mpt_jax.training import teachers
from mpt_jax.training.state import _dtypes, backbone_shapes, param_shapes

# Embeddings are padded to a multiple of 128 or so (28 rows in T5, 12 in mT5, 125 in ByT5). If more
# rows than this have no token, the vocabulary is another backbone's.
MOST_SPARE_ROWS = 255


@dataclasses.dataclass(frozen=True)
class Origins:
    """The sources of initial parameter values.

    Attributes:
        backbone: the path of a T5X checkpoint, an Orbax checkpoint, or a Hugging Face folder.
        teachers: the artifact folder or folders that hold a teacher for every run of a job with
            distillation; not read if a zero-shot CLIP is the teacher.
        artifact: the artifact to initialize prompts from, or several artifacts, whose plain prompts
            [P, H] are merged; None uses the method's initial values.
        scratch: whether to initialize the backbone randomly (for pretraining); cannot be combined
            with `backbone`.
        backbone_name: the backbone's name in artifacts; defaults to its path.
        backbone_command: how to get the backbone; shown in the error if the backbone is missing.
        teachers_command: the command that trains the teachers; shown in the error if a teacher
            artifact is missing.
        artifact_command: the command that makes the initial artifact; shown in the error if the
            artifact is missing. Empty if no single command makes it.
        digest_backbone: whether to compute a digest of all backbone weights and compare it with the
            digests that artifacts and checkpoints record. Otherwise, only the embedding's is
            compared.

    Raises:
        ValueError: both `backbone` and `scratch` are set, or neither.
    """

    backbone: str | None = None
    teachers: str | Sequence[str] = ()
    artifact: str | Sequence[str] | None = None
    scratch: bool = False
    backbone_name: str | None = None
    backbone_command: str = "see README.md, 'Backbones'"
    teachers_command: str = "python -m mpt_jax.train --gin_file=gin/pt_source.gin"
    artifact_command: str = ""
    digest_backbone: bool = True

    def __post_init__(self):
        teachers = (self.teachers,) if isinstance(self.teachers, str) else tuple(self.teachers)
        object.__setattr__(self, "teachers", teachers)
        if self.scratch and self.backbone:
            raise ValueError(
                "Origins.scratch = True starts from random weights, but Origins.backbone "
                f"(INITIAL_CHECKPOINT_PATH) is {self.backbone!r}. Set only one of the two."
            )
        if not self.scratch and not self.backbone:
            raise ValueError(
                "Origins.backbone is not set, so there is no pretrained backbone to load. Set "
                "INITIAL_CHECKPOINT_PATH, or set train_state.Origins.scratch = True to train a "
                "backbone from random weights."
            )

    @property
    def name(self) -> str:
        """The backbone's name in artifacts."""
        return self.backbone_name or self.backbone or "scratch"


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """All initial parameters, with digests of their sources.

    Attributes:
        params: the whole parameter tree as NumPy arrays, in the dtypes used for training. The
            arrays are in host memory, so the model need not fit on a single device.
        embedding_sha256: the digest of the backbone's token embedding. Artifacts must match it.
        backbone_sha256: the digest of all weights of the backbone (before training, if they are
            trainable). Artifacts that record one must match it. None if `Origins.digest_backbone`
            is False.
        vocabulary_sha256: the digest of the input vocabulary, if it is known. Artifacts must match
            it.
        artifact_sha256: the digest of the parameters in the initial artifact, if there is one.
        start_from: the setting that selects rows of the initial artifact (`prompts.warm_start`).
            If sources were chosen by similarity, the resulting weight of each source. For prompts
            at several sites, the setting of each site. None if there is no such artifact or the
            method has no such setting.
        teacher_sha256: the digest of the teachers' prompts [K, P, H], if there are any.
        input_digests: see `Model.input_digests`. Artifacts must match them.
    """

    params: dict[str, Any]
    embedding_sha256: str
    backbone_sha256: str | None
    vocabulary_sha256: str | None
    artifact_sha256: str | None = None
    start_from: StartFrom | Mapping[str, StartFrom] | None = None
    teacher_sha256: str | None = None
    input_digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digests(self) -> dict[str, Any]:
        """All digests that artifacts and fingerprints record, by the name of their field."""
        return {
            "embedding_sha256": self.embedding_sha256,
            "backbone_sha256": self.backbone_sha256,
            "vocabulary_sha256": self.vocabulary_sha256,
            **self.input_digests,
        }

    @property
    def started_from(self) -> dict[str, Any] | None:
        """The record of the initial artifact in this job's artifacts; None if there is none."""
        if self.artifact_sha256 is None:
            return None
        return {"artifact_sha256": self.artifact_sha256, "start_from": self.start_from}


def initialize_params(
    model: Model, origins: Origins, key: Key, evaluates_artifact: bool = False
) -> InitialParams:
    """Initializes every parameter from its origin. Unless the initial artifact itself is evaluated,
    the model's inputs may differ from it in what `Model.changeable_digests` names.

    Raises:
        FileNotFoundError: a checkpoint or artifact is missing; the message says where it was
            expected and, if known, how to make it.
        ValueError: parameters are missing, extra, not finite or of another shape; the model differs
            from the backbone's `config.json`; the vocabulary does not fit the backbone; an artifact
            has another backbone, vocabulary or prompt length; a run has no teacher or several; or
            the method needs an initial artifact and none is set.
    """
    expected = {name: leaf.shape for name, leaf in flatten(param_shapes(model)[0]).items()}
    backbone_key, prompt_key = jax.random.split(key)
    params = _backbone(model, origins, backbone_key)
    embedding = model.embedding(params)
    _check_vocabulary(model, embedding.shape[0])
    digests = artifacts.embedding_digest(embedding), _weights_digest(origins, params)
    vocabulary = artifacts.vocabulary_digest(model.input_vocabulary)
    artifact_digest = start_from = teacher_digest = None
    described = "The initialized parameter tree"
    check = lambda artifact: compatibility.check_compatible(  # noqa: E731
        artifact,
        *digests,
        backbone_config(model.backbone_config),
        vocabulary,
        model.prompt.source_prompt_length(artifact.method, artifact.runs),
        model.comparable_digests(artifact.runs),
        () if evaluates_artifact else model.changeable_digests,
    )
    initial = functools.partial(
        _initial_prompt, model, prompt_key, jnp.asarray(embedding), model.kernels(params)
    )
    if origins.artifact:
        artifact = _initial_artifact(origins.artifact, origins.artifact_command)
        if evaluates_artifact:
            model.check_evaluates(artifact.runs)
            check_own_prompts(model.prompt, artifact.method, artifact.runs, model.runs)
        check(artifact)
        described += f" (prompts from {artifact.path})"
        artifact_digest = artifacts.digest(flatten(artifact.params))
        method = _resolve_nearest_sources(model.prompt, artifact.runs, model.runs, check)
        start_from = getattr(method, "start_from", None)
        source = artifact.params, artifact.method, artifact.runs
        prompt = method.transfer(*source, model.runs, initial)
    else:
        _require_initial_artifact(model.prompt)
        prompt = initial()
    if prompt:
        params["prompt"] = prompt
    if model.has_teacher:
        prompts = {}
        if model.reads_teachers:
            of_job = teachers.Job(model, *digests, vocabulary)
            prompts = teachers.prompts_of(of_job, origins.teachers, origins.teachers_command)
            teacher_digest = artifacts.digest({x or "table": y for x, y in prompts.items()})
        params["teacher"] = model.teacher_params(params, prompts)
    params = model.precompute(params)
    match_exactly(
        expected,
        {name: leaf.shape for name, leaf in flatten(params).items()},
        described,
    )
    return InitialParams(
        _cast(model, params),
        *digests,
        vocabulary,
        artifact_digest,
        start_from,
        teacher_digest,
        model.input_digests,
    )


def _backbone(model: Model, origins: Origins, key: Key) -> dict[str, Any]:
    if origins.scratch:
        return jax.jit(lambda key: model.init_backbone(key)[0])(key)
    assert origins.backbone is not None
    try:
        tree = convert.load_backbone(origins.backbone, model.backbone_config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No backbone could be loaded. {error} To get one: {origins.backbone_command}."
        ) from error
    # Checkpoints are read with one subtree per layer, however they were written.
    leaves = flatten(stack_layers(tree) if model.backbone_config.scan_layers else tree)
    shapes = backbone_shapes(model)
    optional = [name for name in shapes if re.fullmatch(model.optional_pattern, name)]
    added = [name for name in optional if name not in leaves]
    match_exactly(
        {name: shape for name, shape in shapes.items() if name not in added},
        {name: leaf.shape for name, leaf in leaves.items()},
        f"The backbone checkpoint {origins.backbone}",
        advice=model.config_setting,
    )
    return unflatten(leaves | {name: np.zeros(shapes[name], np.float32) for name in added})


def _weights_digest(origins: Origins, backbone: dict[str, Any]) -> str | None:
    if origins.digest_backbone:
        return backbone_digest(backbone)
    logging.warning(
        "train_state.Origins.digest_backbone = False: artifacts and checkpoints of this job record "
        "backbone_sha256 = null, and of the backbone only the embedding is checked."
    )
    return None


def _initial_prompt(model: Model, key: Key, embedding: Any, kernels: Kernels) -> dict[str, Any]:
    """Returns the method's initial values.

    Frozen values are not saved in checkpoints. They are computed with a fixed key, so that a
    resumed job or an evaluation gets the same values.
    """
    params = flatten(model.init_prompt(key, embedding, kernels))
    labels = flatten(model.label_tree({"prompt": unflatten(params)}))
    frozen = [name for name in params if labels[f"prompt/{name}"] == FROZEN]
    if frozen:
        fixed = flatten(model.init_prompt(jax.random.PRNGKey(0), embedding, kernels))
        params |= {name: fixed[name] for name in frozen}
    return unflatten(params)


def _initial_artifact(paths: str | Sequence[str], command: str) -> artifacts.Artifact:
    paths = [paths] if isinstance(paths, str) else paths
    try:
        return compatibility.merge([artifacts.load_artifact(path) for path in paths])
    except FileNotFoundError as error:
        advice = f" To make the missing artifact, run: {command}." if command else ""
        raise FileNotFoundError(
            f"{error} Set INITIAL_ARTIFACT to an existing artifact.{advice}"
        ) from error


def _resolve_nearest_sources(
    method: PromptMethod,
    source_runs: Runs,
    runs: Runs,
    check: Callable[[artifacts.Artifact], None],
) -> PromptMethod:
    """Returns the method with `NearestSource` in `start_from` replaced with the weights it chooses.

    A method with another `start_from`, or with none, is returned unchanged.

    Args:
        method: the prompt method.
        source_runs: the runs of the initial artifact.
        runs: the runs of the job.
        check: raises ValueError if an artifact is not compatible with the model.

    Raises:
        FileNotFoundError: an artifact with task embeddings is missing.
        ValueError: such an artifact is not compatible, or lacks the embedding of a run.
    """
    choice = getattr(method, "start_from", None)
    if not isinstance(choice, NearestSource):
        return method
    embeddings: list[Embeddings] = []
    for path, stage in (
        (choice.source_embeddings, "gin/spot_source_embeddings.gin"),
        (choice.target_embeddings, "gin/spot_embeddings.gin"),
    ):
        try:
            artifact = artifacts.load_artifact(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} START_FROM (NearestSource) needs the task embeddings in {path}. To make "
                f"them, run: python -m t5x.train --gin_file={stage}."
            ) from error
        check(artifact)
        embeddings.append(Embeddings(path, artifact.runs, artifact.folded()))
    table = choice.choose(embeddings[0], embeddings[1], source_runs, runs)
    return dataclasses.replace(method, start_from=table)  # pyright: ignore[reportArgumentType]


def _require_initial_artifact(method: PromptMethod) -> None:
    if method.needs_artifact:
        raise ValueError(
            f"The method {method.name!r} mixes frozen source prompts, but INITIAL_ARTIFACT is not "
            "set, so no artifact provides them. Set INITIAL_ARTIFACT to the artifact that "
            "gin/pt_source.gin writes, or to any other artifact or list of artifacts. To evaluate "
            "a checkpoint, set INITIAL_ARTIFACT to the artifact that its job wrote, or to the "
            "artifact that the job started from, with the same START_FROM."
        )
    if isinstance(getattr(method, "start_from", None), NearestSource):
        raise ValueError(
            "START_FROM (NearestSource) selects source prompts from an initial artifact, but "
            "INITIAL_ARTIFACT is not set. Set INITIAL_ARTIFACT (with gin/spot_target.gin: "
            "SPOT_SOURCES), or use gin/pt_target.gin to start without source prompts."
        )


def _check_vocabulary(model: Model, rows: int) -> None:
    for vocabulary in (model.input_vocabulary, model.output_vocabulary):
        if vocabulary is None:
            continue
        size = vocabulary.vocab_size
        if size > rows:
            raise ValueError(
                f"The vocabulary has {size} ids, but the backbone embeds only {rows}. Set "
                "VOCABULARY to the vocabulary that the backbone was trained with."
            )
        if rows - size > MOST_SPARE_ROWS:
            raise ValueError(
                f"The vocabulary has only {size} ids, but the backbone embeds {rows}. Set "
                "VOCABULARY to the vocabulary that the backbone was trained with. If only the "
                "sentinels are missing, set vocabularies.load.extra_ids to their number."
            )


def _cast(model: Model, params: dict[str, Any]) -> dict[str, Any]:
    """Casts the frozen parameters of the backbone to the compute dtype, and all others to float32.

    Uses NumPy, leaf by leaf: JAX would put the whole model on the first device.
    """
    dtypes = _dtypes(model, params)
    return unflatten(
        {
            name: np.asarray(leaf).astype(dtypes[name], copy=False)
            for name, leaf in flatten(params).items()
        }
    )

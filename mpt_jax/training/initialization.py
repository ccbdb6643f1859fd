"""The state of a run, and where every parameter's first value comes from.

Two tables, independent of each other. The *label* of a parameter says whether it learns (and so
whether it is differentiated, optimized and saved). Its *origin* says where its value comes from:

    origin      which parameters                     filled from
    backbone    token_embedder, encoder, decoder     Origins.backbone, a checkpoint
    teacher     teacher/table                        Origins.teachers, prompt artifacts
    artifact    prompt/*, if Origins.artifact is set that artifact, transferred by the method
    init        prompt/*, and biases T5 lacks        the method's or module's initial values

Restore order of a run: 1. its own last checkpoint (which holds only what learns), 2. the initial
artifact, 3. initial values. The backbone has no third way unless gin says `scratch = True`:
nothing ever falls back silently to random weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import convert
from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Key
from mpt_jax.core.tree import flatten, match_exactly, unflatten
from mpt_jax.models.encoder_decoder import BACKBONE, FROZEN, PromptedEncoderDecoder
from mpt_jax.prompts.base import PromptMethod
from mpt_jax.prompts.spot import Embeddings, NearestSource
from mpt_jax.prompts.warm_start import StartFrom
from mpt_jax.training.state import _dtypes, param_shapes

ADDED_BIAS = r"(token_embedder|encoder|decoder)/.*/bias"
# Embeddings are padded to a multiple of 128 or so (28 rows in T5, 12 in mT5, 125 in ByT5); more
# rows than this without a token belong to another vocabulary.
MOST_SPARE_ROWS = 255


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where first values come from.

    Attributes:
        backbone: a T5X checkpoint, an Orbax one, or a Hugging Face folder.
        teachers: artifact folder(s) that hold a prompt for every task of a distilled run.
        artifact: the artifact that prompts start from, or several, whose plain prompts are then
            taken together; None starts them from initial values.
        scratch: starts the backbone from random values (pretraining); excludes `backbone`.
        backbone_name: what artifacts call the backbone; default its path.
        backbone_command: how to make the backbone, said where it is missing.
        teachers_command: the same for the teachers.
        artifact_command: the same for the initial artifact; empty where there is no one command.
    """

    backbone: str | None = None
    teachers: str | Sequence[str] = ()
    artifact: str | Sequence[str] | None = None
    scratch: bool = False
    backbone_name: str | None = None
    backbone_command: str = "see README.md, 'Backbones'"
    teachers_command: str = "python -m mpt_jax.train --gin_file=gin/pt_source.gin"
    artifact_command: str = ""

    def __post_init__(self):
        teachers = (self.teachers,) if isinstance(self.teachers, str) else tuple(self.teachers)
        object.__setattr__(self, "teachers", teachers)
        if self.scratch and self.backbone:
            raise ValueError(
                f"Origins.scratch = True starts from random weights, but backbone is "
                f"{self.backbone!r}: set one of the two."
            )
        if not self.scratch and not self.backbone:
            raise ValueError(
                "Origins.backbone is not set, so there is no pretrained backbone to load. To "
                "train one from random weights, say so: Origins.scratch = True."
            )

    @property
    def name(self) -> str:
        """What artifacts call the backbone."""
        return self.backbone_name or self.backbone or "scratch"


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """Every parameter with its first value, and digests of where they come from.

    Attributes:
        params: the whole tree, NumPy arrays in the dtype they train or compute in. They lie on no
            device, so a model that only fits where it is sharded can be placed from here.
        embedding_sha256, vocabulary_sha256: what artifacts are checked by.
        artifact_sha256: of the parameters in the initial artifact, if there is one.
        start_from: how its rows were used; of a choice by similarity, what was chosen.
        teacher_sha256: of the teachers' table [K, P, H], if there is one.
    """

    params: dict[str, Any]
    embedding_sha256: str
    vocabulary_sha256: str | None
    artifact_sha256: str | None = None
    start_from: StartFrom | None = None
    teacher_sha256: str | None = None

    @property
    def started_from(self) -> dict[str, Any] | None:
        """What an artifact records of the one its prompts started from."""
        if self.artifact_sha256 is None:
            return None
        return {"artifact_sha256": self.artifact_sha256, "start_from": self.start_from}


def initialize_params(model: PromptedEncoderDecoder, origins: Origins, key: Key) -> InitialParams:
    """Every parameter, from its origin.

    Raises:
        FileNotFoundError: a checkpoint or artifact is not there; says where and what makes it.
        ValueError: parameters missing, extra or of another shape; digests that differ.
    """
    expected = {name: leaf.shape for name, leaf in flatten(param_shapes(model)[0]).items()}
    backbone_key, prompt_key = jax.random.split(key)
    params = _backbone(model, origins, backbone_key, expected)
    embedding = params["token_embedder"]["embedding"]
    _check_vocabulary(model, embedding.shape[0])
    digest = artifacts.embedding_digest(embedding)
    vocabulary = artifacts.vocabulary_digest(model.input_vocabulary)
    artifact_digest = start_from = teacher_digest = None
    check = lambda artifact: compatibility.check_compatible(  # noqa: E731
        artifact,
        digest,
        vocabulary,
        model.prompt.source_prompt_length(artifact.method, artifact.runs),
    )
    initial = functools.partial(_initial_prompt, model, prompt_key, jnp.asarray(embedding))
    if origins.artifact:
        artifact = _initial_artifact(origins.artifact, origins.artifact_command)
        check(artifact)
        artifact_digest = artifacts.digest(flatten(artifact.params))
        method = _with_sources_chosen(model.prompt, artifact.runs, model.runs, check)
        start_from = getattr(method, "start_from", None)
        source = artifact.params, artifact.method, artifact.runs
        prompt = method.transfer(*source, model.runs, initial)
    else:
        _refuse_to_start_from_nothing(model.prompt)
        prompt = initial()
    if prompt:
        params["prompt"] = prompt
    if model.has_teacher:
        params["teacher"] = {"table": _teachers(model, origins, digest, vocabulary)}
        teacher_digest = artifacts.digest(params["teacher"])
    match_exactly(
        expected, {name: leaf.shape for name, leaf in flatten(params).items()}, "The filled tree"
    )
    cast = _cast(model, params)
    return InitialParams(cast, digest, vocabulary, artifact_digest, start_from, teacher_digest)


def _backbone(
    model: PromptedEncoderDecoder, origins: Origins, key: Key, expected: dict[str, Any]
) -> dict[str, Any]:
    if origins.scratch:
        return jax.jit(lambda key: model.init_backbone(key)[0])(key)
    assert origins.backbone is not None
    try:
        tree = convert.load_backbone(origins.backbone)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No backbone at {origins.backbone} ({error}). To get one: {origins.backbone_command}."
        ) from error
    # Checkpoints are read unscanned, whatever they were written from.
    found = flatten(stack_layers(tree) if model.module.config.scan_layers else tree)
    wanted = {name: shape for name, shape in expected.items() if re.fullmatch(BACKBONE, name)}
    # BitFit's biases are none of T5's: they start from the module's own zeros.
    biases = {name for name in wanted if re.fullmatch(ADDED_BIAS, name) and name not in found}
    match_exactly(
        {name: shape for name, shape in wanted.items() if name not in biases},
        {name: leaf.shape for name, leaf in found.items()},
        f"The backbone checkpoint {origins.backbone}",
    )
    return unflatten(found | {name: np.zeros(wanted[name], np.float32) for name in biases})


def _initial_prompt(model: PromptedEncoderDecoder, key: Key, embedding: Any) -> dict[str, Any]:
    """The method's initial values. Those that never learn are in no checkpoint, so they are the
    same for every key: whoever resumes or evaluates finds them again."""
    found = model.init_prompt(key, embedding)
    labels = flatten(model.label_tree({"prompt": found}))
    frozen = [name for name in found if labels[f"prompt/{name}"] == FROZEN]
    if frozen:
        fixed = model.init_prompt(jax.random.PRNGKey(0), embedding)
        found |= {name: fixed[name] for name in frozen}
    return found


def _initial_artifact(paths: str | Sequence[str], command: str) -> artifacts.Artifact:
    paths = [paths] if isinstance(paths, str) else paths
    try:
        return compatibility.merge([artifacts.load_artifact(path) for path in paths])
    except FileNotFoundError as error:
        how = f" Make it by: {command}." if command else ""
        raise FileNotFoundError(f"{error} This run was to start from it.{how}") from error


def _with_sources_chosen(
    method: PromptMethod,
    source_runs: Runs,
    runs: Runs,
    check: Callable[[artifacts.Artifact], None],
) -> PromptMethod:
    """The method; where it starts by similarity, with the weights that come of it."""
    choice = getattr(method, "start_from", None)
    if not isinstance(choice, NearestSource):
        return method
    read: list[Embeddings] = []
    for path, stage in (
        (choice.source_embeddings, "gin/spot_source_embeddings.gin"),
        (choice.target_embeddings, "gin/spot_embeddings.gin"),
    ):
        try:
            artifact = artifacts.load_artifact(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} It was to hold task embeddings; make them by: python -m t5x.train "
                f"--gin_file={stage}."
            ) from error
        check(artifact)
        read.append(Embeddings(path, artifact.runs, artifact.folded()))
    table = choice.choose(read[0], read[1], source_runs, runs)
    return dataclasses.replace(method, start_from=table)  # pyright: ignore[reportArgumentType]


def _refuse_to_start_from_nothing(method: PromptMethod) -> None:
    if method.needs_artifact:
        raise ValueError(
            f"The method {method.name!r} mixes frozen source prompts, and no artifact has them: "
            "set INITIAL_ARTIFACT to that of gin/pt_source.gin, or to one or several others. To "
            "evaluate a checkpoint, to the artifact that its run left; or to the one it started "
            "from, with the START_FROM it had."
        )
    if isinstance(getattr(method, "start_from", None), NearestSource):
        raise ValueError(
            "start_from chooses among the prompts of an initial artifact, and there is none: set "
            "INITIAL_ARTIFACT, or take gin/pt_target.gin to start from initial values."
        )


def _check_vocabulary(model: PromptedEncoderDecoder, rows: int) -> None:
    for vocabulary in (model.input_vocabulary, model.output_vocabulary):
        if vocabulary is None:
            continue
        size = vocabulary.vocab_size
        if size > rows:
            raise ValueError(
                f"The vocabulary has {size} ids and the backbone embeds only {rows}: this is not "
                "the vocabulary the backbone was trained with."
            )
        if rows - size > MOST_SPARE_ROWS:
            raise ValueError(
                f"The vocabulary has only {size} ids and the backbone embeds {rows}: this is "
                "another backbone's vocabulary (VOCABULARY), or it lacks the backbone's sentinels "
                "(bind vocabularies.load.extra_ids)."
            )


def _teachers(
    model: PromptedEncoderDecoder, origins: Origins, digest: str, vocabulary: str | None
) -> np.ndarray:
    """The teacher of every bank row, [K, P, H]."""
    if not origins.teachers:
        raise ValueError(
            "The objective distils from teachers, but Origins.teachers names no artifact. They "
            f"are made by: {origins.teachers_command}."
        )
    known: list[_Teacher] = []
    for path in origins.teachers:
        try:
            artifact = artifacts.load_artifact(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} It was to hold the teachers; make them by: {origins.teachers_command}."
            ) from error
        compatibility.check_compatible(artifact, digest, vocabulary, model.prompt.prompt_length)
        names = zip(artifact.runs.run_names, artifact.runs.task_names, strict=True)
        for (run, task), prompt in zip(names, artifact.folded(), strict=True):
            known.append(_Teacher(run, task, str(path), prompt))
    return np.stack([teacher.prompt for teacher in _choose(model.runs, known)])


class _Teacher(NamedTuple):
    run: str
    task: str
    path: str
    prompt: np.ndarray  # [P, H]


def _choose(runs: Runs, known: Sequence[_Teacher]) -> list[_Teacher]:
    """A teacher for every row: the one of its run's name, else the only one of its task."""
    found: dict[str, list[_Teacher]] = {}
    for run, task in zip(runs.run_names, runs.task_names, strict=True):
        namesakes = [teacher for teacher in known if teacher.run == run]
        found[run] = namesakes or [teacher for teacher in known if teacher.task == task]
    tasks = dict(zip(runs.run_names, runs.task_names, strict=True))
    if without := [tasks[run] for run, teachers in found.items() if not teachers]:
        raise ValueError(
            f"No teacher for the tasks {without}; {sorted({each.path for each in known})} hold "
            f"teachers for {sorted({each.task for each in known})}. Train them with "
            "gin/pt_source.gin, or leave those tasks out."
        )
    several = {run: teachers for run, teachers in found.items() if len(teachers) > 1}
    if several:
        named = {run: [f"{each.run} in {each.path}" for each in several[run]] for run in several}
        raise ValueError(
            f"Several teachers for one run: {named}. Give the student's run the name of the one "
            "it shall follow (RUN_NAMES), or name artifacts with one run of each task."
        )
    return [teachers[0] for teachers in found.values()]


def _cast(model: PromptedEncoderDecoder, params: dict[str, Any]) -> dict[str, Any]:
    """What learns, and every prompt, in float32; the rest in the dtype it computes in.

    By NumPy, leaf by leaf: on a device the whole model would lie on the first one.
    """
    dtypes = _dtypes(model, params)
    return unflatten(
        {
            name: np.asarray(leaf).astype(dtypes[name], copy=False)
            for name, leaf in flatten(params).items()
        }
    )

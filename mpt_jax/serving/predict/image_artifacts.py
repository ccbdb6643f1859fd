"""What an image server reads from artifacts: plain prompts, classes, and how inputs are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.clip import CLIPConfig
from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.models.class_texts import ClassTexts, TaskClasses, class_texts
from mpt_jax.prompts.base import PromptMethod, params_of_parts
from mpt_jax.prompts.heads import Heads
from mpt_jax.prompts.lanes import LANE
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from mpt_jax.serving.prompt_bank import Named, row_names, taken

# A job of 1,000 classes and 80 templates has 80,000. The features of this many take 2 GiB.
MOST_TEXTS = 2**20


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The part of the artifacts that says how images and class texts are made.

    Attributes:
        transform: the settings of the image transform.
        position: the position of class names (`class_texts`).
        tasks: the classes of each row's task.
        head: the settings of heads beside lanes; None without lanes.
    """

    transform: dict[str, Any]
    position: str
    tasks: tuple[TaskClasses, ...]
    head: dict[str, Any] | None = None


def refuse_heads(found: Sequence[Artifact]) -> None:
    """Raises ValueError if an artifact has heads without lanes."""
    for artifact in found:
        if isinstance(artifact.method, Heads) and LANE not in artifact.method.parts:
            kind = artifact.method.name
            raise ValueError(
                f"The artifact {artifact.path} has heads without lanes (method {kind!r}), which "
                "this server cannot run. Use `python -m t5x.infer` with "
                f"gin/models/clip_classifier.gin and gin/methods/{kind}.gin."
            )


def is_of_images(folder: str) -> bool:
    """Whether a folder holds an artifact of an image job; raises as `load_artifact`."""
    return "images" in artifacts.load_artifact(folder).config


def check_origin(
    found: Sequence[Artifact],
    backbone: Any,
    config: CLIPConfig,
    tokenizer: ClipTokenizer | None,
    digest_backbone: bool,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Checks that artifacts agree with each other, the backbone and the tokenizer. Returns the
    digests of the backbone and the tokenizer, which artifacts with lanes do not need.

    Raises:
        ValueError: they disagree; the message shows both values.
    """
    compatibility.check_mutually_compatible(found, folded=True)
    if texts := [x.path for x in found if "images" not in x.config]:
        raise ValueError(
            f"The artifacts {abbreviate(texts)} have prompts for texts, and the others for images. "
            "Serve them separately."
        )
    weights = backbone_digest(backbone) if digest_backbone else None
    if config.text is not None:
        embedding = backbone["text_encoder"]["token_embedder"]["embedding"]
    else:  # as `PromptedClassifier.embedding`
        embedding = backbone["image_encoder"]["patch_embedding"]["kernel"]
    embedding = artifacts.embedding_digest(embedding)
    vocabulary = artifacts.vocabulary_digest(tokenizer)
    for artifact in found:
        compatibility.check_backbone(artifact, embedding, weights, backbone_config(config))
        compatibility.check_vocabulary(artifact, vocabulary)
    for warning in compatibility.not_compared(*compatibility.lacking(found), weights is not None):
        warn(warning)
    return {
        "embedding_sha256": embedding,
        "backbone_sha256": weights,
        "backbone_config": backbone_config(config),
        "vocabulary_sha256": vocabulary,
    }


def names_of_rows(found: Sequence[Artifact], sources: Sequence[Named]) -> list[str]:
    """Returns the names of all rows. Raises ValueError if two rows have the same name."""
    folder_of: dict[str, str] = {}
    for artifact, source in zip(found, sources, strict=True):
        for name in row_names(artifact.runs, source.name):
            if name in folder_of:
                raise ValueError(taken(name, folder_of[name], artifact.path))
            folder_of[name] = artifact.path
    return list(folder_of)


def plain_prompts_of(found: Sequence[Artifact]) -> tuple[SitePrompts, dict[str, Any]]:
    """Returns the plain prompts of all rows, as a method and its parameters.

    Raises:
        ValueError: the artifacts have prompts at other sites or of other lengths.
    """
    tables: dict[str, list[tuple[PromptMethod, Params]]] = {}
    shapes: dict[str, list[str]] = {}
    for artifact in found:
        parts = params_of_parts(artifact.method, artifact.params, artifact.runs)
        method: Any = artifact.method
        sizes = [
            f"{name} of {part.prompt_length} rows" + f" ({part.name})" * part.reads_image
            for name, (part, _) in parts.items()
        ]
        shape = f"{' and '.join(sizes)} in {method.image_layers} layers"
        shapes.setdefault(f"{shape}, {method.text_classes} classes", []).append(artifact.path)
        for name, (part, values) in parts.items():
            tables.setdefault(name, []).append(_by_row(part, values, artifact.runs))
    if len(shapes) > 1:
        values = "; ".join(f"{shape} in {abbreviate(paths)}" for shape, paths in shapes.items())
        raise ValueError(
            f"These artifacts cannot be served together, since their prompts differ: {values}. Use "
            "only artifacts that agree."
        )
    methods: Any = {name: parts[0][0] for name, parts in tables.items()}
    joined = {
        name: jax.tree.map(lambda *x: jnp.concatenate(x), *(values for _, values in parts))
        for name, parts in tables.items()
    }
    first: Any = found[0].method
    method = SitePrompts(
        **methods, text_classes=first.text_classes, image_layers=first.image_layers
    )
    return method, joined


def _by_row(
    part: PromptMethod, values: Params, runs: Runs
) -> tuple[PromptMethod, dict[str, np.ndarray]]:
    """Returns plain prompts, as a method and its parameters; for prompts that depend on the image,
    their method, with the parameters of each row's group."""
    if part.reads_image:
        groups = np.asarray(runs.group_of_row)
        return part, {name: np.asarray(x)[groups] for name, x in values.items()}
    table = np.asarray(materialize(part, values, runs))
    return PromptTuning(table.shape[1]), {"table": table}


def inputs_of(found: Sequence[Artifact], lanes: bool = False) -> Inputs:
    """Returns how the inputs of artifacts are made.

    Args:
        found: the artifacts.
        lanes: whether they have lanes, which need the settings of heads.

    Raises:
        ValueError: artifacts differ in the position of class names, the image transform, the
            settings of heads, or the classes of a task; or an artifact records no classes of a
            task, or no settings of its heads.
    """
    tasks: list[TaskClasses] = []
    known: dict[str, tuple[TaskClasses, str]] = {}
    for artifact in found:
        classes = _classes(artifact)
        for name in artifact.runs.task_names:
            task = classes[name]
            first, path = known.setdefault(name, (task, artifact.path))
            if first != task:
                raise ValueError(
                    f"{path} and {artifact.path} have other classes or templates of the task "
                    f"{name!r}. Serve them separately."
                )
            tasks.append(task)
    position = _agreed(found, "context position", lambda images: images["context_position"])
    transform = _agreed(found, "image transform", lambda images: images["transform"])
    if not lanes:
        return Inputs(transform, position, tuple(tasks))
    if lacking := [x.path for x in found if x.config["images"].get("head") is None]:
        raise ValueError(
            f"The artifacts {abbreviate(lacking)} do not record how their heads read features "
            "(images.head). Repeat the command that wrote them with this version."
        )
    head = _agreed(found, "head", lambda images: images["head"])
    return Inputs(transform, position, tuple(tasks), head)


def _classes(artifact: Artifact) -> dict[str, TaskClasses]:
    """Returns the classes of each task of an artifact's runs, by its name. Raises ValueError if it
    does not record those of a task."""
    recorded = artifact.config["images"]["tasks"]
    classes = {}
    for name in dict.fromkeys(artifact.runs.task_names):
        if (entry := recorded.get(name)) is None:
            raise ValueError(
                f"{artifact.path} records no classes of its task {name!r}. {artifacts.COPY_AGAIN}"
            )
        names, templates = tuple(entry["names"]), tuple(entry["templates"])
        classes[name] = TaskClasses(name, names, templates, entry["multi_label"])
    return classes


def _agreed(found: Sequence[Artifact], what: str, value_of: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns a setting of artifacts' images.

    Raises:
        ValueError: it differs; the message lists each value with its artifacts.
    """
    folders: dict[str, list[str]] = {}
    for artifact in found:
        value = json.dumps(value_of(artifact.config["images"]), sort_keys=True)
        folders.setdefault(value, []).append(artifact.path)
    if len(folders) > 1:
        values = "; ".join(f"{value} in {abbreviate(paths)}" for value, paths in folders.items())
        raise ValueError(
            f"These artifacts cannot be served together, since their {what} differs: {values}. Use "
            "only artifacts that agree."
        )
    return value_of(found[0].config["images"])


def check_shapes(
    found: Sequence[Artifact],
    method: SitePrompts,
    prompt: dict[str, Any],
    inputs: Inputs,
    config: CLIPConfig,
) -> None:
    """Raises ValueError if the images or the prompts do not have the sizes of the backbone."""
    assert config.text is not None
    image = config.image
    compared: list[Any] = [("images of {} pixels", inputs.transform["size"], image.image_size)]
    for site, tower in ((TEXT, config.text), (IMAGE, image)):
        for name, leaf in prompt.get(site, {}).items():
            sizes = dict(zip(method.parts[site].axes[name], leaf.shape, strict=True))
            compared.append((f"{site} of width {{}}", sizes.get("embed"), tower.emb_dim))
            compared.append(("features of width {}", sizes.get("joint"), config.joint_dim))
    if IMAGE in prompt and method.image_layers != 1:
        compared.append((f"{IMAGE} in {{}} layers", method.image_layers, image.num_layers))
    for what, size, expected in compared:
        if size is not None and size != expected:
            raise ValueError(
                f"The artifacts {abbreviate([x.path for x in found])} have {what.format(size)}, "
                f"but the backbone has {what.format(expected)}. {artifacts.COPY_AGAIN}"
            )


def check_number(method: SitePrompts, inputs: Inputs) -> None:
    """Raises ValueError if there are too many class texts, or pairs of a row and a class."""
    number = sum(len(task.names) for task in inputs.tasks)
    if TEXT not in method.parts:
        distinct = {task.task: len(task.names) * len(task.templates) for task in inputs.tasks}
        number = max(number, sum(distinct.values()))
    if number > MOST_TEXTS:
        raise ValueError(
            f"The artifacts have {number:,} class texts, and the limit is {MOST_TEXTS:,}. Serve "
            "fewer artifacts together, or ones with fewer classes or templates."
        )


def texts_of(
    inputs: Inputs, method: SitePrompts, tokenizer: ClipTokenizer, config: CLIPConfig
) -> ClassTexts:
    length = 0
    if (part := method.parts.get(TEXT)) is not None:
        length = part.prompt_length // (method.text_classes or 1)
    assert config.text is not None
    distinct = list({task.task: task for task in inputs.tasks}.values())
    most = config.text.context_length
    return class_texts(distinct, tokenizer, most, length, inputs.position)

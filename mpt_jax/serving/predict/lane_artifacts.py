"""Model, parameters and class names that an image server builds from artifacts with lanes
(MULTI-LANE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.backbones.clip import CLIP, CLIPConfig
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.models.class_texts import untokenized
from mpt_jax.models.classifier import PromptedClassifier
from mpt_jax.prompts.lanes import HEAD, LANE, MultiLane
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.serving.predict.image_artifacts import Inputs, inputs_of


def have_lanes(found: Sequence[Artifact]) -> bool:
    """Whether artifacts have lanes. Raises ValueError if only some of them have."""
    lanes = [x.path for x in found if LANE in x.method.parts]
    if lanes and len(lanes) < len(found):
        others = [x.path for x in found if x.path not in lanes]
        raise ValueError(
            f"The artifacts {abbreviate(lanes)} have lanes and heads, but {abbreviate(others)} "
            "have prompts of a CLIP with class texts. Serve them separately."
        )
    return bool(lanes)


def lane_model(
    found: Sequence[Artifact], names: Sequence[str], config: CLIPConfig
) -> tuple[PromptedClassifier, dict[str, Any], Inputs]:
    """Returns a model with the lanes of all rows, the parameters of its prompt, and how its inputs
    are made. Each sequence of an artifact is a group.

    Args:
        found: the artifacts.
        names: the names of all rows.
        config: the configuration of the backbone.

    Raises:
        ValueError: as `inputs_of`; lanes or images do not have the sizes of the backbone; a task
            has more classes than its head; or the lanes of artifacts have other settings.
    """
    inputs = inputs_of(found, lanes=True)
    assert inputs.head is not None
    for artifact in found:
        _check_sizes(artifact, inputs, config)
    method, prompt = _joined(found)
    groups: list[int] = []
    for artifact in found:
        first = max(groups, default=-1) + 1
        groups += [first + group for group in artifact.runs.group_of_row]
    distinct = list({task.task: task for task in inputs.tasks}.values())
    runs = Runs([task.task for task in inputs.tasks], names, groups)
    model = PromptedClassifier(CLIP(config), method, runs, untokenized(distinct), **inputs.head)
    return model, prompt, inputs


def _joined(found: Sequence[Artifact]) -> tuple[MultiLane, dict[str, Any]]:
    """Returns the lanes and heads of all rows, as a method and its parameters; a head has as many
    columns as the largest. Raises ValueError if artifacts have other settings of lanes."""
    tables, kernels, biases = [], [], []
    settings: dict[str, list[str]] = {}
    methods: list[Any] = [artifact.method for artifact in found]
    columns = max(method.num_classes for method in methods)
    for artifact, method in zip(found, methods, strict=True):
        table = np.asarray(materialize(method.lane, artifact.params[LANE], artifact.runs))
        summaries = "new" if method.drop_and_replace else "the first layer's"
        shown = (
            f"{table.shape[1]} rows with {method.selectors} selectors, {method.merged_tokens} "
            f"merged tokens, {method.layers} layers of keys and values and {summaries} summaries"
        )
        settings.setdefault(shown, []).append(artifact.path)
        spare = (0, columns - method.num_classes)
        head = {name: np.asarray(x) for name, x in artifact.params[HEAD].items()}
        tables.append(table)
        kernels.append(np.pad(head["kernel"], ((0, 0), spare, (0, 0))))
        biases.append(np.pad(head["bias"], ((0, 0), spare)))
    if len(settings) > 1:
        values = "; ".join(f"{shown} in {abbreviate(paths)}" for shown, paths in settings.items())
        raise ValueError(
            f"These artifacts cannot be served together, since their lanes differ: {values}. Use "
            "only artifacts that agree."
        )
    plain = PromptTuning(tables[0].shape[1])
    method = dataclasses.replace(methods[0], lane=plain, num_classes=columns)
    join = lambda parts: jnp.asarray(np.concatenate(parts))  # noqa: E731
    return method, {
        LANE: {"table": join(tables)},
        HEAD: {"kernel": join(kernels), "bias": join(biases)},
    }


def _check_sizes(artifact: Artifact, inputs: Inputs, config: CLIPConfig) -> None:
    """Raises ValueError if an artifact does not fit the backbone, or a task does not fit its
    head."""
    method: Any = artifact.method
    tower, rows = config.image, artifact.runs.num_rows
    kernel, bias = (artifact.params[HEAD][name] for name in ("kernel", "bias"))
    features = config.joint_dim or tower.emb_dim
    compared: list[Any] = [
        ("images of {} pixels", inputs.transform["size"], tower.image_size),
        ("features of width {}", kernel.shape[-1], features),
    ]
    for name, leaf in artifact.params[LANE].items():
        sizes = dict(zip(method.parts[LANE].axes[name], leaf.shape, strict=True))
        compared.append(("lanes of width {}", sizes.get("embed"), tower.emb_dim))
    for what, size, expected in compared:
        if size is not None and size != expected:
            raise ValueError(
                f"The artifact {artifact.path} has {what.format(size)}, but the backbone has "
                f"{what.format(expected)}. {artifacts.COPY_AGAIN}"
            )
    limits = [
        ("keys and values in {} layers", method.layers, tower.num_layers, "layers"),
        ("{} merged tokens", method.merged_tokens, tower.num_tokens - 1, "patches"),
    ]
    for what, size, most, of in limits:
        if size > most:
            raise ValueError(
                f"The artifact {artifact.path} has {what.format(size)}, but the backbone has "
                f"{most} {of}. {artifacts.COPY_AGAIN}"
            )
    columns = method.num_classes
    if (kernel.shape[:2], bias.shape) != ((rows, columns), (rows, columns)):
        raise ValueError(
            f"The artifact {artifact.path} has heads of the shapes {kernel.shape} and "
            f"{bias.shape}, but {columns} classes. {artifacts.COPY_AGAIN}"
        )
    for task in inputs.tasks:
        if task.task in artifact.runs.task_names and len(task.names) > columns:
            raise ValueError(
                f"The task {task.task!r} of {artifact.path} has {len(task.names)} classes, but "
                f"its head has {columns}. {artifacts.COPY_AGAIN}"
            )


def seen_classes(model: PromptedClassifier) -> list[tuple[int, str]]:
    """Returns the row and the name of each column of `model.score_seen_batch`. A class name that
    several lanes of a sequence have is written as LANE/CLASS."""
    runs, tasks = model.runs, [model.texts.of_task(name) for name in model.runs.task_names]
    lanes_with: dict[tuple[int, str], int] = {}
    for group, task in zip(runs.group_of_row, tasks, strict=True):
        for name in task.names:
            lanes_with[group, name] = lanes_with.get((group, name), 0) + 1
    return [
        (row, name if lanes_with[group, name] == 1 else f"{runs.run_names[row]}/{name}")
        for row, (group, task) in enumerate(zip(runs.group_of_row, tasks, strict=True))
        for name in task.names
    ]


def mixed_rows(model: PromptedClassifier) -> dict[int, list[str]]:
    """Returns the tasks of the sequence of each row whose sequence has tasks with one label per
    image and multi-label tasks, so that their scores cannot be compared."""
    runs, multi = model.runs, model.bank.is_multi_label.tolist()
    kinds: dict[int, set[bool]] = {}
    for group, kind in zip(runs.group_of_row, multi, strict=True):
        kinds.setdefault(group, set()).add(kind)
    return {
        row: list(runs.names_of_group(group))
        for row, group in enumerate(runs.group_of_row)
        if len(kinds[group]) > 1
    }

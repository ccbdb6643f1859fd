"""Sample images of a job with lanes, with the attention and the predictions of its artifact.

The job's config.gin names its data, model and backbone. Reading it imports what it names, as
training did.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Float, UInt8

from mpt_jax import train
from mpt_jax.artifacts import compatibility
from mpt_jax.artifacts.artifacts import Artifact, load_artifact
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.config import gin_check, gin_utils, trainer_choice
from mpt_jax.core.old_names import existing_folder
from mpt_jax.core.shapes import Params
from mpt_jax.data import datasets, task_lookup
from mpt_jax.data.classes import TARGETS
from mpt_jax.data.image_preprocessors import IMAGE
from mpt_jax.experiments.report import run_reader
from mpt_jax.models import lane_attention
from mpt_jax.models.class_interface import predicted_classes
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.models.classifier import PromptedClassifier
from mpt_jax.prompts.lanes import MultiLane
from mpt_jax.training import initialization

CONFIG = "config.gin"
MOST_IMAGES = 24  # of a page
_BATCH = 8  # images that are encoded at once


@dataclasses.dataclass(frozen=True)
class SeenImage:
    """A test image, and what the lanes of a job make of it.

    Attributes:
        run: The run whose task has the image.
        split: The split.
        number: The position of the image in the split.
        pixels: The image as the model gets it.
        classes: The names of its classes.
        predicted: The names of the classes that the run's own lane predicts.
        attention: How far each lane of the job attends to each token in each layer; see
            `models.lane_attention`.
    """

    run: str
    split: str
    number: int
    pixels: UInt8[np.ndarray, "S S 3"]
    classes: tuple[str, ...]
    predicted: tuple[str, ...]
    attention: Float[np.ndarray, "K layers I"]


class _Job(NamedTuple):
    """The arguments of a job's `train()` that are needed."""

    model: Any
    data: datasets.DatasetConfig | None
    initializer_cls: Any


class _Sample(NamedTuple):
    """An image before it is encoded."""

    row: int
    number: int
    pixels: np.ndarray
    classes: tuple[str, ...]


def seen_images(model_dir: Path, count: int) -> tuple[tuple[str, ...], list[SeenImage]]:
    """Returns the names of a job's lanes, and images of the split that it evaluates, in equal
    numbers of its tasks and at equal distances in the split.

    Args:
        model_dir: The MODEL_DIR of a job with lanes.
        count: The number of images.

    Raises:
        ValueError: the count is out of range; the job has no artifact with lanes and selectors, or
            evaluates no data; or its config.gin, backbone or data cannot be used.
        OSError: the artifact, config.gin, the backbone or the data do not exist.
    """
    if not 1 <= count <= MOST_IMAGES:
        raise ValueError(
            f"The number of images is {count}, but a page shows 1 to {MOST_IMAGES}. Correct "
            "--images."
        )
    artifact = _artifact(model_dir)
    job = _read_job(model_dir)
    if job.data is None:
        raise ValueError(
            f"The job in {model_dir} evaluates no data, so there are no images to show. Omit "
            "--images, or train without gin/runs/no_evaluation.gin."
        )
    model, params = _with_prompts(job, artifact)
    samples = list(_samples(model, job.data, count))
    attend = jax.jit(functools.partial(lane_attention.lane_attention, model))
    score = jax.jit(model.score_batch)
    found = []
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        filled = part + part[:1] * (_BATCH - len(part))  # one program for all batches
        batch = {
            "image": np.stack([sample.pixels for sample in filled]),
            "task_ids": np.array([sample.row for sample in filled], np.int32),
        }
        attention, scores = jax.device_get((attend(params, batch), score(params, batch)))
        for sample, maps, values in zip(part, attention, scores, strict=False):
            found.append(_seen(model, job.data.split, sample, maps, values))
    return tuple(model.runs.run_names), found


def _seen(
    model: PromptedClassifier, split: str, sample: _Sample, maps: np.ndarray, values: np.ndarray
) -> SeenImage:
    task = _classes(model, sample.row)
    predicted = predicted_classes(task.names, values[: len(task.names)], task.multi_label)
    names = (predicted,) if isinstance(predicted, str) else tuple(predicted)
    run = model.runs.run_names[sample.row]
    return SeenImage(run, split, sample.number, sample.pixels, sample.classes, names, maps)


def _artifact(model_dir: Path) -> Artifact:
    """Loads the artifact of a job with lanes."""
    artifact = load_artifact(existing_folder(model_dir / run_reader.ARTIFACT))
    method = artifact.method
    if not isinstance(method, MultiLane):
        raise ValueError(
            f"The artifact in {model_dir} has prompts of the method {method.name!r}, but --images "
            "shows the attention of lanes. Omit --images, or pass the MODEL_DIR of a job of "
            "gin/multilane.gin."
        )
    lane_attention.check_has_selectors(method.selectors)
    return artifact


def _read_job(model_dir: Path) -> _Job:
    """Reads config.gin without running the job."""
    path = model_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so the data and the backbone of the job are unknown. Copy it "
            "from the folder that the job wrote, or omit --images."
        )
    trainer_choice.install_fallback()
    with gin_utils.as_main(train):
        gin_utils.parse([str(path)])
        bound = gin.get_bindings(train.train) if gin_check.is_bound(train.train) else {}
    arguments = ("model", "infer_eval_dataset_cfg", "train_state_initializer_cls")
    if any(name not in bound for name in arguments):
        raise ValueError(
            f"{path} does not configure a training job that evaluates images. Pass the MODEL_DIR "
            "of a job of gin/multilane.gin, or omit --images."
        )
    return _Job(*(bound[name] for name in arguments))


def _with_prompts(job: _Job, artifact: Artifact) -> tuple[PromptedClassifier, Params]:
    """Returns the model with the method of the artifact, and all parameters, after checking that
    the artifact was trained with the job's backbone and inputs."""
    model: PromptedClassifier = job.model
    origins = dataclasses.replace(job.initializer_cls().origins, artifact=None)
    loaded = initialization.initialize_params(model, origins, jax.random.PRNGKey(0))
    compatibility.check_compatible(
        artifact,
        loaded.embedding_sha256,
        loaded.backbone_sha256,
        backbone_config(model.backbone_config),
        loaded.vocabulary_sha256,
        model.prompt.source_prompt_length(artifact.method, artifact.runs),
        model.comparable_digests(artifact.runs),
    )
    if artifact.runs != model.runs:
        raise ValueError(
            f"The artifact {artifact.path} has the runs {', '.join(artifact.runs.run_names)}, but "
            f"those of the job are {', '.join(model.runs.run_names)}. Pass a MODEL_DIR whose "
            "artifact and config.gin are of one job."
        )
    model = copy.copy(model)
    model.prompt = artifact.method
    return model, {**loaded.params, "prompt": artifact.params}


def _samples(
    model: PromptedClassifier, data: datasets.DatasetConfig, count: int
) -> Iterator[_Sample]:
    """Yields the chosen images of each run that has the split."""
    cfg, _ = datasets.with_split(data)
    if cfg is None:
        raise ValueError(
            f"No task of the job has the split {data.split!r}, so there are no images to show. "
            "Omit --images."
        )
    tasks = seqio.get_subtasks(cfg.provider())
    for place, task in enumerate(tasks):
        number = count // len(tasks) + (place < count % len(tasks))
        if number:
            yield from _of_task(model, task, cfg, number)


def _of_task(
    model: PromptedClassifier, task: seqio.Task, cfg: datasets.DatasetConfig, count: int
) -> Iterator[_Sample]:
    row = model.runs.row(task.name)
    names = _classes(model, row).names
    with task_lookup.explain_missing_data(task, cfg.split):
        size = task.source.num_input_examples(cfg.split)
        examples = task.get_dataset(
            {}, split=cfg.split, use_cached=cfg.use_cached, shuffle=False, num_epochs=1
        )
        chosen = np.arange(count) if size is None else np.arange(count) * size // count
        wanted = tf.constant(np.unique(chosen), tf.int64)
        numbered = examples.enumerate().filter(lambda i, _: tf.reduce_any(wanted == i))
        found = list(numbered.take(len(wanted)).as_numpy_iterator())
    for number, example in found:
        encoded, what = example[IMAGE][0], f"example {number} of {task.name}"
        pixels = model.image_transform.of_file(encoded, what)
        classes = tuple(names[i] for i in example[TARGETS])
        yield _Sample(row, int(number), pixels, classes)


def _classes(model: PromptedClassifier, row: int) -> TaskClasses:
    return model.texts.of_task(model.runs.task_names[row])

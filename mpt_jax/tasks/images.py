"""Image tasks from the user's folders, tables and arrays.

    from mpt_jax.tasks import images

    images.register(
        "birds",
        images.FolderImages("birds", with_splits=True),
        templates=("a photo of a {}, a type of bird.",),
    )

Registration checks names and templates and reads no data. The first request for examples or class
names lists the images, and reports all rows that cannot be used.

`birds_base` has the first half of the classes, `birds_new` the rest (`register_half`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mpt_jax.core.runs import unknown_name
from mpt_jax.data import image_preprocessors, task_lookup
from mpt_jax.data.classes import (
    ClassVocabulary,
    check_names,
    classes_of,
    is_image_task,
    normalized,
    readable,
)
from mpt_jax.tasks import few_shot, image_metrics, text_metrics
from mpt_jax.tasks.image_arrays import ArrayImages
from mpt_jax.tasks.image_classes import BASE, NEW, SomeClasses, half_of_classes
from mpt_jax.tasks.image_few_shot import read_index, register_selection, write_index
from mpt_jax.tasks.image_files import FolderImages, TableImages
from mpt_jax.tasks.image_sources import ImageSource
from mpt_jax.tasks.image_splits import DividedImages, pooled
from mpt_jax.tasks.image_tfds import TfdsImages

__all__ = [
    "ArrayImages",
    "ClassVocabulary",
    "DividedImages",
    "FolderImages",
    "ImageSource",
    "TableImages",
    "TfdsImages",
    "classes_of",
    "is_image_task",
    "metric",
    "pooled",
    "read_index",
    "readable",
    "register",
    "register_selection",
    "write_index",
]

TEMPLATES = ("a photo of a {}.",)
METRICS: Mapping[str, Callable[..., Any]] = {
    "accuracy": image_metrics.accuracy,
    "mean_per_class": image_metrics.mean_per_class,
    "map": image_metrics.mean_average_precision,
    "map_11point": image_metrics.map_11point,
    "roc_auc": image_metrics.roc_auc,
    "calibration_error": image_metrics.calibration,
}

# Attribute of a metric that is bound to the classes of a task: the one that was given.
_GIVEN = "given"

# Those that need one class per example.
SINGLE_LABEL = ("accuracy", "mean_per_class", "roc_auc", "calibration_error")

ClassNames = Sequence[str] | Mapping[str, str] | None


def register(
    name: str,
    source: seqio.DataSource,
    class_names: ClassNames | Callable[[], Sequence[str]] = None,
    *,
    templates: Sequence[str] = TEMPLATES,
    metric_fns: Sequence[str | Callable[..., Any]] | None = None,
    multi_label: bool | None = None,
    shares: Sequence[float] | None = None,
    drawn_as: str | None = None,
) -> None:
    """Registers a SeqIO image task.

    Args:
        name: The name of the task.
        source: The source of {image, labels, id}, see `image_sources`.
        class_names: The display names of the classes. None for the names in the source with spaces
            for underscores; a mapping to replace some of these; a sequence of the same names in
            another spelling; or a function that returns all names in label order.
        templates: The texts in which `{}` stands for a class name.
        metric_fns: The metrics: names of `METRICS`, or SeqIO metrics `(targets, scores)`, whose
            scores are log probabilities [N, C] of the task's own classes, see `image_metrics`. The
            first one selects the best step. None for accuracy, or map_11point if `multi_label`.
        multi_label: Whether an image may have any number of classes; None for what the source says.
        shares: The shares of train, validation and test, by a stable hash within each class of the
            source, whose only split is train; None for the splits of the source.
        drawn_as: The name of the task whose few-shot selections this task uses; None for `name`.

    Raises:
        ValueError: the name is taken; a name, template, metric or share is invalid; or a metric
            needs one class per example, but an example may have several.
    """
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(
            f"A task or mixture named {name!r} is already registered. Choose another name."
        )
    if multi_label is None:
        multi_label = getattr(source, "multi_label", False)
    if isinstance(source, ImageSource):
        if multi_label != source.multi_label:
            raise ValueError(
                f"Task {name!r} has multi_label={multi_label}, but its source has "
                f"multi_label={source.multi_label}. Pass multi_label to the source only."
            )
        if shares is not None:
            source = _DividedSplit(source, pooled("train", shares=shares), name)
    elif shares is not None or class_names is None or isinstance(class_names, Mapping):
        raise ValueError(
            f"The source of task {name!r} is a {type(source).__name__}, which cannot be divided "
            "and has no class names. Omit shares=, and pass all class_names= in label order."
        )
    if metric_fns is None:
        metric_fns = ("map_11point",) if multi_label else ("accuracy",)
    if multi_label and (wrong := [fn for fn in metric_fns if fn in SINGLE_LABEL]):
        raise ValueError(
            f"Task {name!r} has several classes per example, but the metric {wrong[0]!r} needs one "
            "class per example. Use map or map_11point in metric_fns=."
        )
    if isinstance(class_names, Sequence):
        check_names(class_names)
    names = class_names
    if isinstance(source, ImageSource) and not callable(class_names):
        names = functools.partial(names_of, source, class_names)
    classes = ClassVocabulary(names, templates, multi_label)
    task = seqio.Task(
        name,
        source=source,
        output_features=image_preprocessors.output_features(classes),
        preprocessors=image_preprocessors.finish(name),
        postprocess_fn=functools.partial(_class_ids, classes),
        metric_fns=[text_metrics.of_task(name, metric(fn, classes)) for fn in metric_fns],
    )
    if drawn_as is not None:
        few_shot.draw_as(task, drawn_as)
    seqio.TaskRegistry.add_provider(name, task)


def register_half(name: str) -> bool:
    """Registers `<task>_base` or `<task>_new`, with the first half of the classes of a task or the
    rest; a resolver for `task_lookup.register_task_resolver`. No data is read. The images of
    few-shot runs are those that runs of the whole task have of the same classes.

    Returns:
        Whether `name` is such a name, of an image task.

    Raises:
        ValueError: the task is a few-shot run, or an image may have several classes.
    """
    whole, _, half = name.rpartition("_")
    if half not in (BASE, NEW) or not whole or not task_lookup.is_task(whole):
        return False
    task = seqio.TaskRegistry.get(whole)
    if not is_image_task(task):
        return False
    classes, source = classes_of(task), task.source
    if classes.multi_label:
        raise ValueError(
            f"{name} has half of the classes of {whole}, but an image of {whole} may have classes "
            "of both halves. Name a task whose images have one class each."
        )
    if not isinstance(source, ImageSource):
        raise ValueError(
            f"{name} cannot divide {whole}, which is a few-shot run or has a source of another "
            f"library. Name the half before the draw, as in <task>_{half}_k16_per_class_s1."
        )
    chosen = functools.cache(lambda: half_of_classes(whole, half, len(classes.names)))
    register(
        name,
        SomeClasses(source, chosen),
        lambda: [classes.names[number] for number in chosen()],
        templates=classes.templates,
        metric_fns=[getattr(fn, _GIVEN, fn) for fn in task.metric_fns],
        drawn_as=few_shot.drawn_as(task),
    )
    return True


class _DividedSplit(DividedImages):
    """Division of the only split of a source, which may read its data to know its splits."""

    def rows(self, split: str) -> list[tuple[str, int]]:
        """Returns what `DividedImages.rows` does.

        Raises:
            ValueError: a split would be empty, or the source has other splits than train.
        """
        if (splits := tuple(self.source.splits)) != ("train",):
            raise ValueError(
                f"Task {self.name!r} has shares=, but {self.source} has the splits "
                f"{', '.join(splits)}. Omit shares=, or register images.DividedImages(source, "
                f"images.pooled({', '.join(map(repr, splits))}, shares=...), {self.name!r})."
            )
        return super().rows(split)


def names_of(source: ImageSource, class_names: ClassNames) -> list[str]:
    """Returns the display names of the classes of a source in label order; see `register`.

    Names in a sequence are matched by `classes.normalized`, not by position, unless the source has
    only numbers.

    Raises:
        ValueError: `class_names` names a class that the source lacks, or lacks one of its classes.
    """
    ids = source.class_ids
    if ids is None:
        assert class_names is not None and not isinstance(class_names, Mapping)
        return list(class_names)
    if class_names is None:
        return [readable(x) for x in ids]
    if isinstance(class_names, Mapping):
        if unknown := [x for x in class_names if x not in ids]:
            raise ValueError(
                f"class_names= names the class {unknown[0]!r}, which {source} lacks; its classes "
                f"are {_some(ids)}. Correct the name."
            )
        return [class_names.get(x) or readable(x) for x in ids]
    found = {normalized(x): x for x in class_names}
    if absent := [x for x in ids if normalized(x) not in found]:
        raise ValueError(
            f"class_names= has no name for the class {absent[0]!r} of {source}, whose classes are "
            f"{_some(ids)}. Add it, or pass a mapping from classes to names."
        )
    if len(class_names) != len(ids):
        extra = [x for x in class_names if normalized(x) not in set(map(normalized, ids))]
        raise ValueError(
            f"class_names= has {len(class_names)} names, but {source} has {len(ids)} classes; "
            f"not among them: {_some(extra)}. Remove these names."
        )
    return [found[normalized(x)] for x in ids]


def metric(chosen: str | Callable[..., Any], classes: ClassVocabulary) -> Callable[..., Any]:
    """Returns the SeqIO metric of a name of `METRICS`, or a given one, for a task with these
    classes. Models return as many scores as the task with the most classes has; a metric `(targets,
    scores)` gets only those of the task's own classes. With a NaN among them, which is what a run
    that has failed returns, it is undefined and counts as 0, so that other runs can be scored.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(chosen, str) and chosen not in METRICS:
        raise ValueError(unknown_name("image metric", chosen, list(METRICS)))
    fn = METRICS[chosen] if isinstance(chosen, str) else chosen
    if list(inspect.signature(fn).parameters)[1:2] != ["scores"]:
        return fn

    @functools.wraps(fn)
    def of_own_classes(targets: Sequence[Any], scores: Any) -> dict[str, Any]:
        own = np.asarray(scores)[:, : len(classes.names)]
        if (bad := np.isnan(own).any(axis=1)).any():
            why = f"a score of {bad.sum():,} of {len(own):,} examples is NaN"
            return text_metrics.marked({text_metrics.value_names(of_own_classes)[0]: 0.0}, why)
        return fn(targets, own)

    setattr(of_own_classes, _GIVEN, chosen)
    if isinstance(chosen, str):
        of_own_classes.value_names = (chosen,)  # type: ignore[attr-defined]
    return of_own_classes


def _class_ids(
    classes: ClassVocabulary, output: str, example: Any = None, is_target: bool = False
) -> Any:
    """Returns what metrics compare: of a target, its class id, or a multi-hot row if an example may
    have several classes; of a prediction, the names of its classes."""
    if not is_target:
        return output
    ids = np.asarray(example["targets"])
    if not classes.multi_label:
        return int(ids[0])
    return np.isin(np.arange(len(classes.names)), ids).astype(np.int32)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


task_lookup.register_task_resolver(register_half)

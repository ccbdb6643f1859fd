"""Rows of the suites' tables, and their registration.

Sets that TFDS does not have are folders below one root: $MPT_JAX_IMAGES, else the folder `images`
of $MPT_JAX_ROOT or ./runs. docs/image-tasks.md describes their layout.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from mpt_jax.runtime import paths
from mpt_jax.tasks import images
from mpt_jax.tasks.image_files import FolderImages, TableImages
from mpt_jax.tasks.image_sets.class_names import ClassTable
from mpt_jax.tasks.image_sources import ImageSource
from mpt_jax.tasks.image_tfds import TfdsImages

VARIABLE = "MPT_JAX_IMAGES"
LIST = "list.csv"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set of a suite.

    Attributes:
        name: The name of the task.
        source: The source, which reads nothing before its first use.
        classes: The classes in label order.
        templates: The text templates.
        metrics: Names of metrics, of which the first selects the best step.
        drawn_as: The task whose few-shot selections this task uses; None for itself.
    """

    name: str
    source: ImageSource
    classes: ClassTable
    templates: Sequence[str]
    metrics: Sequence[str] = ("accuracy",)
    drawn_as: str | None = None


def register(sets: Sequence[ImageSet]) -> None:
    """Registers the tasks of a table with SeqIO."""
    for row in sets:
        images.register(
            row.name,
            row.source,
            row.classes.names,
            templates=row.templates,
            metric_fns=row.metrics,
            drawn_as=row.drawn_as,
        )


def root() -> str:
    """Returns the folder or bucket with the sets that TFDS does not have."""
    return os.environ.get(VARIABLE) or os.path.join(paths.root(), "images")


def tfds(
    data: str,
    sizes: Mapping[str, int],
    classes: ClassTable,
    ids: Sequence[str],
    **splits: str,
) -> TfdsImages:
    """Returns the source of a TFDS data set.

    Args:
        data: TFDS's name of the data set.
        sizes: TFDS's split -> number of rows.
        classes: The classes.
        ids: The features that identify an image, see `TfdsImages`.
        splits: Our split -> TFDS's split; none if they have the same names.
    """
    return TfdsImages(data, splits or {x: x for x in sizes}, sizes, classes.ids, ids=ids)


def listed(base: str, name: str, classes: ClassTable) -> TableImages:
    """Returns the source of `<base>/<name>/list.csv`, with the columns file, label and split."""
    folder = os.path.join(base, name)
    return TableImages(os.path.join(folder, LIST), folder, classes.ids())


def folders(base: str, name: str, classes: ClassTable) -> FolderImages:
    """Returns the source of `<base>/<name>/<split>/<class>`."""
    return FolderImages(os.path.join(base, name), with_splits=True, classes=classes.ids())

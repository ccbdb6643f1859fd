"""Features and final preprocessors of every image task.

Sources yield `image` (an encoded file), `labels` int32 [n] and `id`, a string that no other example
of the split has. Tasks yield

    image          string [1]   the encoded file, which the feature converter decodes
    targets        int32 [n]    ids of the example's classes, counted within the task
    task_ids       int32 [1]    as in text tasks
    example_names  string [1]   the source's `id`, for errors and as the seed of augmentation

Images stay encoded until a batch is made, because their sizes differ and decoded images take about
ten times the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax.data.classes import TARGETS, ClassVocabulary
from mpt_jax.data.preprocessors import TASK_IDS, AddTaskId, map_dataset

IMAGE = "image"
EXAMPLE_NAMES = "example_names"
ID = "id"  # of a source's example
SOURCE_LABELS = "labels"


def output_features(classes: ClassVocabulary) -> dict[str, Any]:
    """Returns the output features of an image task with these classes."""
    number = seqio.PassThroughVocabulary(size=2**31 - 1)
    return {
        IMAGE: seqio.ContinuousFeature(dtype=tf.string, rank=1),
        TARGETS: seqio.Feature(classes, add_eos=False, dtype=tf.int32),
        TASK_IDS: seqio.Feature(number, add_eos=False, dtype=tf.int32),
        EXAMPLE_NAMES: seqio.ContinuousFeature(dtype=tf.string, rank=1),
    }


def finish(name: str) -> list:
    """Returns the final preprocessors of the image task `name`, which turn the examples of a source
    into task features."""
    return [to_features, AddTaskId(name)]


def to_features(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Renames the features of a source and gives each one axis."""

    def renamed(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {
            IMAGE: example[IMAGE][None],
            TARGETS: example[SOURCE_LABELS],
            EXAMPLE_NAMES: example[ID][None],
        }

    return map_dataset(dataset, renamed)


def example_id(name: tf.Tensor) -> tf.Tensor:
    """Returns 31-bit hashes of example names, int32, in the shape of `name`.

    It is the fingerprint of FarmHash, which is the same on every machine.
    """
    return tf.cast(tf.strings.to_hash_bucket_fast(name, 2**31), tf.int32)

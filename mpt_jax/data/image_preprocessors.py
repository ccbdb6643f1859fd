"""Final preprocessors of every image task: example ids, the task id and decoding.

Sources yield `image` (encoded bytes), `labels` int32 [n] and `id`, a string that no other example
of the split has. Tasks yield `image` uint8 [h, w, 3], `labels` int32 [n], `task_ids` int32 [1] and
`example_ids` int32 [1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax.data import image_transforms
from mpt_jax.data.classes import LABELS, ClassVocabulary
from mpt_jax.data.preprocessors import TASK_IDS, AddTaskId, map_dataset

IMAGE = "image"
EXAMPLE_IDS = "example_ids"
ID = "id"  # of a source's example
UNDECODED = (IMAGE, LABELS, TASK_IDS, EXAMPLE_IDS)


def output_features(classes: ClassVocabulary) -> dict[str, Any]:
    """Returns the output features of an image task: image, labels, task_ids and example_ids."""
    number = seqio.PassThroughVocabulary(size=2**31 - 1)
    identity = seqio.Feature(number, add_eos=False, dtype=tf.int32)
    return {
        IMAGE: seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
        LABELS: seqio.Feature(classes, add_eos=False, dtype=tf.int32),
        TASK_IDS: identity,
        EXAMPLE_IDS: identity,
    }


def finish(name: str) -> list:
    """Returns the final preprocessors of the image task `name`, which turn the examples of a source
    into task features.

    In order, they add the example id, add the task id and decode the image. SeqIO's cache is not
    used: it cannot store images of several sizes.
    """
    return [add_example_id, AddTaskId(name), decode]


def example_id(name: tf.Tensor) -> tf.Tensor:
    """Returns 31-bit hashes of example names, int32, in the shape of `name`.

    It is the fingerprint of FarmHash, which is the same on every machine.
    """
    return tf.cast(tf.strings.to_hash_bucket_fast(name, 2**31), tf.int32)


def add_example_id(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Writes `example_ids` [1], a stable hash of the source's `id`, into every example."""
    return map_dataset(dataset, lambda x: {**x, EXAMPLE_IDS: example_id(x[ID])[None]})


def decode(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Decodes the image of every example to uint8 [h, w, 3], and removes `id`. An image that cannot
    be decoded fails with a sentence that names its example."""

    def decoded(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        what = tf.strings.join(["image ", example[ID]])
        return {**_features(example), IMAGE: image_transforms.decode(example[IMAGE], what)}

    return map_dataset(dataset, decoded)


def undecoded(
    task: seqio.Task, split: str, seed: int | None = None, limit: int = -1
) -> tf.data.Dataset | None:
    """Returns the examples of an unshuffled split before `decode`.

    Args:
        task, split: The task and the split to read.
        seed: The seed of preprocessors that use one.
        limit: The maximum number of examples; -1 for all.

    Returns:
        Examples with `image` (encoded bytes, string []), `labels` [n], `task_ids` [1] and
        `example_ids` [1]; None if the task does not end with `finish`.
    """
    steps = list(task.preprocessors)
    last = steps[-3:]
    if len(last) < 3 or last[0] is not add_example_id or last[2] is not decode:
        return None
    if not isinstance(last[1], AddTaskId):
        return None
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=seed)
    with seqio.map_seed_manager(seed):
        dataset = task._preprocess_dataset(dataset, steps[:-1])
    return map_dataset(dataset.take(limit), _features)


def _features(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: example[name] for name in UNDECODED}

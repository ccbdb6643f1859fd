"""Final preprocessors of every task: the task id, end-of-sequence tokens and length limits."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

TASK_IDS = "task_ids"


# Names seen by `task_id`: detects collisions on registration, and gives unknown ids a name in
# errors.
_NAME_OF_ID: dict[int, str] = {}


def task_id(name: str) -> int:
    """Returns the 31-bit id that marks the examples of the task `name`, and records the name.

    Raises:
        ValueError: another name with the same id was registered before.
    """
    identity = zlib.crc32(name.encode()) & 0x7FFFFFFF
    holder = _NAME_OF_ID.setdefault(identity, name)
    if holder != name:
        raise ValueError(
            f"The task names {holder!r} and {name!r} have the same id ({identity}), so their "
            "examples cannot be distinguished. Rename one of the tasks."
        )
    return identity


class AddTaskId:
    """Preprocessor that writes `task_ids` [1], the id of the task `name`, into every example."""

    def __init__(self, name: str):
        self.name = name
        self.id = task_id(name)

    def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        return map_dataset(dataset, lambda x: {**x, TASK_IDS: tf.constant([self.id], tf.int32)})


def add_task_id(name: str) -> AddTaskId:
    """Returns the preprocessor that adds the id of the task `name` to its examples."""
    return AddTaskId(name)


def renamed(preprocessors: Sequence, name: str) -> list:
    """Returns `preprocessors` changed to write the id of the task `name`.

    A task derived from another one (a few-shot subset, a seed) inherits its preprocessors, and with
    them the id of the original task. Its examples would then use the original task's prompt.

    Raises:
        ValueError: no preprocessor writes a task id.
    """
    if not any(isinstance(p, AddTaskId) for p in preprocessors):
        raise ValueError(
            f"Cannot derive the task {name!r}, because no preprocessor of the original task writes "
            "`task_ids`. End the original task's preprocessors with "
            "*mpt_jax.data.preprocessors.finish(name), where name is that task's name."
        )
    return [AddTaskId(name) if isinstance(p, AddTaskId) else p for p in preprocessors]


def output_features(vocabulary: Any, targets_vocabulary: Any | None = None) -> dict[str, Any]:
    """Returns the output features of a task: inputs, targets and task_ids."""
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=True),
        "targets": seqio.Feature(targets_vocabulary or vocabulary, add_eos=True),
        TASK_IDS: seqio.Feature(
            seqio.PassThroughVocabulary(size=2**31 - 1), add_eos=False, dtype=tf.int32
        ),
    }


def finish(name: str) -> list:
    """Returns the final preprocessors of the task `name`, which turn text into task features.

    In order, they tokenize `inputs` and `targets`, mark the place of SeqIO's cache, add the task
    id, append end-of-sequence tokens and apply the length limits.
    """
    return [
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        AddTaskId(name),
        end_and_limit,
    ]


def end_and_limit(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Appends EOS to each text if its feature asks for it, and marks over-long examples.

    A text longer than `sequence_length` (tokens, EOS included) is truncated so that it still ends
    with EOS, and the example's task id becomes `~id`. `PromptFeatureConverter.on_overlong` decides
    whether that is an error.
    """
    limits = dict(sequence_length or {})
    texts = [name for name in output_features if name != TASK_IDS]

    def convert(example):
        example = dict(example)
        overlong = tf.constant(False)
        for name in texts:
            feature, tokens = output_features[name], example[name]
            limit = limits.get(name)
            room = None if limit is None else limit - int(feature.add_eos)
            if room is not None:
                overlong = tf.logical_or(overlong, tf.size(tokens) > room)
                tokens = tokens[:room]
            if feature.add_eos:
                eos = tf.constant([feature.vocabulary.eos_id], tokens.dtype)
                tokens = tf.concat([tokens, eos], axis=0)
            example[name] = tokens
        ids = example[TASK_IDS]
        example[TASK_IDS] = tf.where(overlong, tf.bitwise.invert(ids), ids)
        return example

    return map_dataset(dataset, convert)


def map_dataset(dataset: tf.data.Dataset, function) -> tf.data.Dataset:
    # Nothing here needs AutoGraph, and tracing without it is faster.
    function = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)

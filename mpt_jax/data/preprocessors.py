"""Final preprocessors of every task: the task id, end-of-sequence tokens and length limits."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text

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


# --- The same, without a graph for each task -----------------------------------------------------

# Texts of a split: {"inputs": [n], "targets": [n]}, arrays of bytes.
Texts = Mapping[str, np.ndarray]
TEXTS = ("inputs", "targets")


def plain_texts(
    task: seqio.Task, split: str, seed: int | None = None, limit: int = -1
) -> Texts | None:
    """Returns the texts of an unshuffled split before `finish`, or None if SeqIO has to read them.

    SeqIO traces five functions for every task and split, which takes minutes for hundreds of tasks.
    `encode` needs none. Both apply to tasks that end with `finish`, have a SentencePiece vocabulary
    and yield the texts `inputs` and `targets`.

    Args:
        task, split: the task and the split to read.
        seed: the seed of preprocessors that use one.
        limit: maximum number of examples to read; -1 for all.
    """
    first, last = list(task.preprocessors[:-4]), list(task.preprocessors[-4:])
    if not _is_finish(last) or sorted(task.output_features) != sorted([*TEXTS, TASK_IDS]):
        return None
    vocabularies = [task.output_features[name].vocabulary for name in TEXTS]
    if any(_tokenizer_model(vocabulary) is None for vocabulary in vocabularies):
        return None
    if not first and hasattr(task.source, "texts"):  # files are in memory
        return {
            name: x[:limit] if limit >= 0 else x for name, x in task.source.texts(split).items()
        }
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=seed)
    with seqio.map_seed_manager(seed):
        dataset = task._preprocess_dataset(dataset, first)
    if dataset.element_spec != dict.fromkeys(TEXTS, tf.TensorSpec([], tf.string)):
        return None
    batches = list(dataset.take(limit).batch(4096).as_numpy_iterator())
    return {
        name: np.concatenate([batch[name] for batch in batches])
        if batches
        else np.array([], object)
        for name in TEXTS
    }


def encode(
    texts: Texts, task: seqio.Task, sequence_length: Mapping[str, int] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns what `finish` yields for the texts of a split [n], as flat values and offsets.

    Returns:
        {feature: int32 [total tokens]} and {feature: int64 [n + 1]}; empty if n is 0.
    """
    number = len(texts["inputs"])
    if not number:
        return {}, {}
    values, offsets = {}, {}
    overlong = np.zeros(number, bool)
    for name in TEXTS:
        feature = task.output_features[name]
        limit = (sequence_length or {}).get(name)
        tokens = _tokenizer(_tokenizer_model(feature.vocabulary)).tokenize(tf.constant(texts[name]))
        flat, sizes = tokens.flat_values.numpy(), tokens.row_lengths().numpy()
        kept = sizes
        if limit is not None:
            room = max(0, limit - int(feature.add_eos))
            overlong |= sizes > room
            kept = np.minimum(sizes, room)
        ends = np.cumsum(kept + int(feature.add_eos))
        offsets[name] = np.concatenate([[0], ends])
        values[name] = np.full(ends[-1], feature.vocabulary.eos_id, np.int32)
        place = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)  # in its row
        source = np.repeat(np.cumsum(sizes) - sizes, kept) + place
        values[name][np.repeat(offsets[name][:-1], kept) + place] = flat[source]
    (identity,) = (p.id for p in task.preprocessors if isinstance(p, AddTaskId))
    values[TASK_IDS] = np.where(overlong, ~identity, identity).astype(np.int32)
    offsets[TASK_IDS] = np.arange(number + 1)
    return values, offsets


def as_dataset(
    texts: Texts, task: seqio.Task, sequence_length: Mapping[str, int] | None
) -> tf.data.Dataset:
    """Returns the dataset that SeqIO makes of these texts, which it keeps as `*_pretokenized`."""
    values, offsets = encode(texts, task, sequence_length)
    features: Any = {
        name: tf.RaggedTensor.from_row_splits(values[name], offsets[name])  # type: ignore[attr-defined]
        for name in TEXTS
    }
    features[TASK_IDS] = values[TASK_IDS][:, None]
    features |= {f"{name}_pretokenized": tf.constant(texts[name]) for name in TEXTS}
    # The map turns slices of ragged tensors, which cannot be padded, into tensors.
    return map_dataset(tf.data.Dataset.from_tensor_slices(features), dict)


def _is_finish(steps: Sequence) -> bool:
    return (
        len(steps) == 4
        and steps[0] is seqio.preprocessors.tokenize
        and isinstance(steps[1], seqio.CacheDatasetPlaceholder)
        and isinstance(steps[2], AddTaskId)
        and steps[3] is end_and_limit
    )


def _tokenizer_model(vocabulary: Any) -> Any:
    """Returns the SentencePiece model of a vocabulary; None for vocabularies of another kind."""
    if type(vocabulary) is not seqio.SentencePieceVocabulary or vocabulary._use_fast_tokenizer:
        return None
    return vocabulary.sp_model


@functools.cache
def _tokenizer(model: bytes) -> Any:
    return tf_text.SentencepieceTokenizer(model=model)

"""Examples of tasks that end with `preprocessors.finish`, tokenized without SeqIO.

SeqIO traces five functions for every task and split, which takes minutes for hundreds of tasks.
Nothing here traces any to tokenize, and a `MemoryDataset` is read without an iterator of tf.data,
whose start takes 20 ms.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text

from mpt_jax.data.preprocessors import TASK_IDS, AddTaskId, end_and_limit, map_dataset

# Texts of a split: {"inputs": [n], "targets": [n]}, arrays of bytes.
Texts = Mapping[str, np.ndarray]
TEXTS = ("inputs", "targets")
_TEXTS_AT_ONCE = 4096


def plain_texts(
    task: seqio.Task, split: str, seed: int | None = None, limit: int = -1
) -> Texts | None:
    """Returns the texts of an unshuffled split before `finish`, or None if SeqIO has to read them;
    see `text_batches`."""
    batches = text_batches(task, split, seed, limit)
    if batches is None:
        return None
    found = list(batches)
    return {
        name: np.concatenate([np.array([], object), *(batch[name] for batch in found)])
        for name in TEXTS
    }


def text_batches(
    task: seqio.Task, split: str, seed: int | None = None, limit: int = -1
) -> Iterator[Texts] | None:
    """Returns the texts of an unshuffled split before `finish`, in parts, or None if SeqIO has to
    read them.

    This and `encode` apply to tasks that end with `finish`, have a SentencePiece vocabulary and
    yield the texts `inputs` and `targets`.

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
        texts = task.source.texts(split)
        return iter([{name: x[:limit] if limit >= 0 else x for name, x in texts.items()}])
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=seed)
    with seqio.map_seed_manager(seed):
        dataset = task._preprocess_dataset(dataset, first)
    if dataset.element_spec != dict.fromkeys(TEXTS, tf.TensorSpec([], tf.string)):
        return None
    return dataset.take(limit).batch(_TEXTS_AT_ONCE).as_numpy_iterator()


def encoded_batches(
    batches: Iterable[Texts], task: seqio.Task, sequence_length: Mapping[str, int] | None
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yields what `encode` returns for each batch of texts, in order, several at a time."""
    workers = os.cpu_count() or 1
    waiting: collections.deque[Any] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for texts in batches:
            waiting.append(pool.submit(encode, texts, task, sequence_length))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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


class MemoryDataset(tf.data.Dataset):
    """The dataset that SeqIO makes of the texts of a split, with its tokens in memory.

    Args:
        texts: the texts of the split, which the examples contain as `*_pretokenized`.
        task: the task, see `plain_texts`.
        sequence_length: {feature: maximum length in tokens}; None for no limits.

    Attributes:
        values, offsets: the tokens, see `encode`.
        cached: whether `cache` made this dataset.
    """

    def __init__(
        self, texts: Texts, task: seqio.Task, sequence_length: Mapping[str, int] | None
    ) -> None:
        self.values, self.offsets = encode(texts, task, sequence_length)
        self.cached = False
        self._num_examples = len(texts["inputs"])
        self._texts = {f"{name}_pretokenized": texts[name] for name in TEXTS}
        features: Any = {
            name: tf.RaggedTensor.from_row_splits(  # type: ignore[attr-defined]
                self.values[name], self.offsets[name], validate=False
            )
            for name in TEXTS
        }
        features[TASK_IDS] = self.values[TASK_IDS][:, None]
        features |= {name: tf.constant(column) for name, column in self._texts.items()}
        slices = tf.data.Dataset.from_tensor_slices(features)
        # The map turns slices of ragged tensors, which cannot be padded, into tensors.
        self._dataset = map_dataset(slices, dict)
        super().__init__(self._dataset._variant_tensor)  # type: ignore[call-arg]

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._dataset]

    @property
    def element_spec(self) -> Any:
        """The shapes and types of an example, see `tf.data.Dataset.element_spec`."""
        return self._dataset.element_spec

    def __iter__(self) -> Iterator[dict[str, tf.Tensor]]:
        """Yields the examples, each {feature: int32 [length]} and {`*_pretokenized`: string []}."""
        for row in range(self._num_examples):
            tokens = {
                name: tf.constant(values[self.offsets[name][row] : self.offsets[name][row + 1]])
                for name, values in self.values.items()
            }
            yield tokens | {name: tf.constant(column[row]) for name, column in self._texts.items()}

    def take(self, count: Any, name: str | None = None) -> tf.data.Dataset:
        """Returns the first `count` examples, see `tf.data.Dataset.take`; this dataset if it has
        no more."""
        everything = isinstance(count, int) and (count < 0 or count >= self._num_examples)
        return self if everything else super().take(count, name)

    def cache(self, filename: str = "", name: str | None = None) -> tf.data.Dataset:
        """Returns this dataset, which is in memory, as `cached`; with a file name, see
        `tf.data.Dataset.cache`."""
        if filename:
            return super().cache(filename, name)
        cached = copy.copy(self)
        cached.cached = True
        return cached


class TextTask(seqio.Task):
    """A SeqIO task whose texts are tokenized without SeqIO if `plain_texts` can read them."""

    def get_dataset(  # type: ignore[override]  # SeqIO's names, of which it passes some
        self,
        sequence_length: Mapping[str, int] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        **settings: Any,
    ) -> Any:
        """Returns the examples of a split, like `seqio.Task.get_dataset`. One unshuffled pass over
        plain texts is tokenized without SeqIO, which takes longer to start."""
        if num_epochs == 1 and not (use_cached or shuffle or shard_info):
            texts = plain_texts(self, split, seed)
            if texts is not None and len(texts["inputs"]):
                return MemoryDataset(texts, self, sequence_length)
        return super().get_dataset(
            sequence_length,
            split,
            use_cached,
            shuffle,
            seed=seed,
            shard_info=shard_info,
            num_epochs=num_epochs,
            **settings,
        )

    def replace(self, **changes: Any) -> Any:
        """Returns a copy of this task with `changes`, of the same class."""
        same = {
            "source": self.source,
            "preprocessors": self.preprocessors,
            "postprocess_fn": self.postprocessor,
            "metric_fns": self.metric_fns,
        }
        if "output_features" not in changes:
            same["output_features"] = self.output_features
        return type(self)(**{**same, **changes})


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

"""In-memory tables of the tokenized examples of registered tasks.

Small and medium data sets (all of GLUE and MRQA) fit in memory as 4-byte tokens. Reading an example
is then a lookup. It needs no file and no tokenizer, and checkpoints need no shuffle buffer.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.core.runs import data_name
from mpt_jax.data import fingerprints, in_memory, token_cache, token_reading
from mpt_jax.data.preprocessors import TASK_IDS, AddTaskId, task_id
from mpt_jax.data.task_lookup import check_split, explain_missing_data
from mpt_jax.data.token_cache import Counts
from mpt_jax.data.token_reading import Encoded

# Tables up to this size are kept as long as their task is registered.
_KEEP_BYTES = 16 * 2**20
PASS_NUMBERS = "pass_numbers"
_TEXTS = ("inputs", "targets")
_Columns = tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Counts]]
_KEPT: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


class TokenTable:
    """Tokenized examples of one split of one task, as flat values and offsets per feature. The
    examples of image tasks have encoded files in place of the tokens of inputs.

    Attributes:
        name, split: the names of the task and the split.
        values: {feature: int32 [total tokens], or strings}.
        offsets: {feature: int64 [num_examples + 1]}.
        num_examples: number of examples, after preprocessing.
        num_overlong: number of these with a text longer than its limit (see
            `preprocessors.end_and_limit`).
        counts: the numbers of tokens of the features of texts.
    """

    def __init__(
        self,
        name: str,
        split: str,
        values: Mapping[str, np.ndarray],
        offsets: Mapping[str, np.ndarray],
        counts: Mapping[str, Counts],
    ):
        self.name, self.split = name, split
        self.values, self.offsets, self.counts = values, offsets, counts
        self.num_examples = len(offsets[TASK_IDS]) - 1 if offsets else 0
        self.num_overlong = int((values[TASK_IDS] < 0).sum()) if values else 0

    @property
    def unknown(self) -> dict[str, float]:
        """The share of unknown tokens, from 0 to 1, of each feature of texts. The end-of-sequence
        tokens do not count."""
        return {name: x.unknown / max(x.tokens, 1) for name, x in self.counts.items()}

    @property
    def num_bytes(self) -> int:
        """Size of the tokens in memory, in bytes; 0 of those that are mapped from a file."""
        held = [x for x in self.values.values() if not isinstance(x, np.memmap)]
        return sum(map(_num_bytes, held))


def _num_bytes(values: np.ndarray) -> int:
    """Returns the size of an array in bytes, with the strings of an array of strings."""
    return values.nbytes if values.dtype != object else sum(map(len, values))


class ExampleTable(TokenTable):
    """Table of a registered task, which the constructor reads, or finds in the token cache.

    Args:
        task, split: the task and the split to read.
        sequence_length, seed, use_cached, trim_output_features, shuffle: see
            `seqio.Task.get_dataset`.
        limit: maximum number of examples to read; -1 for all.

    Raises:
        ValueError: the split does not exist, cannot be read or is empty, or a feature does not have
            rank 1.
    """

    def __init__(
        self,
        task: seqio.Task,
        split: str,
        sequence_length: Mapping[str, int] | None,
        seed: int | None,
        use_cached: bool = False,
        trim_output_features: bool = True,
        shuffle: bool = False,
        limit: int = -1,
    ):
        check_split(task, split)

        def parts() -> Iterator[Encoded]:
            if not (use_cached or shuffle):
                texts = in_memory.text_batches(task, split, seed, limit)
                if texts is not None:
                    return in_memory.encoded_batches(texts, task, sequence_length)
            dataset = task.get_dataset(
                sequence_length=sequence_length,
                split=split,
                use_cached=use_cached,
                shuffle=shuffle,
                seed=seed,
                trim_output_features=trim_output_features,
                try_in_mem_cache=False,
            )
            return token_reading.parts(dataset.take(limit), list(task.output_features), task.name)

        with explain_missing_data(task, split):
            settings = {
                "lengths": dict(sequence_length or {}),
                "seed": seed,
                "trim": trim_output_features,
            }
            whole = not (use_cached or shuffle) and limit < 0
            fingerprint = _fingerprint(task, split, settings) if whole else None
            found = None if fingerprint is None else _from_cache(task, fingerprint, parts)
            super().__init__(task.name, split, *(found or _read(task, parts)))
        if not self.num_examples:
            raise ValueError(
                f"The {split!r} split of task {task.name!r} is empty after preprocessing. Check "
                "the task's source and preprocessors, or choose another split."
            )
        counts = {task.name: (self.num_overlong, self.num_examples)}
        token_reading.report_lengths(counts, split, sequence_length)
        token_reading.report_unknown(task.name, split, self.unknown)

    def indices(self, seed: int, shuffle: bool, stride: int = 0) -> tf.data.Dataset:
        """Returns an endless stream of this task's example indices, one pass after another. Runs
        that differ only in settings have the same order (see `runs.data_name`).

        Args:
            seed: the seed of the order.
            shuffle: whether each pass has a different order.
            stride: number that is added to every index once for each pass before it.
        """
        if not shuffle and not stride:
            return tf.data.Dataset.range(self.num_examples).repeat()

        size = tf.constant(self.num_examples)
        stream = task_id(data_name(self.name))

        def one_pass(number):
            order = tf.range(tf.cast(size, tf.int64))
            if shuffle:
                order = _permutation(size, stream_key(seed, stream, number))
            return tf.data.Dataset.from_tensor_slices(order + number * stride)

        passes = tf.data.Dataset.range(np.iinfo(np.int64).max)
        return passes.flat_map(tf.autograph.experimental.do_not_convert(one_pass))


def _fingerprint(task: seqio.Task, split: str, settings: Mapping[str, Any]) -> str | None:
    """Returns the fingerprint of the tokens of a split; None if they are not cached."""
    are_texts = sorted(task.output_features) == sorted([*_TEXTS, TASK_IDS])
    if token_cache.folder() is None or not are_texts or len(_task_ids(task)) != 1:
        return None
    try:
        return fingerprints.of_split(task, split, settings)
    except fingerprints.Unknown as error:
        logging.debug("Tokens of task %s are not cached: %s.", task.name, error)
        return None


def _task_ids(task: seqio.Task) -> list[int]:
    """Returns the ids that the preprocessors of a task write."""
    return [step.id for step in task.preprocessors if isinstance(step, AddTaskId)]


def _read(task: seqio.Task, parts: Callable[[], Iterator[Encoded]]) -> _Columns:
    values, offsets = token_reading.joined(parts(), list(task.output_features))
    counts = token_reading.count_tokens(values, task.output_features) if values else {}
    return values, offsets, counts


def _from_cache(
    task: seqio.Task, fingerprint: str, parts: Callable[[], Iterator[Encoded]]
) -> _Columns | None:
    """Returns the columns of a table from the token cache, into which they are written if
    necessary; None if that fails."""

    def tokens() -> Iterator[token_cache.Tokens]:
        for values, offsets in parts():
            if values:
                counts = token_reading.count_tokens(values, task.output_features)
                texts, starts = ({name: x[name] for name in _TEXTS} for x in (values, offsets))
                yield token_cache.Tokens(texts, starts, values[TASK_IDS] < 0, counts)

    found = token_cache.load(fingerprint)
    if found is None and token_cache.save(fingerprint, tokens()):
        found = token_cache.load(fingerprint)
    if found is None:
        return None
    (identity,) = _task_ids(task)
    ids = np.where(found.overlong, ~identity, identity).astype(np.int32)
    values = {**found.values, TASK_IDS: ids}
    return values, {**found.offsets, TASK_IDS: np.arange(len(ids) + 1)}, found.counts


# A graph that all tables share, because tracing it for each of hundreds of tasks takes minutes.
@tf.function(
    autograph=False,
    input_signature=[tf.TensorSpec([], tf.int32), tf.TensorSpec([2], tf.int64)],
)
def _permutation(size: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Returns a random permutation of 0 .. size - 1, which depends only on the size and the key."""
    bits = tf.random.stateless_uniform(
        size[None],
        key,
        minval=None,  # type: ignore[arg-type]  # all 64 bits
        maxval=None,
        dtype=tf.int64,
        alg="philox",
    )
    return tf.cast(tf.argsort(bits, stable=True), tf.int64)


def read_table(
    task: seqio.Task, split: str, sequence_length: Mapping[str, int] | None, **settings: Any
) -> ExampleTable:
    """Returns the `ExampleTable` for these arguments. Small tables are cached in the process.

    A process that runs several stages reads the same tasks repeatedly, and tokenizing thousands
    of examples takes seconds.
    """
    key = (split, repr(sorted((sequence_length or {}).items())), repr(sorted(settings.items())))
    kept = _KEPT.setdefault(task, {})
    if key not in kept:
        table = ExampleTable(task, split, sequence_length, **settings)
        if table.num_bytes > _KEEP_BYTES:
            return table
        kept[key] = table
    return kept[key]


def _joined(tables: Sequence[TokenTable]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns {feature: values} and {feature: offsets} of the concatenated tables."""
    values, offsets = {}, {}
    for name in tables[0].values:
        starts = np.cumsum([0] + [len(t.values[name]) for t in tables])
        each = [t.offsets[name][:-1] + s for t, s in zip(tables, starts, strict=False)]
        values[name] = np.concatenate([t.values[name] for t in tables])
        offsets[name] = np.concatenate([*each, starts[-1:]])
    return values, offsets


def joined_lookup(
    tables: Sequence[ExampleTable], stride: int = 0
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns a function that looks up an example by its index in the concatenated tables.

    With a stride (see `ExampleTable.indices`), the number of passes before the example is another
    feature, `pass_numbers` [1].
    """
    values, offsets = ({name: tf.constant(x) for name, x in of.items()} for of in _joined(tables))

    def lookup(index):
        return {
            name: values[name][offsets[name][index] : offsets[name][index + 1]] for name in values
        }

    def lookup_in_pass(index):
        return {**lookup(index % stride), PASS_NUMBERS: (index // stride)[None]}

    return lookup_in_pass if stride else lookup


def dataset_of(tables: Sequence[TokenTable]) -> tf.data.Dataset:
    """Returns a dataset with one pass over the examples of all tables, in order."""
    values, offsets = _joined(tables)
    rows: Any = {
        name: tf.RaggedTensor.from_row_splits(values[name], offsets[name])  # type: ignore[attr-defined]
        for name in values
    }
    return tf.data.Dataset.from_tensor_slices(rows)


def stream_key(seed: int, stream: int, number: tf.Tensor) -> tf.Tensor:
    """Returns the random key of draw `number` in a stream, unique to the stream and the number."""
    return tf.stack([tf.constant((seed << 32) | stream, tf.int64), tf.cast(number, tf.int64)])

"""In-memory tables of the tokenized examples of registered tasks.

Small and medium data sets (all of GLUE and MRQA) fit in memory as 4-byte tokens. Reading an example
is then a lookup. It needs no file and no tokenizer, and checkpoints need no shuffle buffer.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.core.runs import data_name
from mpt_jax.data import fingerprints, in_memory, token_cache
from mpt_jax.data.preprocessors import TASK_IDS, AddTaskId, task_id
from mpt_jax.data.task_lookup import check_split, explain_missing_data

# Tables up to this size are kept as long as their task is registered.
_KEEP_BYTES = 16 * 2**20
# Shares of unknown tokens above which `report_unknown` logs a line, or a warning.
NOTED_UNKNOWN, WARNED_UNKNOWN = 0.01, 0.1
PASS_NUMBERS = "pass_numbers"
_SIDES = {"inputs": "input", "targets": "target"}  # features of texts, and their name in the cache
_REPORTED: set[tuple[str, str]] = set()  # (task, split) of `report_unknown`
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
        unknown: {feature: share of unknown tokens, from 0 to 1}; end-of-sequence tokens do not
            count.
        with_zeros: the features in which the id 0 occurs.
    """

    def __init__(
        self,
        name: str,
        split: str,
        values: Mapping[str, np.ndarray],
        offsets: Mapping[str, np.ndarray],
        unknown: Mapping[str, float],
        with_zeros: Sequence[str] = (),
    ):
        self.name, self.split = name, split
        self.values, self.offsets = values, offsets
        self.unknown, self.with_zeros = unknown, with_zeros
        self.num_examples = len(offsets[TASK_IDS]) - 1 if offsets else 0
        self.num_overlong = int((values[TASK_IDS] < 0).sum()) if values else 0

    @property
    def num_bytes(self) -> int:
        """Size of the tokens in memory, in bytes; 0 of those that are mapped from a file."""
        mapped = (np.memmap,)
        return sum(_num_bytes(x) for x in self.values.values() if not isinstance(x, mapped))


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

        def read() -> tuple[dict, dict]:
            if not (use_cached or shuffle):
                texts = in_memory.plain_texts(task, split, seed, limit)
                if texts is not None:
                    return in_memory.encode(texts, task, sequence_length)
            dataset = task.get_dataset(
                sequence_length=sequence_length,
                split=split,
                use_cached=use_cached,
                shuffle=shuffle,
                seed=seed,
                trim_output_features=trim_output_features,
                try_in_mem_cache=False,
            )
            return read_tokens(dataset.take(limit), list(task.output_features), task.name)

        with explain_missing_data(task, split):
            settings = [dict(sequence_length or {}), seed, trim_output_features]
            whole = not (use_cached or shuffle) and limit < 0
            fingerprint = _fingerprint(task, split, settings) if whole else None
            super().__init__(task.name, split, *_tokens(task, fingerprint, read))
        if not self.num_examples:
            raise ValueError(
                f"The {split!r} split of task {task.name!r} is empty after preprocessing. Check "
                "the task's source and preprocessors, or choose another split."
            )
        report_lengths({task.name: (self.num_overlong, self.num_examples)}, split, sequence_length)
        report_unknown(task.name, split, self.unknown)

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


def _fingerprint(task: seqio.Task, split: str, settings: Sequence[Any]) -> str | None:
    """Returns the fingerprint of the tokens of a split; None if they are not cached."""
    are_texts = sorted(task.output_features) == sorted([*_SIDES, TASK_IDS])
    if token_cache.folder() is None or not are_texts or len(_task_ids(task)) != 1:
        return None
    try:
        return fingerprints.of_split(task, split, settings)
    except fingerprints.Unknown as error:
        logging.info("Tokens of task %s are not cached: %s.", task.name, error)
        return None


def _task_ids(task: seqio.Task) -> list[int]:
    """Returns the ids that the preprocessors of a task write."""
    return [step.id for step in task.preprocessors if isinstance(step, AddTaskId)]


def _tokens(
    task: seqio.Task, fingerprint: str | None, read: Callable[[], tuple[dict, dict]]
) -> tuple[dict, dict, Mapping[str, float], Sequence[str]]:
    """Returns the values, offsets, shares of unknown tokens and features with id 0 of a split, from
    the cache if it has them."""
    found = token_cache.load(fingerprint) if fingerprint else None
    if found is None:
        values, offsets = read()
        if not values:
            return {}, {}, {}, ()
        unknown = unknown_shares(values, task.output_features)
        zeros = [name for name in _SIDES if name in values and not values[name].all()]
        if fingerprint is None:
            return values, offsets, unknown, zeros
        arrays = {"overlong": values[TASK_IDS] < 0}
        for name, side in _SIDES.items():
            arrays |= {name: values[name], f"{side}_offsets": offsets[name]}
        found = token_cache.Tokens(arrays, unknown, zeros)
        token_cache.save(fingerprint, found)
        found = token_cache.load(fingerprint) or found
    values = {name: found.arrays[name] for name in _SIDES}
    offsets = {name: found.arrays[f"{side}_offsets"] for name, side in _SIDES.items()}
    overlong, (identity,) = found.arrays["overlong"], _task_ids(task)
    values[TASK_IDS] = np.where(overlong, ~identity, identity).astype(np.int32)
    offsets[TASK_IDS] = np.arange(len(overlong) + 1)
    return values, offsets, found.unknown, found.with_zeros


def unknown_shares(
    values: Mapping[str, np.ndarray], output_features: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the share of tokens that are unknown, from 0 to 1, of each text feature. The
    end-of-sequence tokens do not count."""
    shares = {}
    for name, (unknown, end) in _special_ids(output_features).items():
        tokens = values[name]
        texts = np.count_nonzero(tokens != end)
        shares[name] = int(np.count_nonzero(tokens == unknown)) / max(int(texts), 1)
    return shares


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


def report_lengths(
    overlong: Mapping[str, tuple[int, int]],
    split: str,
    sequence_length: Mapping[str, int] | None,
) -> None:
    """Logs each task's share of over-long examples, given {task: (truncated, all examples)}."""
    for name, (cut, total) in overlong.items():
        if cut:
            logging.warning(
                "Task %s, %s split: %d of %d examples (%.2f%%) are longer than the limits %s.",
                name,
                split,
                cut,
                total,
                100 * cut / total,
                dict(sequence_length or {}),
            )


def _special_ids(output_features: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns {feature: ids of unknown text and of the end of sequence} of the text features whose
    vocabulary has an unknown token. Without an end of sequence, its id is -1, as of no token."""
    texts = {
        n: output_features[n].vocabulary for n in ("inputs", "targets") if n in output_features
    }
    return {
        n: (v.unk_id, -1 if v.eos_id is None else v.eos_id)
        for n, v in texts.items()
        if v.unk_id is not None
    }


def report_unknown(task: str, split: str, shares: Mapping[str, float]) -> None:
    """Logs the features of a task in which more than `NOTED_UNKNOWN` of the tokens are unknown, as
    a warning above `WARNED_UNKNOWN`. A split is reported once in a process, although the loss and
    the metrics read it separately.

    Args:
        task, split: the names of the task and the split.
        shares: {feature: share of unknown tokens, from 0 to 1}.
    """
    if (task, split) in _REPORTED:
        return
    _REPORTED.add((task, split))
    for feature, share in shares.items():
        subject = f"Task {task}, {split} split: {share:.1%} of the tokens of {feature} are <unk>"
        if share > WARNED_UNKNOWN:
            logging.warning(
                "%s, because the vocabulary lacks this script or these characters. The model "
                "cannot distinguish texts that differ in them only. Use a backbone whose "
                "vocabulary has them: ByT5 has every character, umT5 most scripts.",
                subject,
            )
        elif share > NOTED_UNKNOWN:
            logging.info("%s (characters that the vocabulary lacks).", subject)


def count_examples(dataset: Any, task: seqio.Task, split: str) -> tuple[int, int]:
    """Returns the numbers of truncated and of all examples of a task's dataset, which it reads as a
    whole, and reports unknown tokens (`report_unknown`)."""
    special = _special_ids(task.output_features)
    names = (TASK_IDS, *special)
    cut, total, counts = 0, 0, {name: np.zeros(2, np.int64) for name in special}
    batch: Any
    for batch in _only(dataset, names).ragged_batch(1024):
        values = {
            name: getattr(batch[name], "flat_values", batch[name]).numpy().ravel() for name in names
        }
        cut += int((values[TASK_IDS] < 0).sum())
        total += len(values[TASK_IDS])
        for name, (unknown, end) in special.items():
            counts[name] += (values[name] == unknown).sum(), (values[name] != end).sum()
    shares = {name: unknown / max(texts, 1) for name, (unknown, texts) in counts.items() if total}
    report_unknown(task.name, split, shares)
    return cut, total


def read_tokens(dataset: Any, features: list[str], task: str) -> tuple[dict, dict]:
    """Reads a dataset of rank-1 features, and returns {feature: values} and {feature: offsets}.

    Raises:
        ValueError: a feature does not have rank 1; the message names it and the task `task`.
    """
    for name in features:
        if dataset.element_spec[name].shape.rank != 1:
            raise ValueError(
                f"The feature {name!r} of task {task!r} has rank "
                f"{dataset.element_spec[name].shape.rank}, but every feature must have rank 1. "
                "Flatten it in the task's preprocessors, or remove it from the task's output "
                "features."
            )
    if isinstance(dataset, in_memory.MemoryDataset):
        values, offsets = dataset.values, dataset.offsets
        return {name: values[name] for name in features}, {name: offsets[name] for name in features}
    # A thousand examples at a time, because Python per example would cost more than the tokenizer.
    batches = list(_only(dataset, features).ragged_batch(1024))
    values, offsets = {}, {}
    for name in features if batches else ():
        ragged: list[Any] = [
            x[name] if isinstance(x[name], tf.RaggedTensor) else _all_of_one_length(x[name])
            for x in batches
        ]
        values[name] = np.concatenate([r.flat_values.numpy() for r in ragged])
        lengths = np.concatenate([r.row_lengths().numpy() for r in ragged])
        offsets[name] = np.concatenate([[0], np.cumsum(lengths)])
    return values, offsets


def _only(dataset: Any, features: Sequence[str]) -> Any:
    """Returns a dataset without its other features if one of these cannot be batched."""
    if all(isinstance(spec, tf.TensorSpec) for spec in dataset.element_spec.values()):
        return dataset
    pick = tf.autograph.experimental.do_not_convert(lambda x: {name: x[name] for name in features})
    return dataset.map(pick)


def _all_of_one_length(tensor: tf.Tensor) -> Any:
    return tf.RaggedTensor.from_tensor(tensor)  # type: ignore[attr-defined]


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

"""Reading the tokens of tasks from datasets, and reports of over-long texts and unknown tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.data import in_memory
from mpt_jax.data.preprocessors import TASK_IDS
from mpt_jax.data.token_cache import Counts

# Shares of unknown tokens above which `report_unknown` logs a line, or a warning.
NOTED_UNKNOWN, WARNED_UNKNOWN = 0.01, 0.1
_TEXTS = ("inputs", "targets")
_REPORTED: set[tuple[str, str]] = set()  # (task, split) of `report_unknown`
# {feature: values} and {feature: offsets} of some examples.
Encoded = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def parts(dataset: Any, features: list[str], task: str) -> Iterator[Encoded]:
    """Yields {feature: values} and {feature: offsets} of a dataset of rank-1 features, of some
    examples at a time.

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
        yield {name: values[name] for name in features}, {name: offsets[name] for name in features}
        return
    # A thousand examples at a time, because Python per example would cost more than the tokenizer.
    for batch in _only(dataset, features).ragged_batch(1024):
        values, offsets = {}, {}
        for name in features:
            ragged: Any = batch[name]
            if not isinstance(ragged, tf.RaggedTensor):
                ragged = _all_of_one_length(ragged)
            values[name] = ragged.flat_values.numpy()
            offsets[name] = ragged.row_splits.numpy()
        yield values, offsets


def joined(found: Iterable[Encoded], features: Sequence[str]) -> Encoded:
    """Returns the values and offsets of all parts together; empty if there are no examples."""
    kept = [part for part in found if part[0]]
    values, offsets = {}, {}
    for name in features if kept else ():
        values[name] = np.concatenate([part[0][name] for part in kept])
        lengths = np.concatenate([np.diff(part[1][name]) for part in kept])
        offsets[name] = np.concatenate([[0], np.cumsum(lengths)])
    return values, offsets


def read_tokens(dataset: Any, features: list[str], task: str) -> Encoded:
    """Returns what `parts` yields, together."""
    return joined(parts(dataset, features, task), features)


def _only(dataset: Any, features: Sequence[str]) -> Any:
    """Returns a dataset without its other features if one of these cannot be batched."""
    if all(isinstance(spec, tf.TensorSpec) for spec in dataset.element_spec.values()):
        return dataset
    pick = tf.autograph.experimental.do_not_convert(lambda x: {name: x[name] for name in features})
    return dataset.map(pick)


def _all_of_one_length(tensor: tf.Tensor) -> Any:
    return tf.RaggedTensor.from_tensor(tensor)  # type: ignore[attr-defined]


def count_tokens(
    values: Mapping[str, np.ndarray], output_features: Mapping[str, Any]
) -> dict[str, Counts]:
    """Returns the numbers of tokens of the features of texts."""
    found = {}
    for name, (unknown, end) in _special_ids(output_features).items():
        tokens = values[name]
        numbers = [np.count_nonzero(x) for x in (tokens != end, tokens == unknown, tokens == 0)]
        found[name] = Counts(*map(int, numbers))
    return found


def _special_ids(output_features: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns {feature: ids of unknown text and of the end of sequence} of the features of texts;
    -1, which is no token, for an id that the vocabulary lacks."""
    texts = {n: output_features[n].vocabulary for n in _TEXTS if n in output_features}
    absent = lambda number: -1 if number is None else number  # noqa: E731
    return {n: (absent(v.unk_id), absent(v.eos_id)) for n, v in texts.items()}


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

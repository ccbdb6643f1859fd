"""Labels of classification tasks, checked against the vocabulary before any data is read."""

from __future__ import annotations

from typing import Any

import seqio
from absl import logging

from mpt_jax.batching import spelling

# Labels whose rewriting has been logged, as (task, labels): a job checks a task several times.
_LOGGED: set[tuple[str, tuple[str, ...]]] = set()


def labels_of(task: seqio.Task) -> tuple[str, ...]:
    """Returns the labels that a metric of `task` declares, or () if none does."""
    for metric_fn in task.metric_fns:
        if labels := getattr(metric_fn, "labels", ()):
            return tuple(labels)
    return ()


def as_decoded(task: seqio.Task) -> dict[str, str]:
    """Returns {label after encoding, decoding and stripping: label}.

    The vocabulary may normalize a label: a ligature becomes two letters.
    """
    vocabulary = task.output_features["targets"].vocabulary
    return {_decoded(vocabulary, label): label for label in labels_of(task)}


def check(task: seqio.Task, limit: int | None) -> None:
    """Checks the labels of a task, if it has any, and logs those that the vocabulary rewrites.

    Args:
        task: the task.
        limit: the limit on targets in tokens, EOS included; None for no limit.

    Raises:
        ValueError: two labels have the same tokens or are decoded alike, or a label has an unknown
            token or too many tokens.
    """
    labels = labels_of(task)
    if not labels:
        return
    feature, owner = task.output_features["targets"], f"task {task.name!r}"
    ids = [list(feature.vocabulary.encode(label)) for label in labels]
    spelling.check_told_apart(labels, ids, feature.vocabulary, "label", owner)
    lengths = [len(tokens) + int(feature.add_eos) for tokens in ids]
    for label, length in zip(labels, lengths, strict=True):
        if limit is not None and length > limit:
            raise ValueError(
                f"The label {label!r} of {owner} has {length} tokens, including the end of "
                f"sequence, but the limit on targets is {limit}. Set 'targets' in "
                f"TASK_FEATURE_LENGTHS to at least {max(lengths)}, or choose shorter labels."
            )
    decoded: dict[str, str] = {}
    for label in labels:
        text = _decoded(feature.vocabulary, label)
        if text in decoded:
            raise ValueError(
                f"The labels {decoded[text]!r} and {label!r} of {owner} are both decoded as "
                f"{text!r}, so predictions of the two look the same. Choose other label words."
            )
        decoded[text] = label
    rewritten = [f"{label!r} as {text!r}" for text, label in decoded.items() if text != label]
    if rewritten and (task.name, labels) not in _LOGGED:
        _LOGGED.add((task.name, labels))
        logging.info(
            "Task %s: the vocabulary writes %s. Metrics count either form as correct.",
            *(task.name, ", ".join(rewritten)),
        )


def _decoded(vocabulary: Any, label: str) -> str:
    return spelling.as_decoded(vocabulary, label).strip()

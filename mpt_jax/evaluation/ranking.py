"""Rank classification: the answer is the label with the highest log-probability, regardless of the
decoded text.

If n labels share the highest log-probability, and the gold label is one of them, the example counts
1/n: the expected accuracy of a random choice among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import seqio
from absl import logging
from jax.experimental import multihost_utils

from mpt_jax.batching.collate import Batch
from mpt_jax.core.runs import Runs
from mpt_jax.data.labels import labels_of


class Ranker:
    """Ranks the labels of each example of a batch.

    Args:
        tasks: {name: task}; each task declares labels.
        runs: the runs of the job, which give the bank row of each task.
        score_fn: a function that takes this host's batch and returns the log-probability [B], in
            nats, of the target of each row of all hosts.
    """

    def __init__(
        self, tasks: Mapping[str, seqio.Task], runs: Runs, score_fn: Callable[[Batch], Any]
    ):
        self._tasks, self._runs, self._score = tasks, runs, score_fn
        self._labels = self._label_table()

    def __call__(self, batch: Batch) -> np.ndarray:
        """Returns [B, 2] for the rows of all hosts: the credit of each example, from 0 to 1, and 0
        if a single label is best, else 1.

        Raises:
            ValueError: an example's target is not one of the labels that its task declares.
        """
        rows = batch["encoder_task_ids"].max(axis=1)
        scores = []
        for column in range(self._labels.shape[1]):
            tokens = self._labels[rows, column]
            score = np.asarray(self._score(_with_targets(batch, tokens, rows)))
            scores.append(np.where(_gather(tokens).any(axis=1), score, -np.inf))
        targets = batch["decoder_target_tokens"]
        width = max(targets.shape[1], self._labels.shape[2])
        matches = _widened(self._labels[rows], width) == _widened(targets, width)[:, None]
        matches = matches.all(axis=2)
        known = matches.any(axis=1) | ~targets.any(axis=1)
        if not known.all():
            raise ValueError(self._strange_target(batch, rows, int(np.argmin(known))))
        best = np.equal(scores, np.max(scores, axis=0)).T  # [B, C]; none if a score is NaN
        count = best.sum(axis=1)
        hit = best[np.arange(len(best)), _gather(matches.argmax(axis=1))]
        return np.stack([hit / np.maximum(count, 1), count != 1], axis=1)

    def _label_table(self) -> np.ndarray:
        """Returns the tokens of every label as [K, labels, L], indexed by bank row; 0 is padding.

        L is the length of the longest label, which may differ from the length of the targets.
        """
        label_ids = {}
        for name, task in self._tasks.items():
            feature = task.output_features["targets"]
            eos = [feature.vocabulary.eos_id] * feature.add_eos
            texts = labels_of(task)
            label_ids[name] = [list(feature.vocabulary.encode(text)) + eos for text in texts]
        most = max(len(labels) for labels in label_ids.values())
        longest = max(len(ids) for labels in label_ids.values() for ids in labels)
        table = np.zeros([self._runs.num_rows, most, longest], np.int32)
        for name, labels in label_ids.items():
            for column, ids in enumerate(labels):
                table[self._runs.row(name), column, : len(ids)] = ids
        return table

    def _strange_target(self, batch: Batch, rows: np.ndarray, index: int) -> str:
        name = self._runs.run_names[int(rows[index])]
        vocabulary = self._tasks[name].output_features["targets"].vocabulary
        target = vocabulary.decode(batch["decoder_target_tokens"][index].tolist())
        return (
            f"Task {name!r} declares the labels "
            f"{', '.join(map(repr, labels_of(self._tasks[name])))}, but an example has the target "
            f"{target!r}. Correct the labels or the targets."
        )


def accuracies(ranked: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns {task: {'rank_accuracy': percent}}; logs a warning for tasks without a single best
    label in some examples.

    Args:
        ranked: {task: what a `Ranker` returned for its examples, [examples, 2]}.
    """
    for name, rows in ranked.items():
        if ties := int(rows[:, 1].sum()):
            logging.warning(
                "Task %s: in %d of %d examples (%.1f%%) no single label has the highest "
                "log-probability. rank_accuracy counts 1/n if the gold label is one of the n best, "
                "and 0 if a log-probability is not a number.",
                *(name, ties, len(rows), 100 * ties / len(rows)),
            )
    means = {name: 100 * float(rows[:, 0].mean()) for name, rows in ranked.items()}
    return {name: {"rank_accuracy": mean} for name, mean in means.items()}


def _widened(tokens: np.ndarray, width: int) -> np.ndarray:
    missing = width - tokens.shape[-1]
    return np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, missing)])


def _with_targets(batch: Batch, tokens: np.ndarray, rows: np.ndarray) -> Batch:
    """Returns `batch` with the targets `tokens` [B, L]; `rows` [B] are the bank rows."""
    weights = (tokens != 0).astype(np.int32)
    return {
        **batch,
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": np.pad(tokens, [(0, 0), (1, 0)])[:, :-1],
        "decoder_loss_weights": weights,
        "decoder_task_ids": weights * rows[:, None].astype(np.int32),
    }


def _gather(rows: Any) -> np.ndarray:
    """Returns the rows of all hosts, in the order of the hosts."""
    if jax.process_count() == 1:
        return np.asarray(rows)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))

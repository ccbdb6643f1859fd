"""Lines of JSON that inference writes: one for each example, with its text and its prediction or
score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mpt_jax.batching import bucketing
from mpt_jax.data.classes import ClassVocabulary
from mpt_jax.data.iterators import HostShard
from mpt_jax.models.class_interface import predicted_classes


def lines_of(
    window: tuple[Any, Any],
    rows: int,
    buckets: bucketing.LengthBuckets | None,
    function: Callable[..., Any],
    mode: str,
    vocabulary: Any,
) -> Iterator[str]:
    """Yields one line of JSON per example of a window, in the window's order.

    Args:
        window: the texts and the model features of the examples.
        rows: the number of rows of a batch.
        buckets: the lengths that batches are trimmed to; None disables trimming.
        function: the compiled prediction or scoring function.
        mode: see `mpt_jax.infer.infer`.
        vocabulary: the vocabulary that decodes predictions.
    """
    texts, features = jax.tree.map(lambda x: x.numpy(), window)
    shard = HostShard(rows, jax.process_count(), jax.process_index())
    answers: dict[int, dict[str, Any]] = {}
    for indices, batch in bucketing.batches_of(features, rows, buckets, targets=False):
        outputs = function(shard.rows_of_host(batch))
        for row, index in enumerate(indices.tolist()):
            answers[index] = _answer(outputs, row, mode, vocabulary)
    for number in range(len(answers)):
        inputs = {name: value[number].decode() for name, value in texts.items()}
        yield json.dumps({"inputs": inputs} | answers[number])


def _answer(outputs: Any, row: int, mode: str, vocabulary: Any) -> dict[str, Any]:
    if isinstance(vocabulary, ClassVocabulary):
        return _classified(np.asarray(outputs[row]), mode, vocabulary)
    if mode == "score":
        return {"score": float(outputs[row])}
    tokens, aux = outputs if mode == "predict_with_aux" else (outputs, {})
    answer: dict[str, Any] = {"prediction": vocabulary.decode(tokens[row].tolist())}
    if mode == "predict_with_aux":
        answer["aux"] = {name: value[row].tolist() for name, value in aux.items()}
    return answer


def _classified(scores: np.ndarray, mode: str, classes: ClassVocabulary) -> dict[str, Any]:
    """Returns the answer about an image, given the scores [C] of its task's classes and of others
    that do not exist."""
    scores = scores[: classes.size]
    if mode == "score":
        return {"score": scores.tolist()}
    prediction = predicted_classes(classes.names, scores, classes.multi_label)
    answer: dict[str, Any] = {"prediction": prediction}
    if mode == "predict_with_aux":
        answer["aux"] = {"scores": float(scores.max())}
    return answer

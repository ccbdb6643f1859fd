"""Comparison of gold texts with predictions, both as the vocabulary writes them, and a warning if
all predictions of a task are the same.

A vocabulary rewrites text: it normalizes Unicode (a ligature becomes two letters) and replaces
characters that it lacks. A model can predict only what `decode(encode(text))` gives, so a gold text
is compared in that form.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
from absl import logging

from mpt_jax.batching import spelling
from mpt_jax.data import labels
from mpt_jax.data.classes import is_image_task


def compared(task: seqio.Task) -> seqio.Task:
    """Returns a copy of a task whose metrics compare texts as the vocabulary writes them.

    If the task declares labels, a prediction that equals a label encoded and decoded becomes that
    label. Otherwise, gold texts are encoded and decoded: the target before the task's postprocessor
    reads it, and each list of texts that the postprocessor returns (directly or in a mapping).
    """
    if is_image_task(task):
        return task  # its predictions are class names
    vocabulary = task.output_features["targets"].vocabulary
    label_of, postprocess = labels.as_decoded(task), task.postprocessor

    def as_decoded(gold: Any) -> Any:
        if isinstance(gold, Mapping):
            return {k: as_decoded(v) if isinstance(v, list) else v for k, v in gold.items()}
        if isinstance(gold, list):
            return [spelling.as_decoded(vocabulary, x) if isinstance(x, str) else x for x in gold]
        return gold

    def of_decoded(text: str, example: Any = None, is_target: bool = False) -> Any:
        if not is_target:
            text = label_of.get(text.strip(), text)
        elif not label_of:
            text = spelling.as_decoded(vocabulary, text)
        value = postprocess(text, example=example, is_target=is_target) if postprocess else text
        return as_decoded(value) if is_target and not label_of else value

    view = copy.copy(task)
    view._postprocess_fn = of_decoded
    view.__dict__.pop("metric_objs", None)  # cached; made from the postprocessor
    return view


def constant_prediction(task: seqio.Task, ids: np.ndarray) -> str | None:
    """Returns the text that all predictions of a task have in common; None if they differ or there
    is only one.

    Args:
        task: the task.
        ids: the predicted ids [examples, L], 0 after EOS.
    """
    if len(ids) < 2 or (ids != ids[0]).any():
        return None
    text = task.output_features["targets"].vocabulary.decode(ids[0].tolist()).strip()
    if is_image_task(task):
        return text
    return labels.as_decoded(task).get(text, text)


class ConstantReporter:
    """Logs a warning when all predictions of a task become the same, and when they differ again."""

    def __init__(self):
        self._constant: dict[str, str] = {}  # task -> the text of all its predictions

    def report(self, name: str, text: str | None, scores: Mapping[str, float]) -> None:
        """Reports the predictions of one evaluation.

        Args:
            name: the name of the task.
            text: the text of all predictions, or None if they differ.
            scores: the scores of the evaluation, the most important one first.
        """
        if text == self._constant.get(name):
            return
        if text is None:
            del self._constant[name]
            logging.info("Predictions of %s are no longer all the same.", name)
            return
        self._constant[name] = text
        first = next(iter(scores.items()), None)
        score = f", which scores {first[1]:.1f} ({first[0]})" if first else ""
        logging.warning("Every prediction of %s is %r%s.", name, text, score)

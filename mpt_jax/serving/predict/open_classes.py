"""Features of class names that come with a request, which any shared context fits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Float
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.serving.predict.image_artifacts import Inputs, texts_of

KEPT = 16  # lists of class names whose features are kept
NAME = "request"  # of the task, in errors


class OpenClasses:
    """The features of class names in the texts of a served row.

    Args:
        model: the served model, whose contexts neither classes have separately nor images change.
        params: its parameters, with the text encoder.
        inputs: how its inputs are made.
        tokenizer: the backbone's tokenizer.
    """

    def __init__(
        self, model: PromptedDualEncoder, params: Any, inputs: Inputs, tokenizer: ClipTokenizer
    ):
        self._model, self._params = model, params
        self._inputs, self._tokenizer = inputs, tokenizer
        self.features = functools.lru_cache(KEPT)(self._features)

    def _features(self, row: int, names: tuple[str, ...]) -> Float[np.ndarray, "C U"]:
        """Returns the normalized features of class names with the context, or the templates, of a
        row.

        Raises:
            ValueError: a name is empty, repeated or too long for the text encoder.
        """
        served, task = self._model, self._inputs.tasks[row]
        classes = TaskClasses(NAME, names, task.templates, task.multi_label)
        inputs = Inputs(self._inputs.transform, self._inputs.position, (classes,))
        texts = texts_of(inputs, served.prompt, self._tokenizer, served.module.config)
        model = PromptedDualEncoder(served.module, served.prompt, Runs([NAME]), texts)
        prompt = jax.tree.map(lambda x: x[row : row + 1], self._params["prompt"])
        return np.asarray(model.text_features({**self._params, "prompt": prompt}))


def unsupported(model: PromptedDualEncoder) -> str | None:
    """Returns why requests cannot bring class names, or None if they can."""
    if model.prompt.text_classes:
        return "every class has its own context"
    if model.prompt.reads_image:
        return "the context depends on the image (CoCoOp)"
    return None

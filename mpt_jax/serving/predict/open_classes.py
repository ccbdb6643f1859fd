"""Features of class names that come with a request, which any shared context fits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.core.shapes import Array, Float, Int, Params
from mpt_jax.models.class_texts import ClassTexts, TaskClasses
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.prompts.sites import TEXT
from mpt_jax.serving.predict.image_artifacts import Inputs, texts_of

KEPT = 16  # lists of class names whose features are kept
MOST_TEXTS = 2_048  # of a request
CHUNK = 32  # texts that are encoded at a time
LENGTHS = (16, 32)  # of texts, besides the text encoder's longest
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
        self._encode = jax.jit(functools.partial(_encode, model))
        self.features = functools.lru_cache(KEPT)(self._features)

    def _features(self, row: int, names: tuple[str, ...]) -> Float[np.ndarray, "C U"]:
        """Returns the normalized features of class names with the context, or the templates, of a
        row.

        Raises:
            ValueError: there are more than `MOST_TEXTS` texts, or a name is empty, repeated or too
                long for the text encoder.
        """
        served, task = self._model, self._inputs.tasks[row]
        if TEXT not in served.prompt.parts:
            _check_number(len(names), len(task.templates))
        classes = TaskClasses(NAME, names, task.templates, task.multi_label)
        inputs = Inputs(self._inputs.transform, self._inputs.position, (classes,))
        texts = texts_of(inputs, served.prompt, self._tokenizer, served.module.config)
        features = self._of_texts(row, texts)
        sums = np.zeros((len(names), features.shape[1]), np.float32)
        np.add.at(sums, texts.class_of_text, features)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def _of_texts(self, row: int, texts: ClassTexts) -> Float[np.ndarray, "n U"]:
        """Returns the normalized feature of every text. Chunks have one size and texts few lengths,
        so that few programs encode all requests."""
        number, length = texts.tokens.shape
        text = self._model.module.config.text
        assert text is not None
        whole = text.context_length
        longest = min(x for x in (*LENGTHS, whole) if length <= x <= whole)
        padding = (0, -number % CHUNK), (0, longest - length)
        arrays = np.pad(texts.tokens, padding), np.pad(texts.slots, padding)
        arrays = *arrays, np.pad(texts.eot, padding[0])
        found = [
            self._encode(self._params, np.int32(row), *(x[first : first + CHUNK] for x in arrays))
            for first in range(0, number, CHUNK)
        ]
        return np.concatenate(found)[:number]


def _encode(
    model: PromptedDualEncoder,
    params: Params,
    row: Int[Array, ""],
    tokens: Int[Array, "n T"],
    slots: Int[Array, "n T"],
    eot: Int[Array, " n"],
) -> Float[Array, "n U"]:
    """Returns the normalized features of texts with the context of a row, if it has one."""
    rows = None
    if TEXT in model.prompt.parts:
        (context,) = model.prompt.compose_site(TEXT, params["prompt"], model.runs, row[None])
        rows = context[jnp.maximum(slots - 1, 0)]
    return model.text_encoder(params)(tokens, rows, slots, eot)


def _check_number(names: int, templates: int) -> None:
    """Raises ValueError if a request has too many texts."""
    if names * templates > MOST_TEXTS:
        raise ValueError(
            f"The request has {names:,} class names, which make {names * templates:,} texts with "
            f"the {templates:,} templates of the task, and the limit is {MOST_TEXTS:,}. Send at "
            f"most {MOST_TEXTS // templates:,} names at a time."
        )


def unsupported(model: PromptedDualEncoder) -> str | None:
    """Returns why requests cannot bring class names, or None if they can."""
    if model.prompt.text_classes:
        return "every class has its own context"
    if model.prompt.reads_image:
        return "the context depends on the image (CoCoOp)"
    return None

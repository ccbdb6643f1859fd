"""Model methods that T5X and evaluators call by name: feature converter, scores and predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Int, Key, Params
from mpt_jax.models.class_bank import ClassBank
from mpt_jax.models.class_texts import ClassTexts
from mpt_jax.prompts.sites import SitePrompts


def predicted_classes(
    names: Sequence[str], scores: Float[np.ndarray, " C"], multi_label: bool
) -> str | list[str]:
    """Returns the name of the most probable class or, in a multi-label task, the names of all
    classes with a probability above one half, given log probabilities."""
    if not multi_label:
        return names[int(scores.argmax())]
    return [name for name, score in zip(names, scores, strict=True) if score > np.log(0.5)]


class ClassInterface:
    """Mixin that gives `PromptedDualEncoder` the methods that classify the images of a batch."""

    bank: ClassBank
    prompt: SitePrompts
    texts: ClassTexts
    image_transform: Any
    augmentation: Any
    feature_converter_cls: Callable[..., Any] | None
    own_logits: Callable[..., Array]

    def score_batch(
        self,
        params: Params,
        batch: Batch,
        return_intermediates: bool = False,
    ) -> Float[Array, "B C"]:
        """Returns the log probability of each class of the example's task, in nats; minus infinity
        at classes that do not exist. In a multi-label task, every class has its own probability.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features; labels are not used.
            return_intermediates: T5X's; must be False.

        Raises:
            ValueError: intermediates are requested.
        """
        if return_intermediates:
            raise ValueError(
                "score_batch cannot return intermediates. Set return_intermediates to False."
            )
        logits = self.own_logits(params, batch)
        multi = jnp.asarray(self.bank.is_multi_label)[batch["task_ids"]][:, None]
        return jnp.where(multi, jax.nn.log_sigmoid(logits), jax.nn.log_softmax(logits))

    def predict_batch(
        self, params: Params, batch: Batch, rng: Key | None = None, num_decodes: int | None = None
    ) -> Int[Array, "B 1"]:
        """Returns the id of each example's most probable class, within its task."""
        return self.predict_batch_with_aux(params, batch)[0]

    def predict_batch_with_aux(
        self, params: Params, batch: Batch, rng: Key | None = None, **settings: Any
    ) -> tuple[Int[Array, "B 1"], dict[str, Array]]:
        """Returns the id of each example's most probable class, and its log probability as
        `{'scores': [B]}`."""
        scores = self.score_batch(params, batch)
        return jnp.argmax(scores, axis=-1)[:, None].astype(jnp.int32), {"scores": scores.max(-1)}

    def check_evaluates(self, runs: Runs) -> None:
        """Raises ValueError if every class has its own context, and a task is not one of `runs`."""
        missing = [x.task for x in self.texts.tasks if x.task not in runs.task_names]
        if missing and self.prompt.text_classes:
            raise ValueError(
                "The initial artifact has a context for each class of "
                f"{abbreviate(list(dict.fromkeys(runs.task_names)))}, and none for those of "
                f"{missing[0]}. Evaluate tasks of the artifact, or train a context that all "
                "classes share (TEXT_CLASSES = 0), which also fits new classes."
            )

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:  # noqa: N802 - T5X's name
        """The function with which T5X and our trainer build the feature converter.

        Raises:
            ValueError: `feature_converter_cls` is None.
        """
        if self.feature_converter_cls is None:
            raise ValueError(
                "This model has no feature converter. Bind PromptedDualEncoder."
                "feature_converter_cls, as gin/models/prompted_clip.gin does."
            )
        return functools.partial(
            self.feature_converter_cls,
            transform=self.image_transform,
            augmentation=self.augmentation,
            num_classes=self.bank.count.tolist(),
            multi_label=self.bank.is_multi_label.tolist(),
        )

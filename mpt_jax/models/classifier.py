"""The model of images with a head: an image encoder, the classes of each task, and lanes if any.

It shares the batches, the losses by task and the evaluation of `dual_encoder`, but compares no
texts: the logits of an example are those of its task's head. Parameters are one nested dict,

    {image_encoder}    the backbone, a plain ViT or the image tower of a CLIP
    prompt             the heads (`prompts.heads`), and the lanes if any (`prompts.lanes`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.clip.network import CLIP
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Key, Params
from mpt_jax.core.tree import Rules
from mpt_jax.models import class_losses, losses, metrics
from mpt_jax.models.class_bank import ClassBank
from mpt_jax.models.class_scores import site_key
from mpt_jax.models.class_texts import ClassTexts
from mpt_jax.models.dual_encoder import (
    BACKBONE,
    PromptedDualEncoder,
    class_names,
    digests_of,
)
from mpt_jax.models.lane_scores import LaneScores
from mpt_jax.models.model import FROZEN, RowCost
from mpt_jax.prompts.base import FLOAT32, row_axes
from mpt_jax.prompts.heads import Heads
from mpt_jax.prompts.lanes import LANE

_TEXT = ("text_encoder", "logit_scale")


@dataclasses.dataclass(frozen=True)
class HeadObjective(class_losses.ClassObjective):
    """The loss of a classifier: over the classes of the example's task.

    Attributes:
        all_classes: the number of classes that the binary cross entropies of a multi-label example
            are averaged over, at least those of its task. As in MULTI-LANE's released code, which
            fills the classes of other tasks with zeros, each of them adds log 2, and gradients are
            smaller by the share of the task's own classes. 0 averages over these.
    """

    softmax: str = dataclasses.field(default=class_losses.OWN, init=False)
    all_classes: int = 0


class PromptedClassifier(LaneScores, PromptedDualEncoder):
    """An image encoder with a head for each task, and with lanes or without (a linear probe).

    Args:
        module: the backbone. The text tower of a CLIP is dropped.
        prompt: the heads, with lanes or without.
        runs: the bank's rows.
        texts: the classes of all tasks of the runs (`class_texts.untokenized`).
        optimizer_def: a `PromptOptimizer`; None if the model is not trained.
        objective: the loss.
        labels: label rules that take precedence over the method's rules and over the rule that
            freezes the backbone.
        image_transform, augmentation, feature_converter_cls: see `PromptedDualEncoder`.
        normalize: whether the head reads features of length 1.
        temperature: the number that logits are divided by.

    Raises:
        ValueError: a task has more classes than a head, there are fewer classes in all than the
            loss is averaged over, the temperature is not positive, a linear probe does not read
            features of length 1, or lanes of runs have different lengths.
    """

    def __init__(  # noqa: PLR0913 - gin binds each of them
        self,
        module: CLIP,
        prompt: Heads,
        runs: Runs,
        texts: ClassTexts,
        optimizer_def: Any = None,
        objective: HeadObjective | None = None,
        labels: Rules = (),
        image_transform: Any = None,
        augmentation: Any = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        normalize: bool = True,
        temperature: float = 1.0,
    ):
        self.module, self.runs, self.texts = module, runs, texts
        self.prompt: Any = prompt
        self.input_vocabulary = None
        self.objective: Any = objective or HeadObjective()
        self.image_transform, self.augmentation = image_transform, augmentation
        self.feature_converter_cls = feature_converter_cls
        self.normalize, self.temperature = normalize, temperature
        self.bank = ClassBank.of(texts, runs, prompted=True)
        self.text_chunk = 0  # no texts
        self._trains_backbone = bool(labels)
        self._check()
        self.labels = (
            *labels,
            *((f"prompt/{pattern}", label) for pattern, label in prompt.labels),
            (BACKBONE, FROZEN),
        )
        self.rows = row_axes(prompt)
        self.optimizer_def = optimizer_def and optimizer_def.bind(
            self.labels, runs, self.rows, prompt.schedule_steps
        )

    def _check(self) -> None:
        """Raises ValueError if settings contradict each other."""
        prompt, texts, kind = self.prompt, self.texts, type(self.prompt).__name__
        if self.objective.distillation is not None:
            raise ValueError(
                "A classifier has no teachers. Set HeadObjective.distillation to None."
            )
        if texts.most_classes > prompt.num_classes:
            raise ValueError(
                f"A task has {texts.most_classes} classes, but {kind}.num_classes is "
                f"{prompt.num_classes}. Set it to at least {texts.most_classes}."
            )
        if 0 < self.objective.all_classes < texts.most_classes:
            raise ValueError(
                f"HeadObjective.all_classes is {self.objective.all_classes}, but a task has "
                f"{texts.most_classes} classes. Set ALL_CLASSES to the number of classes of the "
                "whole sequence, or to 0."
            )
        if not self.temperature > 0:
            raise ValueError(
                f"PromptedClassifier.temperature is {self.temperature}, but logits are divided by "
                "it. Set TEMPERATURE to a positive number, such as 1."
            )
        if self.has_lanes:
            self.check_lanes()
        elif not self.normalize:
            raise ValueError(
                "NORMALIZE is False, but a linear probe reads features of length 1. Set NORMALIZE "
                "to True, and TEMPERATURE below 1 for larger logits."
            )

    @property
    def has_lanes(self) -> bool:
        """Whether heads read the features of lanes."""
        return LANE in self.prompt.parts

    @property
    def input_settings(self) -> dict[str, Any]:
        """The image transform, the classes of every task, and how heads read features."""
        head = {"normalize": self.normalize, "temperature": self.temperature}
        return {**super().input_settings, "head": head}

    @property
    def training_settings(self) -> dict[str, Any]:
        """The settings of the augmentation, and those of the head."""
        augmentation = self.augmentation and self.augmentation.config()
        head = {"normalize": self.normalize, "temperature": self.temperature}
        return {"augmentation": augmentation, "head": head}

    @property
    def input_digests(self) -> Mapping[str, str]:
        """The digests of the image transform's settings, and of the class names of each task in
        their order."""
        transform = {"image_transform": self.image_transform.config()}
        return digests_of({**transform, **class_names(self.texts.tasks)})

    def comparable_digests(self, runs: Runs) -> Mapping[str, str]:
        """Returns the `input_digests` without the class names of tasks that are not those of
        `runs`, whose heads are new."""
        return self.input_digests_of(runs.task_names)

    def check_evaluates(self, runs: Runs) -> None:
        """Raises ValueError if a run is not one of `runs`, which have a head each."""
        if missing := [run for run in self.runs.run_names if run not in runs.run_names]:
            raise ValueError(
                f"The initial artifact has no head for the run {missing[0]!r}, only for "
                f"{abbreviate(runs.run_names)}. A head scores the classes it was trained on, so "
                "evaluate runs of the artifact, or train one on the new classes."
            )

    @property
    def changeable_digests(self) -> Collection[str]:
        """That of the image transform."""
        return ("image_transform_sha256",)

    def embedding(self, params: Params) -> Any:
        """Returns the token embeddings [V, H] of a CLIP's text encoder. A plain ViT has none, so it
        is identified by its patch embedding."""
        if self.module.config.text is not None:
            return super().embedding(params)
        return params["image_encoder"]["patch_embedding"]["kernel"]

    # --- Parameters ------------------------------------------------------------------------------

    def get_initial_variables(
        self,
        rng: Key,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        input_types: Mapping[str, Any] | None = None,
    ) -> Params:
        """Returns the whole parameter tree, randomly initialized, and its logical axes; see
        `Model`."""
        params, axes = self.initial_params(rng)
        if self.precomputes:
            params = self.precompute(params)
            left = {"text_encoder", "logit_scale_axes"}
            axes = {name: value for name, value in axes.items() if name not in left}
        return flax.core.freeze({"params": params, "params_axes": axes})

    @property
    def precomputes(self) -> bool:
        """Whether the text tower of a CLIP is dropped."""
        return self.module.config.text is not None and not self._trains_backbone

    def precompute(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns parameters without the text tower, unless the backbone is trained and saved."""
        if not self.precomputes:
            return params
        return {name: value for name, value in params.items() if name not in _TEXT}

    def params_for_evaluation(self, params: Params) -> Params:
        """Returns the parameters unchanged: no text is encoded."""
        return params

    # --- Scores and loss -------------------------------------------------------------------------

    def head_features(
        self, params: Params, batch: Batch, key: Key | None = None
    ) -> Float[Array, "B U"]:
        """Returns the features of images that the head of each example's task reads: those of its
        lane or, without lanes, of the frozen image encoder."""
        if not self.has_lanes:
            return self.image_features(params, batch)
        return self.lane_features(params, batch, key)[:, 0]

    def own_logits(
        self,
        params: Params,
        batch: Batch,
        prompt_rng: Key | None = None,
    ) -> Float[Array, "B C"]:
        """Returns the logits of the classes of each example's task, in the order of their ids;
        minus infinity at classes that the task does not have."""
        task_ids, key = batch["task_ids"], site_key(prompt_rng)
        features = self.head_features(params, batch, key)
        kernel, bias = self.prompt.head(params["prompt"], task_ids)
        product = jnp.einsum("bu,bcu->bc", features, kernel, precision=FLOAT32)
        logits = ((product + bias) / self.temperature)[:, : self.texts.most_classes]
        return jnp.where(self.bank.is_own(task_ids), logits, -jnp.inf)

    def logits(
        self, params: Params, batch: Batch, prompt_rng: Key | None = None
    ) -> Float[Array, "B C"]:
        """Returns `own_logits`: only the classes of the example's task compete."""
        return self.own_logits(params, batch, prompt_rng)

    def loss_sums(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Key | None = None,
        prompt_rng: Key | None = None,
    ) -> tuple[losses.Sums, metrics.StepMetrics]:
        """Returns the sum [G] of the loss, and the metrics of each run; see `Model`."""
        key = dropout_rng if prompt_rng is None else prompt_rng
        logits = self.own_logits(params, batch, key)
        target, has_label = batch["label"], batch["label"] >= 0
        each = class_losses.class_cross_entropy(logits, target)
        if "labels" in batch:
            own = self.bank.is_own(batch["task_ids"])
            binary = class_losses.multi_label_cross_entropy(logits, batch["labels"], own)
            if every := self.objective.all_classes:
                count = own.sum(-1)
                binary = (binary * count + (every - count) * jnp.log(2.0)) / every
            each = jnp.where(has_label, each, binary)
        each = jnp.where(batch["loss_weights"] > 0, each, 0.0)  # padding may be infinite
        correct = jnp.argmax(logits, -1) == target
        found = class_losses.class_metrics(batch, each, correct, has_label, self.runs.num_rows)
        return {"cross_entropy": self._by_group(each, batch)}, found

    def row_cost(self, batch: Mapping[str, Any]) -> RowCost:
        """Returns the memory that the image of one row takes in a step."""
        config = self.module.config
        tokens = config.image.num_tokens
        if self.has_lanes:
            tokens += self.prompt.selectors + self.prompt.merged_tokens + 1
        size = tokens * config.image.num_layers * config.image.emb_dim
        return RowCost(
            size * np.dtype(config.dtype).itemsize, f"with {tokens} tokens per image", None
        )

"""The model of images that a trainer runs: CLIP, prompts at its sites, and the texts of classes.

An image is classified by the cosine of its feature with the feature of every class of its task.
Parameters are one nested dict,

    {image_encoder, text_encoder, logit_scale}   the backbone
    class_features                               features of the class texts, instead of the text
                                                 encoder, if the texts have no prompt
    prompt                                       the method's parameters, by site
    teacher                                      frozen features of class texts, and image tokens,
                                                 to distill from, if any
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.clip.network import CLIP
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Key, Params
from mpt_jax.core.tree import Rules
from mpt_jax.models import class_losses, losses, metrics
from mpt_jax.models.class_bank import ClassBank
from mpt_jax.models.class_interface import ClassInterface
from mpt_jax.models.class_scores import FEATURES, ClassScores
from mpt_jax.models.class_teachers import TEACHER, ClassTeachers, check_distillation
from mpt_jax.models.class_texts import ClassTexts, TaskClasses
from mpt_jax.models.model import FROZEN, Model, RowCost, axes_of
from mpt_jax.models.prompt_insertion import NUMBERS
from mpt_jax.prompts.base import NO_KERNELS, Kernels, row_axes
from mpt_jax.prompts.row_ops import numbers_within_rows
from mpt_jax.prompts.sites import IMAGE, TEXT, SiteContext, SitePrompts

BACKBONE = r"(image_encoder|text_encoder)/.*|logit_scale"


class PromptedDualEncoder(ClassScores, ClassTeachers, ClassInterface, Model):
    """A dual encoder that compares images with class texts.

    Args:
        module: the backbone.
        prompt: the prompt method of each site.
        runs: the bank's rows.
        texts: the texts of the classes of all tasks of the runs.
        optimizer_def: a `PromptOptimizer`; None if the model is not trained.
        tokenizer: the backbone's tokenizer, whose digest is recorded; None if unknown.
        objective: the loss; cross entropy over the classes of the example's task by default.
        labels: label rules that take precedence over the method's rules and over the rule that
            freezes the backbone.
        image_transform: turns an image into the pixels [S,S,3] that the backbone reads.
        augmentation: turns a training image into randomly cropped pixels; None trains on the
            pixels of the transform.
        feature_converter_cls: the class that turns SeqIO examples into batches; bound in gin.
        text_chunk: the number of class texts that are encoded at a time. With more texts, their
            activations are computed again in the backward pass, and texts of runs that are not in
            the batch are left out.

    Raises:
        ValueError: the context of the texts does not have the length of the prompt, prompts of
            runs have different lengths, or the model cannot have the objective's teachers.
    """

    backbone_pattern = BACKBONE
    optional_pattern = r"(?!)"  # nothing
    config_setting = "Set CLIP_NAME to the checkpoint's model, or CLIP_CONFIG if it has no name."
    output_vocabulary = None

    def __init__(  # noqa: PLR0913 - gin binds each of them
        self,
        module: CLIP,
        prompt: SitePrompts,
        runs: Runs,
        texts: ClassTexts,
        optimizer_def: Any = None,
        tokenizer: Any = None,
        objective: class_losses.ClassObjective | None = None,
        labels: Rules = (),
        image_transform: Any = None,
        augmentation: Any = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        text_chunk: int = 128,
    ):
        self.module = module
        self.prompt: SitePrompts = prompt
        self.runs = runs
        self.texts = texts
        self.input_vocabulary = tokenizer
        self.objective: Any = objective or class_losses.ClassObjective()
        self.image_transform = image_transform
        self.augmentation = augmentation
        self.feature_converter_cls = feature_converter_cls
        self.bank = ClassBank.of(texts, runs, prompted=TEXT in prompt.parts)
        self.text_chunk = text_chunk
        self._trains_backbone = bool(labels)
        _check_context(prompt, texts)
        _check_lengths(prompt, runs)
        if (distillation := self.objective.distillation) is not None:
            check_distillation(distillation, prompt, labels)
        self.labels = (
            *labels,
            *((f"prompt/{pattern}", label) for pattern, label in prompt.labels),
            (f"({FEATURES}|{TEACHER})/.*", FROZEN),
            (BACKBONE, FROZEN),
        )
        self.rows = row_axes(prompt)
        self.optimizer_def = optimizer_def and optimizer_def.bind(
            self.labels, runs, self.rows, prompt.schedule_steps
        )

    @property
    def dropout_rate(self) -> float:
        """0, since CLIP has no dropout."""
        return 0.0

    @property
    def input_settings(self) -> dict[str, Any]:
        """The image transform, and the classes of every task."""
        tasks = {
            task.task: {
                "names": list(task.names),
                "templates": list(task.templates),
                "multi_label": task.multi_label,
            }
            for task in self.texts.tasks
        }
        return {
            "transform": self.image_transform.config(),
            "context_position": self.texts.position,
            "tasks": tasks,
        }

    @property
    def training_settings(self) -> dict[str, Any]:
        """The settings of the augmentation, and the digest of the class texts, also of those of
        teachers without prompts."""
        augmentation = self.augmentation and self.augmentation.config()
        settings = {"augmentation": augmentation, "class_texts_sha256": self.texts.sha256}
        if self.has_teacher and not self.reads_teachers:
            settings["teacher_texts_sha256"] = self.teacher_texts.sha256
        return settings

    @property
    def input_digests(self) -> Mapping[str, str]:
        """The digests of the image transform's settings; of the position of a text prompt; and, if
        every class has its own context, of the class names of each task in their order."""
        settings = {"image_transform": self.image_transform.config()}
        if TEXT in self.prompt.parts:
            settings["context_position"] = self.texts.position
        if self.prompt.text_classes:
            settings |= class_names(self.texts.tasks)
        return digests_of(settings)

    def input_digests_of(self, tasks: Collection[str]) -> Mapping[str, str]:
        """Returns the `input_digests` without the class names of other tasks than these."""
        others = [task for task in self.texts.tasks if task.task not in tasks]
        left_out = digests_of(class_names(others))
        return {name: x for name, x in self.input_digests.items() if name not in left_out}

    @property
    def changeable_digests(self) -> Collection[str]:
        """Those of the image transform and the context's position. MVLPT, for one, crops the images
        of its source tasks, and squashes those of its target tasks."""
        return "image_transform_sha256", "context_position_sha256"

    def embedding(self, params: Params) -> Any:
        """Returns the token embeddings [V, H] of the text encoder."""
        return params["text_encoder"]["token_embedder"]["embedding"]

    # --- Parameters ------------------------------------------------------------------------------

    def init_backbone(self, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns random backbone parameters and their logical axes, in T5X's format."""
        config = self.module.config
        size = config.image.image_size
        images = jnp.zeros((1, size, size, 3), jnp.uint8)
        texts = (jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32))
        variables = flax.core.unfreeze(
            self.module.init(key, images, *(texts if config.text is not None else (None, None)))
        )
        return variables["params"], variables["params_axes"]

    def init_prompt(
        self, key: Key, embedding: Float[Array, "V H"], kernels: Kernels = NO_KERNELS
    ) -> dict[str, Any]:
        """Returns the method's initial parameters, given the text encoder's token embeddings."""
        config = self.module.config
        width, joint = config.image.emb_dim, config.joint_dim
        context = SiteContext(embedding, self.input_vocabulary, width, joint or width)
        return self.prompt.init(key, self.runs, context)

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
            del params["text_encoder"], axes["text_encoder"]
            shape = (self.texts.num_classes, self.module.config.joint_dim)
            params[FEATURES] = {"table": jnp.zeros(shape, jnp.float32)}
            axes[FEATURES] = {"table_axes": axes_of(("classes", "joint"))}
        if self.has_teacher:
            leaves = self.teacher_shapes().items()
            params[TEACHER] = {name: jnp.zeros(shape, jnp.float32) for name, (shape, _) in leaves}
            axes[TEACHER] = {f"{name}_axes": axes_of(names) for name, (_, names) in leaves}
        return flax.core.freeze({"params": params, "params_axes": axes})

    @property
    def precomputes(self) -> bool:
        """Whether features of the class texts replace the text encoder: nothing of them is
        trained."""
        return TEXT not in self.prompt.parts and not self._trains_backbone

    def precompute(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns parameters with features of the class texts instead of the text encoder, if these
        never change."""
        if not self.precomputes:
            return params
        encode = jax.jit(lambda backbone: self.text_features(backbone))
        used = {name: params[name] for name in ("text_encoder", "logit_scale")}
        table = np.asarray(encode(used))
        rest = {name: value for name, value in params.items() if name != "text_encoder"}
        return {**rest, FEATURES: {"table": table}}

    def params_for_evaluation(self, params: Params) -> Params:
        """Returns parameters with the features of all class texts, unless these depend on the
        image."""
        if FEATURES in params or self.prompt.reads_image:
            return params
        return {**params, FEATURES: {"table": self._encode_texts(params)}}

    @functools.cached_property
    def _encode_texts(self) -> Callable[[Params], Array]:
        return jax.jit(lambda params: self.text_features(params))

    # --- Batches and loss ------------------------------------------------------------------------

    def number_examples(self, batch: Batch) -> Batch:
        """Returns a batch with the number of each example among those of its run."""
        if not self.is_random:
            return batch
        return {**batch, NUMBERS: numbers_within_rows(batch["task_ids"])}

    def max_examples(self, batch: Batch) -> int | None:
        """Returns None, since class texts are those of the whole bank."""
        return None

    def row_cost(self, batch: Mapping[str, Any]) -> RowCost:
        """Returns the memory that the image of one row takes in a step."""
        config = self.module.config
        tokens = config.image.num_tokens
        if IMAGE in self.prompt.parts:
            tokens += self.prompt.parts[IMAGE].prompt_length // self.prompt.image_layers
        size = tokens * config.image.num_layers * config.image.emb_dim
        texts, fewer = len(self.bank.row), min(self.text_chunk, len(self.bank.row)) // 2
        encodes_texts = not self.precomputes
        return RowCost(
            size * np.dtype(config.dtype).itemsize,
            f"with {tokens} tokens per image"
            + (f", and of the texts of {texts} classes" if encodes_texts else ""),
            None if config.remat == "full" else "published.clip_config.remat",
            f"TEXT_CHUNK = {fewer} encodes that many of the {texts} class texts at a time, and "
            "computes their activations twice. Results are the same up to rounding."
            if encodes_texts and fewer
            else None,
        )

    def loss_sums(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Key | None = None,
        prompt_rng: Key | None = None,
    ) -> tuple[losses.Sums, metrics.StepMetrics]:
        """Returns the sum [G] of every loss term, and the metrics of each run; see `Model`."""
        key = dropout_rng if prompt_rng is None else prompt_rng
        images, texts = self.features(params, batch, key)
        logits = self.logits(params, batch, key, images, texts)
        target, has_label = batch["label"], batch["label"] >= 0
        own_logits = logits
        if self.objective.softmax == class_losses.UNION:
            target = jnp.asarray(self.bank.first)[batch["task_ids"]] + jnp.maximum(target, 0)
            own_logits = self.bank.own_entries(logits, batch["task_ids"])
        each = class_losses.class_cross_entropy(logits, target)
        if "labels" in batch:
            own = self.bank.is_own(batch["task_ids"])
            binary = class_losses.multi_label_cross_entropy(own_logits, batch["labels"], own)
            each = jnp.where(has_label, each, binary)
        terms = {"cross_entropy": each}
        if self.has_teacher:
            terms |= self.distillation_losses(params, batch, images, texts, own_logits)
        real = batch["loss_weights"] > 0
        terms = {name: jnp.where(real, x, 0.0) for name, x in terms.items()}  # may be infinite
        sums = {name: self._by_group(x, batch) for name, x in terms.items()}
        each = terms["cross_entropy"]
        correct = jnp.argmax(logits, -1) == target
        rows = self.runs.num_rows
        return sums, class_losses.class_metrics(batch, each, correct, has_label, rows)

    def loss_normalizers(self, batch: Batch) -> losses.Sums:
        """Returns the number [G] of examples, for every term."""
        examples = self._by_group(jnp.ones_like(batch["loss_weights"]), batch)
        return dict.fromkeys(self.objective.coefficients(), examples)

    def _by_group(self, values: Array, batch: Batch) -> Array:
        groups = jnp.asarray(self.runs.group_of_row, jnp.int32)[batch["task_ids"]]
        return class_losses.by_group(values, batch, groups, self.runs.num_groups)


def class_names(tasks: Sequence[TaskClasses]) -> dict[str, Sequence[str]]:
    """Returns the class names of each task in their order, by the name of their digest."""
    return {f"class_names_of_{task.task}": task.names for task in tasks}


def digests_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 of settings, which are JSON values, as `<name>_sha256`."""
    return {
        f"{name}_sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in settings.items()
    }


def _check_context(prompt: SitePrompts, texts: ClassTexts) -> None:
    """Raises ValueError if class texts do not reserve the positions of the text prompt."""
    length = 0
    if (method := prompt.parts.get(TEXT)) is not None:
        length = method.prompt_length // (prompt.text_classes or 1)
    if texts.context_length != length:
        raise ValueError(
            f"The class texts reserve {texts.context_length} positions for a context, but the "
            f"text prompt has {length}. Set CONTEXT_LENGTH (the prompt_length of the method and "
            "task_classes.texts_of_tasks.context_length) to one number."
        )
    if prompt.text_classes and prompt.text_classes < texts.most_classes:
        raise ValueError(
            f"A task has {texts.most_classes} classes, but SitePrompts.text_classes is "
            f"{prompt.text_classes}. Set TEXT_CLASSES to {texts.most_classes}."
        )


def _check_lengths(prompt: SitePrompts, runs: Runs) -> None:
    """Raises ValueError if prompts of a site are shorter for some runs."""
    for site, method in prompt.parts.items():
        if method.has_variable_lengths(runs):
            shown = ", ".join(map(str, method.prompt_lengths(runs)))
            raise ValueError(
                f"The prompts of {site} have different lengths ({shown} positions), but all runs "
                "need the same. Set PRIVATE_LENGTH to one number."
            )

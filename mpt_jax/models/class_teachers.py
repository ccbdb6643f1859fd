"""Teachers of a dual encoder: frozen features of class texts, and frozen image tokens.

The class texts of a teacher never change, so their features are computed once, when a job starts.
With image tokens, the image encoder runs a second time in every step, without gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.clip.network import CLIP
from mpt_jax.core.comparison import differences
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Params
from mpt_jax.core.tree import Rules
from mpt_jax.models import class_distillation
from mpt_jax.models.class_bank import ClassBank
from mpt_jax.models.class_texts import ClassTexts, class_texts
from mpt_jax.models.model import FROZEN
from mpt_jax.prompts.base import PromptMethod
from mpt_jax.prompts.row_ops import gather_rows
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts

TEACHER = "teacher"
CLASS_FEATURES = "class_features"
_PARTS = ((TEXT, "text_classes"), (IMAGE, "image_layers"))


class ClassTeachers:
    """Mixin that gives `PromptedDualEncoder` its teachers."""

    module: CLIP
    prompt: SitePrompts
    runs: Runs
    texts: ClassTexts
    bank: ClassBank
    input_vocabulary: Any
    objective: Any
    text_chunk: int
    text_features: Callable[..., Array]
    encode_images: Callable[..., Array]
    scaled: Callable[..., Array]
    text_encoder: Callable[..., Any]

    @property
    def reads_teachers(self) -> bool:
        """Whether teachers are the prompts of artifacts."""
        distillation = self.objective.distillation
        return distillation is not None and distillation.teacher == class_distillation.ARTIFACTS

    @functools.cached_property
    def teacher_texts(self) -> ClassTexts:
        """The texts of a teacher without prompts, which fill the templates of each task.

        Raises:
            ValueError: the model has no tokenizer, or a text is too long.
        """
        if not self.texts.context_length:
            return self.texts
        if self.input_vocabulary is None:
            raise ValueError(
                "A zero-shot teacher has other class texts than this model, which has no tokenizer "
                "to make them. Bind PromptedDualEncoder.tokenizer, as gin/models/prompted_clip.gin "
                "does."
            )
        config: Any = self.module.config.text
        return class_texts(self.texts.tasks, self.input_vocabulary, config.context_length)

    # --- Parameters ------------------------------------------------------------------------------

    def teacher_shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Returns the shape and the logical axes of each parameter of the teachers."""
        config: Any = self.module.config
        shapes: dict[str, Any] = {
            CLASS_FEATURES: ((len(self.bank.row), config.joint_dim), ("classes", "joint"))
        }
        if self.reads_teachers and (method := self.prompt.parts.get(IMAGE)) is not None:
            shape = (self.runs.num_rows, method.prompt_length, config.image.emb_dim)
            shapes[IMAGE] = (shape, ("tasks", "prompt", "embed"))
        return shapes

    def check_teacher(self, method: PromptMethod) -> None:
        """Raises ValueError if prompts of a method cannot be those of this model's teachers: they
        must be at the same sites, with the same numbers of positions, classes and layers."""

        def layout(method: Any) -> dict[str, int]:
            sizes = {site: part.prompt_length for site, part in method.parts.items()}
            parts = {name: getattr(method, name, 0) for site, name in _PARTS if site in sizes}
            return {f"positions of {site or 'texts'}": n for site, n in sizes.items()} | parts

        theirs, own = layout(method), layout(self.prompt)
        if changes := differences(theirs, own, sorted({*theirs, *own})):
            raise ValueError(
                "An artifact of TEACHERS has prompts at other sites or of another size than this "
                f"job: {changes}. Set TEACHERS to artifacts of a job with the same sites, "
                "CONTEXT_LENGTH, TEXT_CLASSES, IMAGE_TOKENS and IMAGE_LAYERS."
            )

    def teacher_params(self, params: Params, prompts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Returns the parameters of the teachers.

        Args:
            params: parameters with the backbone's.
            prompts: the plain prompts [K, P, H] of all bank rows, by site; {} for teachers without
                prompts.
        """
        backbone = {name: params[name] for name in ("text_encoder", "logit_scale")}
        encode = jax.jit(self._teacher_class_features)
        made = {CLASS_FEATURES: np.asarray(encode(backbone, prompts.get(TEXT)))}
        return made | ({IMAGE: np.asarray(prompts[IMAGE])} if IMAGE in prompts else {})

    def _teacher_class_features(
        self, params: Params, contexts: Float[Array, "K P H"] | None
    ) -> Float[Array, "N U"]:
        """Returns the features of the bank's entries, with the contexts of teachers or, without
        contexts, with the templates of each task."""
        encode = self.text_encoder(params)
        if contexts is not None:
            if classes := self.prompt.text_classes:
                contexts = contexts.reshape(len(contexts), classes, -1, contexts.shape[-1])
            return self.bank.encode(encode, contexts, None, self.text_chunk)
        plain = ClassBank.of(self.teacher_texts, self.runs, prompted=False)
        features = plain.encode(encode, None, None, self.text_chunk)
        if not self.bank.prompted:
            return features
        row = self.bank.row
        return features[plain.first[row] + np.arange(len(row)) - self.bank.first[row]]

    # --- Loss ------------------------------------------------------------------------------------

    def distillation_losses(
        self,
        params: Params,
        batch: Batch,
        images: Float[Array, "B U"],
        texts: Float[Array, "N U"] | None,
        own_logits: Float[Array, "B C"],
    ) -> dict[str, Float[Array, " B"]]:
        """Returns each enabled distillation term of each example, without its coefficient.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features.
            images: the student's features of the images.
            texts: the student's features of the bank's entries; None if these depend on the image.
            own_logits: the student's logits of the classes of each example's task.
        """
        distillation, task_ids = self.objective.distillation, batch["task_ids"]
        own = self.bank.is_own(task_ids)
        teacher = jax.lax.stop_gradient(params[TEACHER])
        taught = jax.lax.stop_gradient(self._teacher_image_features(params, batch, images))
        terms: dict[str, Array] = {}
        for name in distillation.coefficients():
            if name == "hidden_image":
                terms[name] = class_distillation.image_distance(taught, images)
            elif name == "hidden_text":
                assert texts is not None
                entries = self.bank.entries(task_ids)
                terms[name] = class_distillation.text_distance(
                    teacher[CLASS_FEATURES], texts, entries, own
                )
            else:
                cosines = self.bank.own_cosines(taught, teacher[CLASS_FEATURES], batch)
                arguments = self.scaled(params, cosines), own_logits, own, distillation.temperature
                terms[name] = class_distillation.class_divergence(*arguments)
                if self.texts.has_multi_label:
                    is_multi = jnp.asarray(self.bank.is_multi_label)[task_ids]
                    binary = class_distillation.multi_label_divergence(*arguments)
                    terms[name] = jnp.where(is_multi, binary, terms[name])
        return terms

    def _teacher_image_features(
        self, params: Params, batch: Batch, images: Float[Array, "B U"]
    ) -> Float[Array, "B U"]:
        """Returns the teachers' features of a batch's images; without a prompt in the image
        encoder, these are the student's."""
        if IMAGE not in self.prompt.parts:
            return images
        tokens = None
        if IMAGE in params[TEACHER]:
            rows = gather_rows(params[TEACHER][IMAGE], batch["task_ids"])
            tokens = rows.reshape(len(rows), self.prompt.image_layers, -1, rows.shape[-1])
        return self.encode_images(params, batch, tokens)


def check_distillation(
    distillation: class_distillation.ClassDistillation, prompt: SitePrompts, labels: Rules
) -> None:
    """Raises ValueError if a model with these rules besides the method's cannot have teachers."""
    if any(label != FROZEN and not pattern.startswith("prompt/") for pattern, label in labels):
        raise ValueError(
            "Distillation computes the features of its teachers once, so the backbone cannot be "
            "trainable. Set TRAINABLE = () to freeze it, or DISTILLATION = None to train without "
            "teachers."
        )
    if prompt.reads_image and "hidden_text" in distillation.coefficients():
        raise ValueError(
            "The texts of this model depend on the image, so they have no features to compare with "
            "those of a teacher. Set class_losses.ClassDistillation.text_weight = 0.0."
        )

"""Forward pass of a dual encoder: features of images and of class texts, and their cosines."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.backbones.clip.network import CLIP
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Int, Key, Params
from mpt_jax.models import class_losses
from mpt_jax.models.class_bank import ClassBank, Encode, cosines
from mpt_jax.models.prompt_insertion import NUMBERS
from mpt_jax.prompts.base import PromptContext
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts

FEATURES = "class_features"


class ClassScores:
    """Mixin that gives `PromptedDualEncoder` its forward pass."""

    module: CLIP
    prompt: SitePrompts
    runs: Runs
    bank: ClassBank
    objective: Any
    text_chunk: int

    def logits(
        self,
        params: Params,
        batch: Batch,
        prompt_rng: Key | None = None,
        images: Float[Array, "B U"] | None = None,
        texts: Float[Array, "N U"] | None = None,
    ) -> Float[Array, "B _"]:
        """Returns the scaled cosines with the classes that compete.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features.
            prompt_rng: the random key of methods that draw prompts.
            images: the features of images, if they are known.
            texts: the features of class texts, if they are known.

        Returns:
            `own_logits` [B, C], or logits [B, N] over all entries of the bank if `softmax` is
            `'union'`; minus infinity at classes that do not compete.
        """
        if self.objective.softmax == class_losses.OWN:
            return self.own_logits(params, batch, prompt_rng, images, texts)
        key = site_key(prompt_rng)
        images = self.image_features(params, batch, key) if images is None else images
        if self.prompt.reads_image:
            number = len(self.bank.row)
            every = jnp.broadcast_to(jnp.arange(number)[None], (len(images), number))
            scores = self._cosines_of_images(params, batch, images, every, key)
        else:
            texts = self.text_features(params, batch, key) if texts is None else texts
            scores = cosines(images, texts)
        competes = self.bank.competes(batch["task_ids"])
        return jnp.where(competes, self.scaled(params, scores), -jnp.inf)

    def features(
        self, params: Params, batch: Batch, prompt_rng: Key | None = None
    ) -> tuple[Float[Array, "B U"], Float[Array, "N U"] | None]:
        """Returns the features of images and of class texts that `logits` compares; None for texts
        that depend on the image."""
        key = site_key(prompt_rng)
        images = self.image_features(params, batch, key)
        return images, None if self.prompt.reads_image else self.text_features(params, batch, key)

    def own_logits(
        self,
        params: Params,
        batch: Batch,
        prompt_rng: Key | None = None,
        images: Float[Array, "B U"] | None = None,
        texts: Float[Array, "N U"] | None = None,
    ) -> Float[Array, "B C"]:
        """Returns the scaled cosines with the classes of each example's task, in the order of their
        ids; minus infinity at classes that the task does not have. `images` and `texts` are the
        features of images and class texts, if they are known."""
        key, task_ids = site_key(prompt_rng), batch["task_ids"]
        images = self.image_features(params, batch, key) if images is None else images
        if self.prompt.reads_image:
            entries = self.bank.entries(task_ids)
            scores = self._cosines_of_images(params, batch, images, entries, key)
        else:
            texts = self.text_features(params, batch, key) if texts is None else texts
            scores = self.bank.own_cosines(images, texts, batch)
        return jnp.where(self.bank.is_own(task_ids), self.scaled(params, scores), -jnp.inf)

    def scaled(self, params: Params, scores: Float[Array, "B _"]) -> Float[Array, "B _"]:
        """Returns the logits of cosines."""
        return jnp.exp(params["logit_scale"].astype(jnp.float32)) * scores

    def _cosines_of_images(
        self,
        params: Params,
        batch: Batch,
        images: Float[Array, "B U"],
        entries: Int[Array, "B n"],
        key: Key | None,
    ) -> Float[Array, "B n"]:
        """Returns the cosine of each image with some entries of the bank, whose contexts depend on
        the image. Texts of one image are encoded at a time, and again in the backward pass."""
        given = PromptContext(key=key, numbers=batch.get(NUMBERS), image_features=images)
        contexts = self.prompt.compose_site(
            TEXT, params["prompt"], self.runs, batch["task_ids"], given
        )
        encode = self.text_encoder(params)

        @jax.checkpoint
        def one(given: tuple[Array, Array, Array]) -> Array:
            image, context, own = given
            return cosines(image[None], self.bank.encode_with(encode, context, own))[0]

        return jax.lax.map(one, (images, contexts, entries))

    def image_features(
        self, params: Params, batch: Batch, key: Key | None = None
    ) -> Float[Array, "B U"]:
        """Returns the normalized features of a batch's images, or its `image_features` if it has
        them (`training.image_cache`).

        Args:
            params: the parameters; without a prompt in the image encoder, only the backbone's.
            batch: the batch contract's features.
            key: the random key of methods that draw prompts.
        """
        if "image_features" in batch:
            if IMAGE in self.prompt.parts:
                raise ValueError(
                    "The batch has image_features, but the features of this model depend on its "
                    "image tokens. Pass the images in the feature 'image'."
                )
            return batch["image_features"]
        prompts = None
        if IMAGE in self.prompt.parts:
            given = PromptContext(key=key, numbers=batch.get(NUMBERS))
            prompts = self.prompt.compose_site(
                IMAGE, params["prompt"], self.runs, batch["task_ids"], given
            )
        return self.encode_images(params, batch, prompts)

    def encode_images(
        self, params: Params, batch: Batch, prompts: Float[Array, "B _ _ _"] | None
    ) -> Float[Array, "B U"]:
        """Returns the normalized features of a batch's images, with image tokens unless None."""
        variables = tower_variables(params, "image_encoder")
        encode = functools.partial(self.module.apply, variables, method="encode_image")
        return normalized(encode(batch["image"], prompts))

    def text_features(
        self, params: Params, batch: Batch | None = None, key: Key | None = None
    ) -> Float[Array, "N U"]:
        """Returns the normalized features of the class texts of all runs or, without a context, of
        all classes. Not for methods with `reads_image`.

        Args:
            params: the whole parameter tree.
            batch: if given, texts of runs that are not in it may be left out.
            key: the random key of methods that draw prompts.
        """
        if FEATURES in params:
            return params[FEATURES]["table"]
        prompts = None
        if TEXT in self.prompt.parts:
            rows = jnp.arange(self.runs.num_rows)
            given = PromptContext(key=key)
            prompts = self.prompt.compose_site(TEXT, params["prompt"], self.runs, rows, given)
        whole_groups = self.objective.softmax == class_losses.UNION
        encode = self.text_encoder(params)
        return self.bank.encode(encode, prompts, batch, self.text_chunk, whole_groups)

    def text_encoder(self, params: Params) -> Encode:
        """Returns the function that encodes texts, as `ClassBank.encode` takes it."""
        variables = tower_variables(params, "text_encoder")

        def encode(tokens: Array, rows: Array | None, slots: Array, eot: Array) -> Array:
            embedded: Any = self.module.apply(variables, tokens, method="embed_tokens")
            if rows is not None:
                embedded = jnp.where(slots[..., None] > 0, rows.astype(embedded.dtype), embedded)
            return normalized(self.module.apply(variables, embedded, eot, method="encode_text"))

        return encode


def site_key(prompt_rng: Key | None) -> Key | None:
    """Returns the random key of prompts at sites, if there is one."""
    return None if prompt_rng is None else jax.random.fold_in(prompt_rng, 2)


def tower_variables(params: Params, tower: str) -> dict[str, Any]:
    """Returns the variables that the module needs to run one tower, which does not read the scale
    but declares it."""
    return {"params": {tower: params[tower], "logit_scale": params.get("logit_scale", 0.0)}}


def normalized(features: Any) -> Float[Array, "... U"]:
    """Returns features divided by their norms, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

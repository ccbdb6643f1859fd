"""Bank of class texts: which texts belong to each bank row, and their features.

With a prompted context, the text of a class depends on the run, so the bank has one entry for every
pair of a run and a class of its task. Without a context, it has one entry per class, which all runs
of a task share. The entries of a run are contiguous, in the order of the class ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Bool, Float, Int
from mpt_jax.models.class_texts import ClassTexts
from mpt_jax.prompts.base import FLOAT32

Encode = Callable[[Array, Array | None, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class ClassBank:
    """The N entries of the bank.

    Attributes:
        texts: the texts of all classes.
        prompted: whether entries are pairs of a run and a class.
        row: int32 [N], the bank row of each entry; arbitrary among the runs of a task if entries
            are shared.
        class_number: int32 [N], the class of each entry, numbered over all tasks.
        first: int32 [K], the first entry of each bank row.
        count: int32 [K], the number of its entries.
        group_of_row: int32 [K], the group of each bank row.
        is_multi_label: bool [K], whether the task of each bank row is multi-label.
    """

    texts: ClassTexts
    prompted: bool
    row: np.ndarray
    class_number: np.ndarray
    first: np.ndarray
    count: np.ndarray
    group_of_row: np.ndarray
    is_multi_label: np.ndarray

    @classmethod
    def of(cls, texts: ClassTexts, runs: Runs, prompted: bool) -> ClassBank:
        """Returns the bank of a job.

        Args:
            texts: the texts of the classes of all tasks.
            runs: the bank's rows.
            prompted: whether class texts have a prompt of their run.

        Raises:
            ValueError: the task of a run has no classes.
        """
        starts = [texts.first_class(task) for task in runs.task_names]
        tasks = [texts.of_task(task) for task in runs.task_names]
        counts = np.array([len(task.names) for task in tasks], np.int32)
        first = np.cumsum([0, *counts[:-1]]) if prompted else np.array(starts)
        numbers = [np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
        row = np.repeat(np.arange(runs.num_rows), counts)
        if not prompted:
            row = np.zeros(texts.num_classes, np.int64)
            for number, entries in enumerate(numbers):
                row[entries] = number
        number = np.concatenate(numbers) if prompted else np.arange(texts.num_classes)
        return cls(
            texts,
            prompted,
            row.astype(np.int32),
            number.astype(np.int32),
            first.astype(np.int32),
            counts,
            np.asarray(runs.group_of_row, np.int32),
            np.array([task.multi_label for task in tasks]),
        )

    # --- Features --------------------------------------------------------------------------------

    def encode(
        self,
        encode: Encode,
        prompts: Array | None,
        batch: Batch | None,
        chunk: int,
        whole_groups: bool = False,
    ) -> Float[Array, "N U"]:
        """Returns the feature of every entry.

        Args:
            encode: `(tokens [n,T], prompt rows [n,T,H] or None, slots [n,T], eot [n]) -> features
                [n,U]`, normalized.
            prompts: the contexts [K,P,H] of the runs, or [K,C,P,H] of their classes; None without.
            batch: if given, entries of runs without examples in it may be left out: they are zero.
            chunk: the number of texts that are encoded at a time.
            whole_groups: whether to keep the entries of all runs in the groups of these examples.
        """
        if prompts is None:
            features = self._chunked(encode, None, np.arange(len(self.texts.tokens)), None, chunk)
            number = jnp.asarray(self.texts.class_of_text)
            mean = jax.ops.segment_sum(features, number, self.texts.num_classes)
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
        present = None
        if batch is not None and len(self.row) > chunk:
            weights = batch["loss_weights"] > 0
            present = jnp.zeros(len(self.first), bool).at[batch["task_ids"]].max(weights)
            if whole_groups:
                group = jnp.asarray(self.group_of_row)
                present = jax.ops.segment_max(present, group, self.group_of_row.max() + 1)[group]
        return self._chunked(encode, prompts, self.class_number, present, chunk)

    def encode_with(
        self, encode: Encode, prompt: Float[Array, "P H"], entries: Int[Array, " n"]
    ) -> Float[Array, "n U"]:
        """Returns the features of some entries of a prompted bank, all with the same context."""
        texts = jnp.asarray(self.class_number)[entries]
        marks = jnp.asarray(self.texts.slots)[texts]
        tokens, eot = jnp.asarray(self.texts.tokens)[texts], jnp.asarray(self.texts.eot)[texts]
        return encode(tokens, prompt[jnp.maximum(marks - 1, 0)], marks, eot)

    def _chunked(
        self,
        encode: Encode,
        prompts: Array | None,
        texts: np.ndarray,
        present: Bool[Array, " K"] | None,
        chunk: int,
    ) -> Array:
        """Returns the features of texts, a chunk at a time."""
        tokens, slots, eot = self.texts.tokens, self.texts.slots, self.texts.eot

        def of(entries: Array, texts: Array) -> Array:
            marks = jnp.asarray(slots)[texts]
            rows = None
            if prompts is not None:
                row = jnp.asarray(self.row)[entries]
                of_class = (entries - jnp.asarray(self.first)[row],) if prompts.ndim == 4 else ()
                own = prompts[(row, *of_class)]
                rows = jnp.take_along_axis(own, jnp.maximum(marks - 1, 0)[..., None], axis=1)
            return encode(jnp.asarray(tokens)[texts], rows, marks, jnp.asarray(eot)[texts])

        number = len(texts)
        if number <= chunk:
            return of(jnp.arange(number), jnp.asarray(texts))
        chunks = -(-number // chunk)
        padded = np.resize(np.arange(number), chunks * chunk).reshape(chunks, chunk)

        # Around the condition: inside it, the loop would save the encoder's weights for each chunk.
        @jax.checkpoint
        def one(entries: Array) -> Array:
            numbers = jnp.asarray(texts)[entries]
            if present is None:
                return of(entries, numbers)
            like = jax.eval_shape(of, entries, numbers)
            needed = present[jnp.asarray(self.row)[entries]].any()
            nothing = lambda *_: jnp.zeros(like.shape, like.dtype)  # noqa: E731
            return jax.lax.cond(needed, of, nothing, entries, numbers)

        features = jax.lax.map(one, jnp.asarray(padded))
        return features.reshape(chunks * chunk, -1)[:number]

    # --- Classes of examples ---------------------------------------------------------------------

    def is_own(self, task_ids: Int[Array, " B"]) -> Bool[Array, "B C"]:
        """Returns whether class c exists in the task of each example."""
        count = jnp.asarray(self.count)[task_ids]
        return jnp.arange(self.texts.most_classes)[None] < count[:, None]

    def competes(self, task_ids: Int[Array, " B"]) -> Bool[Array, "B N"]:
        """Returns whether each entry is of a run in the example's group."""
        members = np.zeros((self.group_of_row.max() + 1, len(self.row)), bool)
        for group, first, count in zip(self.group_of_row, self.first, self.count, strict=True):
            members[group, first : first + count] = True
        return jnp.asarray(members)[jnp.asarray(self.group_of_row)[task_ids]]

    def own_entries(self, values: Float[Array, "B N"], task_ids: Int[Array, " B"]) -> Array:
        """Returns the values [B, C] of the classes of each example's task; arbitrary at classes
        that do not exist."""
        return jnp.take_along_axis(values, self.entries(task_ids), axis=1)

    def own_cosines(
        self, images: Float[Array, "B U"], texts: Float[Array, "N U"], batch: Batch
    ) -> Float[Array, "B C"]:
        """Returns the cosine of each image with each class of its task; arbitrary at classes that
        do not exist.

        The product with all entries is faster unless the bank has many more than one task has.
        """
        if len(texts) <= 4 * self.texts.most_classes:
            return self.own_entries(cosines(images, texts), batch["task_ids"])
        entries = self.entries(batch["task_ids"])
        images, bad_images = _finite(images)
        texts, bad_texts = _finite(texts)
        product = jnp.einsum("bu,bcu->bc", images, texts[entries], precision=FLOAT32)
        return jnp.where(bad_images[:, None] | bad_texts[entries], jnp.nan, product)

    def entries(self, task_ids: Int[Array, " B"]) -> Int[Array, "B C"]:
        """Returns the entry of each class of each example's task."""
        first = jnp.asarray(self.first)[task_ids][:, None]
        return jnp.minimum(first + jnp.arange(self.texts.most_classes)[None], len(self.row) - 1)


def cosines(images: Float[Array, "B U"], texts: Float[Array, "N U"]) -> Float[Array, "B N"]:
    """Returns the product of normalized features, in float32 on every device: logits are a hundred
    times as large.

    Features of a failed run are NaN. The gradient of a plain product would have zero times NaN at
    the features of all other runs.
    """
    images, bad_images = _finite(images)
    texts, bad_texts = _finite(texts)
    product = jnp.matmul(images, texts.T, precision=FLOAT32)
    return jnp.where(bad_images[:, None] | bad_texts[None], jnp.nan, product)


def _finite(features: Float[Array, "n U"]) -> tuple[Float[Array, "n U"], Bool[Array, " n"]]:
    """Returns features with zeros in place of those that are not finite, and which these are."""
    bad = ~jnp.isfinite(features).all(-1)
    return jnp.where(bad[:, None], 0.0, features), bad

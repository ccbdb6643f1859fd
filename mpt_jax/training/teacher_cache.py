"""Host-memory cache of teacher outputs, reused when an example is seen again.

Teachers and backbone are frozen and teachers have no dropout, so the teacher outputs of an example
are the same in every epoch. A separate program computes them once. They are passed to the training
step as batch features, so the step needs no forward pass of the teachers.

The key of an example is a digest of its row in the batch, padding included. An example padded to
several lengths therefore has several entries, because its outputs differ by rounding. Only the
positions that an example uses are stored; no loss term reads the others.

The results of a step do not depend on the content of the cache: a job that resumes with an empty
cache gets bit-identical results. To ensure this, every step reads outputs in the storage dtype,
including those that were just computed, and teachers always run on the same number of rows. That
number affects rounding, but a row's position and the other rows do not (observed with XLA on CPUs,
for the size of T5-small).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.batching import bucketing
from mpt_jax.batching.collate import Batch
from mpt_jax.core.batch import TEACHER_FEATURES
from mpt_jax.core.shapes import Array, Params
from mpt_jax.core.tree import flatten
from mpt_jax.models import losses
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.models.model import Model
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState

DTYPES = ("bfloat16", "float32")
_REMOVE = "drop --gin_file=gin/runs/teacher_cache.gin, or set trainer.Trainer.teacher_cache to None"
Row = dict[str, np.ndarray]  # one example's features, without padding


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """Settings of the teacher cache.

    Attributes:
        max_bytes: the host memory that teacher outputs may take, in bytes. The index takes about
            another kilobyte per example. Once an example does not fit, no more are added.
            `needed_bytes` computes the bytes that a number of examples needs.
        dtype: the storage dtype. `'bfloat16'` is exact for the hidden states of a backbone that
            computes in bfloat16. It rounds the difference between a logit and the largest logit,
            with a relative error of up to 1/256.

    Raises:
        ValueError: `dtype` is not supported, or `max_bytes` is not positive.
    """

    max_bytes: int
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(
                f"TeacherCache.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}. "
                "Correct TEACHER_CACHE_DTYPE."
            )
        if self.max_bytes <= 0:
            raise ValueError(
                f"TeacherCache.max_bytes must be positive, got {self.max_bytes}. Set "
                "TEACHER_CACHE_BYTES to the bytes of host memory that teacher outputs may take, or "
                f"remove the cache ({_REMOVE})."
            )

    def open(
        self,
        model: Model,
        state: TrainState,
        partitioner: PjitPartitioner,
        num_microbatches: int = 1,
        rows_by_run: bool = False,
    ) -> OpenCache:
        """Returns an empty cache for one trainer. The arguments are those of `Trainer`.

        Raises:
            ValueError: the objective does not read teacher outputs, teacher outputs change during
                training, or this kind of job is not supported.
        """
        if reason := _unsupported(model, state, rows_by_run):
            raise ValueError(
                f"This job cannot use a teacher cache: {reason} To train without one, {_REMOVE}."
            )
        assert isinstance(model, PromptedEncoderDecoder)
        return OpenCache(self, model, partitioner, num_microbatches)


def _unsupported(model: Model, state: TrainState, rows_by_run: bool) -> str | None:
    """Returns why a job cannot use a cache, with a remedy if there is one; None if it can."""
    distil = model.objective.distillation
    if not isinstance(model, PromptedEncoderDecoder):
        return "it stores what teachers compute from texts, and the examples are images."
    if distil is None:
        return "the objective has no distillation, so it runs no teachers."
    if distil.prompt_distance:
        return "prompt_distance compares prompts, so there is no teacher forward pass to save."
    others = [name for name in flatten(state.trainable) if not name.startswith("prompt/")]
    if others:
        return (
            f"{others[0]} is trainable, and teachers share the backbone, so their outputs change "
            "with every step."
        )
    if rows_by_run:
        return (
            "batches of independent runs become smaller when runs finish, and outputs computed in "
            "a batch of another size differ by rounding. A job with a single group can use a cache."
        )
    if jax.process_count() > 1:
        return (
            f"this job has {jax.process_count()} processes, but the cache supports only one. Run "
            "the job in one process to use a cache."
        )
    return None


# --- Memory --------------------------------------------------------------------------------------


def position_bytes(model: PromptedEncoderDecoder, dtype: str) -> dict[str, int]:
    """Returns the bytes stored for each used position, for the keys `encoder` and `decoder`.

    A position stores H values for each compared hidden state. A decoder position also stores V
    logits. Disabled loss terms store nothing.
    """
    config, distil = model.backbone_config, model.objective.distillation
    assert distil is not None
    encoder, decoder = (n * config.emb_dim if distil.hidden else 0 for n in model.states_compared)
    decoder += config.vocab_size if distil.logits else 0
    size = jnp.dtype(dtype).itemsize
    return {"encoder": size * encoder, "decoder": size * decoder}


def needed_bytes(
    model: PromptedEncoderDecoder,
    dtype: str,
    examples: int,
    encoder_positions: int | float,
    decoder_positions: int | float,
) -> int:
    """Returns the `max_bytes` that a cache needs to hold a number of examples.

    Args:
        model: the model; only its configuration and objective are read, not its parameters.
        dtype: the storage dtype.
        examples: the number of examples; an example counts once for each length it is padded to.
        encoder_positions: the average number of used encoder positions per example, including the
            prompt.
        decoder_positions: the average number of used decoder positions per example.
    """
    size = position_bytes(model, dtype)
    per_example = encoder_positions * size["encoder"] + decoder_positions * size["decoder"]
    return math.ceil(examples * per_example)


# --- The cache -----------------------------------------------------------------------------------


class OpenCache:
    """The cache of one trainer.

    Args:
        settings: the memory limit and the storage dtype.
        model: the model that computes the teacher outputs.
        partitioner: the mesh on which teachers run.
        num_microbatches: the number of microbatches of a training step. A forward pass of the
            teachers has as many rows as one microbatch.

    Attributes:
        held_bytes: the size of the stored outputs in bytes.
    """

    def __init__(
        self,
        settings: TeacherCache,
        model: PromptedEncoderDecoder,
        partitioner: PjitPartitioner,
        num_microbatches: int,
    ):
        self.held_bytes = 0
        self._settings, self._partitioner, self._parts = settings, partitioner, num_microbatches
        self._position_bytes = position_bytes(model, settings.dtype)
        self._teach = jax.jit(functools.partial(_teach, model, settings.dtype))
        self._held: dict[bytes, Row] = {}
        self._rows = self._hits = 0  # over all steps
        self._last_rows = self._last_hits = 0  # when metrics were last read
        self._full = False

    def __len__(self) -> int:
        """Returns the number of stored examples."""
        return len(self._held)

    def add(self, frozen: Params, batch: Mapping[str, np.ndarray]) -> Batch:
        """Returns a batch with the teacher outputs added. Call it inside `partitioner.activate()`.

        Waits for the devices if the outputs of a row are not stored yet.

        Args:
            frozen: the frozen parameters, including teachers and backbone.
            batch: a whole batch, not packed.

        Raises:
            ValueError: the batch is packed.
        """
        _check_not_packed(batch)
        keys, used = _digests(batch), _used_positions(batch)
        if not self._rows:
            self._announce(used)
        self._rows += len(keys)
        self._hits += sum(key in self._held for key in keys)
        missing = {key: row for row, key in enumerate(keys) if key not in self._held}
        computed = self._compute(frozen, batch, missing, used)
        for key, row in computed.items():
            self._hold(key, row)
        rows = [computed[key] if key in computed else self._held[key] for key in keys]
        return {**batch, **_padded(rows, batch)}

    def shapes(self, frozen: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Like `add`, but adds `ShapeDtypeStruct`s in place of the teacher outputs.

        Raises:
            ValueError: the batch is packed.
        """
        _check_not_packed(batch)
        sharding = self._partitioner.batch_sharding
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return {**batch, **jax.tree.map(shaped, jax.eval_shape(self._teach, frozen, batch))}

    def metrics(self) -> dict[str, float]:
        """Returns the size of the cache, and its hit rate over the steps since the last call."""
        rows, hits = self._rows - self._last_rows, self._hits - self._last_hits
        self._last_rows, self._last_hits = self._rows, self._hits
        size = {
            "teacher_cache/examples": float(len(self)),
            "teacher_cache/gigabytes": self.held_bytes / 1e9,
        }
        return size | ({"teacher_cache/hit_rate": hits / rows} if rows else {})

    def _compute(
        self,
        frozen: Params,
        batch: Mapping[str, np.ndarray],
        missing: Mapping[bytes, int],
        used: Mapping[str, np.ndarray],
    ) -> dict[bytes, Row]:
        """Runs the teachers on the missing rows of a batch. Returns their outputs by digest."""
        outputs: dict[bytes, Row] = {}
        shards = math.prod(self._partitioner.mesh.devices.shape[:-1])
        rows = len(batch["encoder_input_tokens"])
        at_a_time = math.ceil(rows / self._parts / shards) * shards
        todo = list(missing.items())
        for first in range(0, len(todo), at_a_time):
            part = todo[first : first + at_a_time]
            indices = np.resize([row for _, row in part], at_a_time)  # repeats rows as padding
            inputs = {name: value[indices] for name, value in batch.items()}
            features = jax.device_get(self._teach(frozen, self._partitioner.shard_batch(inputs)))
            for index, (key, row) in enumerate(part):
                outputs[key] = {
                    name: x[index, : used[TEACHER_FEATURES[name]][row]].copy()
                    for name, x in features.items()
                }
        return outputs

    def _hold(self, key: bytes, row: Row) -> None:
        """Stores an example if there is room."""
        size = sum(value.nbytes for value in row.values())
        if self._full:
            return
        if self.held_bytes + size <= self._settings.max_bytes:
            self._held[key] = row
            self.held_bytes += size
            return
        self._full = True
        logging.warning(
            "The teacher cache is full: it holds %d examples in %.3g GB, with a hit rate of %.1f%% "
            "so far. No more are added. A step with even one uncached row runs the teachers on a "
            "full microbatch, so a partial cache may save nothing. Raise TeacherCache.max_bytes "
            "(TEACHER_CACHE_BYTES), or remove the cache.",
            len(self),
            self.held_bytes / 1e9,
            100 * self._hits / self._rows,
        )

    def _announce(self, used: Mapping[str, np.ndarray]) -> None:
        """Logs an estimate of how many examples fit, based on the first batch."""
        size = self._position_bytes
        mean = sum(size[side] * lengths.mean() for side, lengths in used.items())
        logging.info(
            "Teacher cache: an example of the first batch takes %.3g MB on average in %s, so "
            "%.3g GB hold about %d examples.",
            mean / 1e6,
            self._settings.dtype,
            self._settings.max_bytes / 1e9,
            self._settings.max_bytes // max(mean, 1),
        )


def _teach(
    model: PromptedEncoderDecoder, dtype: str, frozen: Params, batch: Mapping[str, Array]
) -> dict[str, Array]:
    """Returns the teacher features of a batch in the storage dtype, including padding."""
    distil = model.objective.distillation
    assert distil is not None
    teacher = model.forward(frozen, batch, None, teacher=True, hidden=distil.hidden)
    features = losses.teacher_features(distil, teacher, model.head(frozen))
    return {name: x.astype(dtype) for name, x in features.items()}


def _digests(batch: Mapping[str, np.ndarray]) -> list[bytes]:
    """Returns a digest of each row of a batch. It covers all features and their lengths."""
    names = sorted(batch)
    values = [np.ascontiguousarray(batch[name]) for name in names]
    layout = repr([(n, x.shape[1:], x.dtype.str) for n, x in zip(names, values, strict=True)])
    start = hashlib.blake2b(layout.encode(), digest_size=16)
    digests = []
    for row in range(len(values[0])):
        digest = start.copy()
        for value in values:
            digest.update(value[row].data)
        digests.append(digest.digest())
    return digests


def _used_positions(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the number of positions up to the last one that a loss reads, for each row [B], under
    the keys `encoder` and `decoder`."""
    return {
        "encoder": bucketing.encoder_lengths(batch),
        "decoder": bucketing.used(batch["decoder_loss_weights"] != 0),
    }


def _padded(rows: Sequence[Row], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the features of all rows, padded with zeros to the batch's lengths."""
    features = {}
    for name, first in rows[0].items():
        side = TEACHER_FEATURES[name]
        length = batch[f"{side}_input_tokens"].shape[1]
        features[name] = np.zeros((len(rows), length, *first.shape[1:]), first.dtype)
        for padded, row in zip(features[name], rows, strict=True):
            padded[: len(row[name])] = row[name]
    return features


def _check_not_packed(batch: Mapping[str, Any]) -> None:
    if "encoder_segment_ids" in batch:
        raise ValueError(
            "A teacher cache cannot hold packed rows, because the same examples rarely share a row "
            "again. Drop either --gin_file=gin/runs/packed.gin or "
            "--gin_file=gin/runs/teacher_cache.gin."
        )

"""What teachers say of examples that come again, kept in the memory of the host.

Teachers and backbone are frozen and teachers have no dropout, so their targets of an example are
the same in every epoch. They are computed once, by a program of their own, and reach the step as
features of its batch; then the step has no third forward pass.

An example is held under a digest of its whole row: at another padded length it is another one,
whose numbers differ by rounding. Only positions that an example uses are kept; no term reads the
others.

It makes no difference to a step what was held before it: a run that resumes with an empty cache
learns the same bits. So every step reads numbers of the storage dtype, those just computed as well,
and teachers always run on the same number of rows: that changes rounding, while a row's place among
them and the other rows do not (so it is with XLA on CPUs; T5-small's shape was tried).
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
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState

DTYPES = ("bfloat16", "float32")
Row = dict[str, np.ndarray]  # one example's features, without padding


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """How much is kept, and how.

    Attributes:
        max_bytes: of targets; what keeps them in order is about a kilobyte an example beside that.
            Once an example does not fit, no other is added. See `needed_bytes`.
        dtype: of what is kept. `'bfloat16'` keeps every bit of the hidden states of a backbone that
            computes in it, and rounds how far a logit lies below the largest by up to 1/256.

    Raises:
        ValueError: another dtype, or no room.
    """

    max_bytes: int
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"TeacherCache.dtype must be one of {DTYPES}, got {self.dtype!r}.")
        if self.max_bytes <= 0:
            raise ValueError(
                f"TeacherCache.max_bytes={self.max_bytes} holds nothing: give the bytes of host "
                "memory that targets may take, or leave the cache out."
            )

    def open(
        self,
        model: PromptedEncoderDecoder,
        state: TrainState,
        partitioner: PjitPartitioner,
        num_microbatches: int = 1,
        rows_by_run: bool = False,
    ) -> OpenCache:
        """An empty cache for one trainer; the arguments are the trainer's.

        Raises:
            ValueError: the objective does not read what is cached, teachers are not the same in
                every step, or this kind of job is not supported.
        """
        if wrong := _unsuited(model, state, rows_by_run):
            raise ValueError(f"A teacher cache cannot be used here: {wrong}")
        return OpenCache(self, model, partitioner, num_microbatches)


def _unsuited(model: PromptedEncoderDecoder, state: TrainState, rows_by_run: bool) -> str | None:
    """Why a job can have no cache, and what to do."""
    distil = model.objective.distillation
    if distil is None:
        return "the objective has no distillation, so no teacher is asked. Leave the cache out."
    if distil.prompt_distance:
        return (
            "prompt_distance compares prompts and needs no forward pass of teachers, which is what "
            "a cache saves. Leave the cache out."
        )
    others = [name for name in flatten(state.trainable) if not name.startswith("prompt/")]
    if others:
        return (
            f"{others[0]} learns, and teachers read the same backbone, so what they say changes "
            "with every step. Leave the cache out."
        )
    if rows_by_run:
        return (
            "batches of independent runs become smaller when runs end, and targets computed in a "
            "batch of another size differ by rounding. Leave the cache out, or train one group."
        )
    if jax.process_count() > 1:
        return (
            f"this job has {jax.process_count()} processes, and which rows to compute would have "
            "to be agreed on in every step. Leave the cache out, or run one process."
        )
    return None


# --- Memory --------------------------------------------------------------------------------------


def position_bytes(model: PromptedEncoderDecoder, dtype: str) -> dict[str, int]:
    """What one used position of each side takes, `encoder` and `decoder`: H numbers of each of the
    chosen states, and for a target position V logits as well; nothing for a term that is off."""
    config, distil = model.module.config, model.objective.distillation
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
    """The `max_bytes` that holds so many examples.

    Args:
        model: backbone and objective; no parameters are read.
        dtype: of what is kept.
        examples: how many, counted once for every padded length that they come in.
        encoder_positions: used by an example on average, prompt included.
        decoder_positions: used by an example on average.
    """
    each = position_bytes(model, dtype)
    one = encoder_positions * each["encoder"] + decoder_positions * each["decoder"]
    return math.ceil(examples * one)


# --- The cache -----------------------------------------------------------------------------------


class OpenCache:
    """The cache of one trainer.

    Args:
        settings: what may be kept.
        model: whose teachers are asked.
        partitioner: of the mesh they run on.
        num_microbatches: a forward pass of teachers has as many rows as one of the step.

    Attributes:
        held_bytes: of the targets that are held.
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
        self._rows = self._hits = 0  # of all steps
        self._last_rows = self._last_hits = 0  # by the time metrics were last read
        self._full = False

    def __len__(self) -> int:
        """How many examples are held."""
        return len(self._held)

    def add(self, frozen: Params, batch: Mapping[str, np.ndarray]) -> Batch:
        """The batch with what teachers say of it. Call it inside `partitioner.activate()`.

        Waits for the devices where a row is not held.

        Args:
            frozen: the parameters that do not learn: teachers and backbone.
            batch: a whole batch, unpacked.

        Raises:
            ValueError: the batch is packed.
        """
        _refuse_packed(batch)
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
        """`add` of shapes: the batch with `ShapeDtypeStruct`s for what would be added.

        Raises:
            ValueError: the batch is packed.
        """
        _refuse_packed(batch)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._partitioner.batch)  # noqa: E731
        return {**batch, **jax.tree.map(place, jax.eval_shape(self._teach, frozen, batch))}

    def metrics(self) -> dict[str, float]:
        """What is held, and the share of rows that were held when their steps came, of the steps
        since this was last asked."""
        rows, hits = self._rows - self._last_rows, self._hits - self._last_hits
        self._last_rows, self._last_hits = self._rows, self._hits
        found = {
            "teacher_cache/examples": float(len(self)),
            "teacher_cache/gigabytes": self.held_bytes / 1e9,
        }
        return found | ({"teacher_cache/hit_rate": hits / rows} if rows else {})

    def _compute(
        self,
        frozen: Params,
        batch: Mapping[str, np.ndarray],
        missing: Mapping[bytes, int],
        used: Mapping[str, np.ndarray],
    ) -> dict[bytes, Row]:
        """The targets of some rows of a batch, by digest, all by one program."""
        found: dict[bytes, Row] = {}
        shards = math.prod(self._partitioner.mesh.devices.shape[:-1])
        rows = len(batch["encoder_input_tokens"])
        at_a_time = math.ceil(rows / self._parts / shards) * shards
        todo = list(missing.items())
        for first in range(0, len(todo), at_a_time):
            part = todo[first : first + at_a_time]
            chosen = np.resize([row for _, row in part], at_a_time)  # some again, to fill it up
            given = {name: value[chosen] for name, value in batch.items()}
            made = jax.device_get(self._teach(frozen, self._partitioner.shard_batch(given)))
            for place, (key, row) in enumerate(part):
                found[key] = {
                    name: x[place, : used[TEACHER_FEATURES[name]][row]].copy()
                    for name, x in made.items()
                }
        return found

    def _hold(self, key: bytes, row: Row) -> None:
        """Keeps an example, if there is room."""
        size = sum(value.nbytes for value in row.values())
        if self._full:
            return
        if self.held_bytes + size <= self._settings.max_bytes:
            self._held[key] = row
            self.held_bytes += size
            return
        self._full = True
        logging.warning(
            "The teacher cache is full: it holds %d examples in %.3g GB, and %.1f%% of rows so far "
            "were in it. No more are added. Each step that has another row asks teachers about as "
            "many rows as a forward pass has, so a cache that holds only a part may save nothing: "
            "give it more bytes (TeacherCache.max_bytes), or leave it out.",
            len(self),
            self.held_bytes / 1e9,
            100 * self._hits / self._rows,
        )

    def _announce(self, used: Mapping[str, np.ndarray]) -> None:
        """Says how many examples there is room for, by those of the first batch."""
        each = self._position_bytes
        mean = sum(each[side] * lengths.mean() for side, lengths in used.items())
        logging.info(
            "Teacher cache: an example of the first batch takes %.3g MB on average in %s, so that "
            "%.3g GB hold about %d of them.",
            mean / 1e6,
            self._settings.dtype,
            self._settings.max_bytes / 1e9,
            self._settings.max_bytes // max(mean, 1),
        )


def _teach(
    model: PromptedEncoderDecoder, dtype: str, frozen: Params, batch: Mapping[str, Array]
) -> dict[str, Array]:
    """What is kept of a batch, with its padding."""
    distil = model.objective.distillation
    assert distil is not None
    teacher = model.forward(frozen, batch, None, teacher=True, hidden=distil.hidden)
    features = losses.teacher_features(distil, teacher)
    return {name: x.astype(dtype) for name, x in features.items()}


def _digests(batch: Mapping[str, np.ndarray]) -> list[bytes]:
    """A digest of each row, all features and their lengths included."""
    names = sorted(batch)
    values = [np.ascontiguousarray(batch[name]) for name in names]
    layout = repr([(n, x.shape[1:], x.dtype.str) for n, x in zip(names, values, strict=True)])
    start = hashlib.blake2b(layout.encode(), digest_size=16)
    found = []
    for row in range(len(values[0])):
        digest = start.copy()
        for value in values:
            digest.update(value[row].data)
        found.append(digest.digest())
    return found


def _used_positions(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How many positions [B] each row has up to the last that a loss reads, by side."""
    return {
        "encoder": bucketing.encoder_lengths(batch),
        "decoder": bucketing.used(batch["decoder_loss_weights"] != 0),
    }


def _padded(rows: Sequence[Row], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The features of all rows, as long as the batch's; zeros at padding."""
    found = {}
    for name, first in rows[0].items():
        side = TEACHER_FEATURES[name]
        length = batch[f"{side}_input_tokens"].shape[1]
        found[name] = np.zeros((len(rows), length, *first.shape[1:]), first.dtype)
        for filled, row in zip(found[name], rows, strict=True):
            filled[: len(row[name])] = row[name]
    return found


def _refuse_packed(batch: Mapping[str, Any]) -> None:
    if "encoder_segment_ids" in batch:
        raise ValueError(
            "A teacher cache cannot hold packed rows: the examples that share one hardly ever come "
            "together again. Leave gin/runs/packed.gin out, or the cache."
        )

"""Length buckets: batches trimmed to one of a few lengths.

An unpacked row has as many positions as the longest possible example needs. Trailing positions that
no row of a batch uses can be removed without changing the result. Batches are trimmed to one of a
few lengths, because each length needs its own compiled program. Grouping rows of similar length
removes more padding. Packing, whose rows all have one length, is the other way to avoid padding.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mpt_jax.batching.collate import Batch
from mpt_jax.core.batch import num_rows

# Number of batches whose examples are sorted together: enough for batches of similar lengths, while
# a saved data position holds only 512 examples of a few hundred bytes each at B = 32.
WINDOW = 16
# The stream of random numbers that shuffle the batches of a window.
STREAM = zlib.crc32(b"mpt_jax.data.windows") & 0x7FFFFFFF
# Batches with smaller limits are not trimmed by default: more programs would cost more than they
# save. The limit of targets is low, because few reach it and each position has logits of the whole
# vocabulary.
WORTH_CUTTING = {"inputs": 128, "targets": 16}
SHORTEST_TARGETS = 8


@dataclasses.dataclass(frozen=True)
class LengthBuckets:
    """The lengths that batches are trimmed to.

    Attributes:
        encoder: the lengths of the encoder, prompt slots included; the last is the full length.
        decoder: the lengths of the decoder; the last is the full length.

    Raises:
        ValueError: a side has no lengths, or they are not all positive or not strictly increasing.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    def __post_init__(self):
        for side, lengths in (("encoder", self.encoder), ("decoder", self.decoder)):
            if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
                raise ValueError(
                    f"The {side} lengths of the length buckets must be one or more positive, "
                    f"strictly increasing numbers, got {lengths}. Correct "
                    "DatasetConfig.length_buckets."
                )

    def trim(self, batch: Mapping[str, np.ndarray], targets: bool = True) -> Batch:
        """Returns a batch trimmed to the shortest of these lengths that hold all its rows.

        Args:
            batch: the unpacked batch, at full length.
            targets: whether to trim targets as well; decoding may need all target positions.
        """
        encoder = smallest(self.encoder, int(encoder_lengths(batch).max(initial=0)))
        decoder = self.decoder[-1]
        if targets:
            needed = used(batch["decoder_target_tokens"] != 0).max(initial=0)
            decoder = smallest(self.decoder, int(needed))
        lengths = {"encoder": encoder, "decoder": decoder}
        return {name: value[:, : lengths[name.split("_")[0]]] for name, value in batch.items()}


def of_settings(
    settings: Mapping[str, Sequence[int]] | None,
    prompt_length: int,
    limits: Mapping[str, int],
) -> LengthBuckets:
    """Returns the buckets that a `DatasetConfig` requests.

    Args:
        settings: {'inputs': [...], 'targets': [...]} in tokens of text; either may be left out.
            The limit is always added as the last bucket.
        prompt_length: the prompt length P, which is added to the lengths of inputs.
        limits: the maximum number of tokens of each feature, `task_feature_lengths`.

    Raises:
        ValueError: a feature is unknown, or its lengths are not strictly increasing or not all
            below the limit.
    """
    settings = settings or {}
    if unknown := sorted(set(settings) - {"inputs", "targets"}):
        raise ValueError(
            f"DatasetConfig.length_buckets has unknown features: {', '.join(map(repr, unknown))}. "
            "Use only 'inputs' and 'targets'."
        )
    for name, lengths in settings.items():
        if list(lengths) != sorted(set(lengths)) or any(n >= limits[name] for n in lengths):
            raise ValueError(
                f"length_buckets[{name!r}] must increase and stay below the limit of "
                f"{limits[name]} tokens (task_feature_lengths), got {list(lengths)}. Correct the "
                "list; the limit itself is added automatically."
            )
    inputs = (*settings.get("inputs", ()), limits["inputs"])
    targets = (*settings.get("targets", ()), limits["targets"])
    return LengthBuckets(tuple(prompt_length + n for n in inputs), tuple(targets))


def automatic(limits: Mapping[str, int]) -> dict[str, list[int]]:
    """Returns the default buckets for given `task_feature_lengths`.

    Inputs get 1/4, 1/2 and 3/4 of their limit. Targets get 1/2, 1/4, 1/8, ... of their limit, but
    at least 8 tokens. A feature whose limit is below `WORTH_CUTTING` gets no buckets.
    """
    buckets: dict[str, list[int]] = {}
    if (limit := limits["inputs"]) >= WORTH_CUTTING["inputs"]:
        buckets["inputs"] = [limit // 4, limit // 2, 3 * limit // 4]
    if (length := limits["targets"]) >= WORTH_CUTTING["targets"]:
        buckets["targets"] = []
        while (length := length // 2) >= SHORTEST_TARGETS:
            buckets["targets"].insert(0, length)
    return buckets


def encoder_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the number of encoder positions that each row of an unpacked batch uses, as [B]."""
    return used((batch["encoder_input_tokens"] != 0) | (batch["encoder_prompt_slots"] != 0))


def sorted_batches(
    lengths: np.ndarray, batch_size: int, window: int = WINDOW
) -> Iterator[np.ndarray]:
    """Yields the row indices of each batch, sorting the rows of `window` batches by length.

    Args:
        lengths: the lengths of all rows, [n].
        batch_size: the number of rows of a batch; the last batch may have fewer.
        window: the number of batches that are sorted together.
    """
    for first in range(0, len(lengths), window * batch_size):
        part = lengths[first : first + window * batch_size]
        order = first + np.argsort(part, kind="stable")
        yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def batches_of(
    rows: Batch, batch_size: int, buckets: LengthBuckets | None, targets: bool = True
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Splits rows into batches.

    With buckets, the rows of `WINDOW` batches at a time are sorted by length, and batches are
    trimmed. Without buckets, rows keep their order.

    Args:
        rows: the unpacked rows, at full length if there are buckets.
        batch_size: the number of rows of a batch; the last batch may have fewer.
        buckets: the lengths that batches are trimmed to; None disables sorting and trimming.
        targets: see `LengthBuckets.trim`.

    Yields:
        The indices of a batch's rows, and the batch.
    """
    if buckets is None:
        order = np.arange(num_rows(rows))
        chunks = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    else:
        chunks = sorted_batches(encoder_lengths(rows), batch_size)
    for indices in chunks:
        batch = {name: value[indices] for name, value in rows.items()}
        yield indices, buckets.trim(batch, targets) if buckets else batch


def used(real: np.ndarray) -> np.ndarray:
    """Returns the length of each row of `real` [B, n] up to its last true position, as [B]."""
    return np.where(real.any(axis=1), real.shape[1] - real[:, ::-1].argmax(axis=1), 0)


def smallest(sizes: Sequence[int], needed: int) -> int:
    """Returns the first of increasing sizes that is at least `needed`."""
    return next(size for size in sizes if size >= needed)

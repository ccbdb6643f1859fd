"""Batches cut to few lengths.

An unpacked row has as many positions as the longest example may need. The last of them that no row
of a batch uses can be cut off, so that nothing changes but the work. Lengths are cut to one of a
few, because each makes a program of its own. Where rows of like length are put together, more is
cut off. A packed batch has rows of one length: that is the other way to leave padding out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mpt_jax.batching.collate import Batch

# Batches whose examples are sorted together: many enough for like lengths, and 512 examples of a
# few hundred bytes at B = 32, which is what a saved data position has to hold.
WINDOW = 16
# Below these limits batches are not cut unless asked for: programs would cost more. Targets are
# rarely as long as their limit, and every position of theirs has logits of the whole vocabulary.
WORTH_CUTTING = {"inputs": 128, "targets": 16}
SHORTEST_TARGETS = 8


@dataclasses.dataclass(frozen=True)
class LengthBuckets:
    """The lengths that batches are cut to.

    Attributes:
        encoder: numbers of encoder positions, prompts included; the last is the full length.
        decoder: numbers of target positions, the same.

    Raises:
        ValueError: lengths do not increase.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    def __post_init__(self):
        for lengths in (self.encoder, self.decoder):
            if list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
                raise ValueError(f"Lengths of buckets must be positive and increase: {lengths}.")

    def cut(self, batch: Mapping[str, np.ndarray], targets: bool = True) -> Batch:
        """The batch without the last positions of all rows, as far as none of them uses those.

        Args:
            batch: an unpacked batch of full length.
            targets: whether to cut targets as well; decoding may need all of their positions.
        """
        encoder = smallest(self.encoder, int(encoder_lengths(batch).max(initial=0)))
        decoder = self.decoder[-1]
        if targets:
            needed = used(batch["decoder_target_tokens"] != 0).max(initial=0)
            decoder = smallest(self.decoder, int(needed))
        to = {"encoder": encoder, "decoder": decoder}
        return {name: value[:, : to[name.split("_")[0]]] for name, value in batch.items()}


def of_settings(
    settings: Mapping[str, Sequence[int]] | None,
    prompt_length: int,
    limits: Mapping[str, int],
) -> LengthBuckets:
    """The buckets that a `DatasetConfig` asks for.

    Args:
        settings: {'inputs': [...], 'targets': [...]} tokens of text, either may be left out; the
            limit itself is always the last.
        prompt_length: P.
        limits: `task_feature_lengths`.

    Raises:
        ValueError: another name, or a length that is not below the limit.
    """
    settings = settings or {}
    if unknown := sorted(set(settings) - {"inputs", "targets"}):
        raise ValueError(f"length_buckets are of inputs and targets, got {unknown}.")
    for name, lengths in settings.items():
        if list(lengths) != sorted(set(lengths)) or any(n >= limits[name] for n in lengths):
            raise ValueError(
                f"length_buckets[{name!r}] must increase and stay below the limit of "
                f"{limits[name]} tokens (task_feature_lengths), got {list(lengths)}."
            )
    inputs = (*settings.get("inputs", ()), limits["inputs"])
    targets = (*settings.get("targets", ()), limits["targets"])
    return LengthBuckets(tuple(prompt_length + n for n in inputs), tuple(targets))


def automatic(limits: Mapping[str, int]) -> dict[str, list[int]]:
    """The buckets of a configuration that names none: quarters of the limit on inputs, and halvings
    of the limit on targets down to 8; none where a limit is small."""
    found: dict[str, list[int]] = {}
    if (limit := limits["inputs"]) >= WORTH_CUTTING["inputs"]:
        found["inputs"] = [limit // 4, limit // 2, 3 * limit // 4]
    if (length := limits["targets"]) >= WORTH_CUTTING["targets"]:
        found["targets"] = []
        while (length := length // 2) >= SHORTEST_TARGETS:
            found["targets"].insert(0, length)
    return found


def encoder_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The encoder positions [B] that each row of an unpacked batch uses."""
    return used((batch["encoder_input_tokens"] != 0) | (batch["encoder_prompt_slots"] != 0))


def sorted_batches(
    lengths: np.ndarray, batch_size: int, window: int = WINDOW
) -> Iterator[np.ndarray]:
    """The rows of each batch when the rows of `window` batches at a time are sorted by length.

    Args:
        lengths: [n] of all rows.
        batch_size: rows of a batch; the last may have fewer.
        window: batches.
    """
    for first in range(0, len(lengths), window * batch_size):
        part = lengths[first : first + window * batch_size]
        order = first + np.argsort(part, kind="stable")
        yield from (order[at : at + batch_size] for at in range(0, len(order), batch_size))


def batches_of(
    rows: Batch, batch_size: int, buckets: LengthBuckets | None, targets: bool = True
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The batches of some rows that are at hand: sorted by length and cut, or in their own order
    where there are no buckets.

    Args:
        rows: unpacked, of full length where there are buckets.
        batch_size: rows of a batch; the last may have fewer.
        buckets: the lengths that batches are cut to.
        targets: see `LengthBuckets.cut`.

    Yields:
        The numbers of a batch's rows, and the batch.
    """
    if buckets is None:
        numbers = np.arange(len(rows["encoder_input_tokens"]))
        chunks = (numbers[at : at + batch_size] for at in range(0, len(numbers), batch_size))
    else:
        chunks = sorted_batches(encoder_lengths(rows), batch_size)
    for chosen in chunks:
        batch = {name: value[chosen] for name, value in rows.items()}
        yield chosen, buckets.cut(batch, targets) if buckets else batch


def used(real: np.ndarray) -> np.ndarray:
    """One more than the last true position of each row [B, n]; 0 where there is none. [B]."""
    return np.where(real.any(axis=1), real.shape[1] - real[:, ::-1].argmax(axis=1), 0)


def smallest(sizes: Sequence[int], needed: int) -> int:
    """The first of increasing sizes that is at least `needed`."""
    return next(size for size in sizes if size >= needed)

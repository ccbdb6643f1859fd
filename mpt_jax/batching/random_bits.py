"""Random numbers that are a function of a seed, a stream and a number, drawn for many at once.

They are those of TensorFlow's stateless random operations with Philox 4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3") for the seed `[seed << 32 | stream, number]`, so that
batches do not depend on which library draws them.
"""

from __future__ import annotations

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Multipliers and key increments of Philox 4x32.
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_INCREMENTS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10
# TensorFlow's key for turning a seed into a key and a counter.
_SEED_KEY = np.array([0x3EC8F720, 0x02461E29], np.uint64)


def uniform(seed: int, stream: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` float64 values from [0, 1) for each of `numbers`."""
    words = _words(seed, stream, numbers, 2 * count)
    # 52 random bits are the fraction of a number from [1, 2).
    fraction = (words[:, ::2] & np.uint64(0xFFFFF)) << _HALF | words[:, 1::2]
    return (fraction | np.uint64(1023 << 52)).view(np.float64) - 1


def uniform32(seed: int, stream: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` float32 values from [0, 1) for each of `numbers`."""
    words = _words(seed, stream, numbers, count).astype(np.uint32)
    return (words & np.uint32(0x7FFFFF) | np.uint32(127 << 23)).view(np.float32) - np.float32(1)


def permutations(seed: int, stream: int, numbers: np.ndarray, size: int) -> np.ndarray:
    """Returns a random permutation of 0 .. size - 1 for each of `numbers`."""
    words = _words(seed, stream, numbers, 2 * size)
    bits = (words[:, 1::2] << _HALF | words[:, ::2]).view(np.int64)
    return np.argsort(bits, axis=1, kind="stable")


def _words(seed: int, stream: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` random 32-bit words for each of `numbers`, as uint64."""
    numbers = np.asarray(numbers, np.uint64)
    given = np.empty((4, len(numbers), 1), np.uint64)
    given[0], given[1] = stream, seed
    given[2], given[3] = (numbers & _MASK)[:, None], (numbers >> _HALF)[:, None]
    mixed = _philox(given, _SEED_KEY[:, None, None])
    blocks = -(-count // 4)
    counter = np.zeros((4, len(numbers), blocks), np.uint64)
    counter[0] = np.arange(blocks)
    counter[2:] = mixed[2:]
    words = _philox(counter, mixed[:2])
    return words.transpose(1, 2, 0).reshape(len(numbers), 4 * blocks)[:, :count]


def _philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns the random words of each counter. All words are 32 bits in uint64."""
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (second >> _HALF) ^ b ^ left, second & _MASK
        c, d = (first >> _HALF) ^ d ^ right, first & _MASK
        left, right = (left + _INCREMENTS[0]) & _MASK, (right + _INCREMENTS[1]) & _MASK
    return np.stack(np.broadcast_arrays(a, b, c, d))

"""Mutations of files for `benchmarks.fuzz`: of bytes, of JSON, and of headers that hold JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgpack

DEEP = 100_000
VALUES: tuple[Any, ...] = (
    None,
    True,
    "",
    "text",
    "../../outside",
    "\ud800",
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": 0},
)


def mutate(content: bytes, rng: random.Random, name: str) -> bytes:
    """Returns the content of a file with one mutation, of its values if it holds JSON or msgpack
    and otherwise, or every second time, of its bytes."""
    if rng.random() < 0.5:
        for structured in (_json, _safetensors, _msgpack):
            changed = structured(content, rng)
            if changed is not None:
                return changed
    return rng.choice(_OF_BYTES)(content, rng)


# --- Bytes ---------------------------------------------------------------------------------------


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8, 64)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_start(content: bytes, rng: random.Random) -> bytes:
    """Flips a bit of the first bytes, where binary formats have lengths."""
    return _flip(content[:64], rng) + content[64:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 4, 100))) + content[at:]


def _large_lengths(content: bytes, rng: random.Random) -> bytes:
    """Overwrites bytes by a large length, as msgpack, safetensors and others write it."""
    at = rng.randrange(len(content) + 1)
    large = rng.choice((b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xff" * 8, b"9" * 12))
    return content[:at] + large + content[at + len(large) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at : at + 100] * 3 + content[at:]


_OF_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncate,
    _flip,
    _flip,
    _flip_start,
    _insert,
    _large_lengths,
    _repeat,
)

# --- Values --------------------------------------------------------------------------------------


def _json(content: bytes, rng: random.Random) -> bytes | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    if rng.random() < 0.05:
        return rng.choice((b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP))
    return json.dumps(changed_value(value, rng)).encode()


def _safetensors(content: bytes, rng: random.Random) -> bytes | None:
    size = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or size > len(content):
        return None
    header = _json(content[8 : 8 + size], rng)
    return (
        None if header is None else len(header).to_bytes(8, "little") + header + content[8 + size :]
    )


def _msgpack(content: bytes, rng: random.Random) -> bytes | None:
    try:
        value = msgpack.unpackb(content, strict_map_key=False)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    try:
        return msgpack.packb(changed_value(value, rng))
    except (ValueError, OverflowError, TypeError):
        return None


def changed_value(value: Any, rng: random.Random) -> Any:
    """Returns a JSON value with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, action = rng.choice(sorted(value, key=str)), rng.random()
        if action < 0.7:
            return {**value, key: changed_value(value[key], rng)}
        rest = {name: inner for name, inner in value.items() if name != key}
        if action < 0.85:
            return rest
        return {**rest, rng.choice(("", "new", f"{key}x")): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, action = rng.randrange(len(value)), rng.random()
        if action < 0.7:
            return [*value[:at], changed_value(value[at], rng), *value[at + 1 :]]
        return [*value[:at], *value[at + 1 :]] if action < 0.85 else [*value, value[at]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 10**9))
    return rng.choice(VALUES)

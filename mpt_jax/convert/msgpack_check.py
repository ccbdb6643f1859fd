"""Check of msgpack bytes before they are decoded.

A decoder allocates the lists, maps and arrays that a file declares before it reads their contents,
so a file of a few bytes could exhaust the memory. This check reads only the lengths.
"""

from __future__ import annotations

import math
from typing import NamedTuple

DEEPEST = 100  # nested maps and lists; those of a train state are below 20
MOST_DIMS = 32
# Types of flax.serialization: an array, a complex number, a scalar.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_ITEM_SIZES = {
    b"bool": 1,
    b"bfloat16": 2,
    **{f"{kind}{bits}".encode(): bits // 8 for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}".encode(): bits // 8 for bits in (16, 32, 64)},
    b"complex64": 8,
    b"complex128": 16,
}
# First byte -> (kind, bytes of the length after it, fixed length). Lengths count bytes of a value,
# or entries of a list or map.
_HEADS: dict[int, tuple[str, int, int]] = {
    0xC0: ("value", 0, 0),
    0xC2: ("value", 0, 0),
    0xC3: ("value", 0, 0),
    **{0xC4 + i: ("bytes", 2**i, 0) for i in range(3)},
    **{0xC7 + i: ("extension", 2**i, 0) for i in range(3)},
    0xCA: ("value", 0, 4),
    0xCB: ("value", 0, 8),
    **{0xCC + i: ("integer", 0, 2**i) for i in range(4)},
    **{0xD0 + i: ("integer", 0, 2**i) for i in range(4)},
    **{0xD4 + i: ("extension", 0, 2**i) for i in range(5)},
    **{0xD9 + i: ("bytes", 2**i, 0) for i in range(3)},
    **{0xDC + i: ("list", 2 ** (i + 1), 0) for i in range(2)},
    **{0xDE + i: ("map", 2 ** (i + 1), 0) for i in range(2)},
}


class _Item(NamedTuple):
    """A value: its kind, the position of its contents, and their length in bytes or entries.

    `code` is the type of an extension, otherwise 0.
    """

    kind: str
    start: int
    length: int
    code: int = 0


def check(content: bytes) -> None:
    """Checks the lengths that msgpack bytes declare.

    Raises:
        ValueError: the bytes end early or hold more than one value, declare more entries than
            there are bytes, are nested too deeply, or hold an array whose shape does not match its
            size. The message is a clause whose "it" is the file, for the end of a sentence.
    """
    at, open_entries = 0, [1]
    while open_entries:
        if not open_entries[-1]:
            open_entries.pop()
            continue
        open_entries[-1] -= 1
        item = _item(content, at)
        at = item.start
        if item.kind in ("list", "map"):
            open_entries.append(item.length * (2 if item.kind == "map" else 1))
            if len(open_entries) > DEEPEST:
                raise ValueError(f"its maps and lists are nested more than {DEEPEST} deep")
            continue
        if item.kind == "extension":
            _check_extension(content, item)
        at += item.length
    if at != len(content):
        raise ValueError(f"{len(content) - at} bytes follow its last value")


def _item(content: bytes, at: int) -> _Item:
    """Returns the value at a position. Raises ValueError if its contents exceed the bytes."""
    if at >= len(content):
        raise ValueError("it ends early")
    head, at = content[at], at + 1
    if head < 0x80 or head >= 0xE0:
        return _Item("integer", at, 0)
    if head < 0xC0:
        kind, size, length = ("map", 0, head & 15) if head < 0x90 else ("list", 0, head & 15)
        if head >= 0xA0:
            kind, length = "bytes", head & 31
    elif head in _HEADS:
        kind, size, length = _HEADS[head]
    else:
        raise ValueError(f"a value starts with the invalid byte {head:#x}")
    if size:
        length, at = int.from_bytes(content[at : at + size]), at + size
    code = 0
    if kind == "extension":
        code, at = content[at] if at < len(content) else 0, at + 1
    least = length * (2 if kind == "map" else 1)  # each entry takes at least one byte
    if at + least > len(content):
        raise ValueError(
            f"it declares {least} more bytes or entries, but only {max(len(content) - at, 0)} "
            "bytes remain"
        )
    return _Item(kind, at, length, code)


def _check_extension(content: bytes, item: _Item) -> None:
    if item.code == _COMPLEX:
        if item.length > 32:
            raise ValueError("it has a complex number of more than 32 bytes")
        return check(content[item.start : item.start + item.length])
    if item.code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it has a value of the unknown type {item.code}")
    outer = _item(content, item.start)
    shape = _item(content, outer.start)
    if (
        (outer.kind, outer.length) != ("list", 3)
        or shape.kind != "list"
        or shape.length > MOST_DIMS
    ):
        raise ValueError("it has an array that is not a list of shape, type and values")
    at, dims = shape.start, []
    for _ in range(shape.length):
        dims.append(_integer(content, at))
        at = _item(content, at).start + _item(content, at).length
    dtype = _item(content, at)
    values = _item(content, dtype.start + dtype.length)
    name = content[dtype.start : dtype.start + min(dtype.length, 32)]
    if (dtype.kind, values.kind) != ("bytes", "bytes") or name not in _ITEM_SIZES:
        raise ValueError(f"it has an array of the unknown type {name.decode(errors='replace')!r}")
    if math.prod(dims) * _ITEM_SIZES[name] != values.length:
        raise ValueError(
            f"it has an array of {name.decode()} with shape {tuple(dims)}, but {values.length} "
            "bytes of values"
        )
    if values.start + values.length != item.start + item.length:
        raise ValueError("it has an array with more bytes after its values")


def _integer(content: bytes, at: int) -> int:
    """Returns the integer at a position. Raises ValueError if it is negative or no integer."""
    item, head = _item(content, at), content[at]
    if item.kind != "integer" or head >= 0xD0:
        raise ValueError("it has an array whose shape is not a list of sizes")
    return int.from_bytes(content[item.start : item.start + item.length]) if item.length else head

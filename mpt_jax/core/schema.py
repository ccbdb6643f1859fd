"""Validation of files from outside, before any of their values is used.

A schema is a `msgspec.Struct` (or any type that msgspec converts to): types, ranges and required
fields. Fields that a schema does not name are ignored, so files of newer versions can be read; new
fields need a default, so that older files can be read. Python parses the JSON, because msgspec does
not accept NaN, which the files may contain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

Value = TypeVar("Value")

DEEPEST = 100  # levels of nested lists and objects; Python cannot serialize far deeper ones
MOST_BYTES = 2**28  # of a JSON file; Python takes up to 20 times as much memory for its values
MOST_SHOWN = 80  # characters of a value that an error shows
COPY_AGAIN = "Copy the file again from an intact copy."

Amount = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # bytes, parameters, tokens, examples
# Sizes, counts and steps: no array or job of ours exceeds 31 bits.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Names = Annotated[list[Name], msgspec.Meta(min_length=1)]

_PLACE = re.compile(r"(?P<problem>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]")
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def parse(content: bytes | str, what: str, advice: str = COPY_AGAIN) -> Any:
    """Parses JSON of bounded size and depth.

    Args:
        content: the JSON text.
        what: the file; the subject of the error's first sentence.
        advice: what the user can do; the last sentence of the error.

    Raises:
        ValueError: the content is not JSON, too large, or nested too deeply.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{what} is too large: it has {len(content):,} bytes, and the limit for JSON files is "
            f"{MOST_BYTES:,}. {advice}"
        )
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{what} cannot be read: {_too_deep()}. {advice}") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}. {advice}") from error
    try:
        check_depth(value)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}. {advice}") from error
    return value


def repeated_field(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Returns a field that occurs twice in a JSON object, or None. Called from the
    `object_pairs_hook` of `json.loads`, which would keep only the last value of such a field."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    return None


def sealed(record: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Returns a record with the digest of all its other fields in `field`. Its values are those
    that JSON reads back: tuples become lists, and keys become strings."""
    rest = {name: value for name, value in record.items() if name != field}
    rest = json.loads(json.dumps(rest))
    return {**rest, field: _digest(rest)}


def check_seal(record: Any, field: str, what: str, advice: str = COPY_AGAIN) -> None:
    """Compares a record with the digest in its field `field`. Records of earlier versions have no
    digest, and pass.

    Args:
        record: the parsed JSON value.
        field: the field that `sealed` added.
        what: the file; the subject of the error's first sentence.
        advice: what the user can do; the last sentence of the error.

    Raises:
        ValueError: a field was added, removed, moved or changed after the record was written; the
            message has both digests.
    """
    expected = record.get(field) if isinstance(record, dict) else None
    if expected is None:
        return
    rest = {name: value for name, value in record.items() if name != field}
    if (actual := _digest(rest)) != expected:
        raise ValueError(
            f"{what} was changed after it was written: the sha256 of its other fields is {actual}, "
            f"but its {field} is {short(expected)}. {advice}"
        )


def _digest(record: Mapping[str, Any]) -> str:
    # Unsorted: the first of several metrics is the main one.
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def check_depth(value: Any) -> None:
    """Raises ValueError if a JSON value is nested more than `DEEPEST` deep. Checks one level at a
    time, since recursion could overflow the stack."""
    level = [value]
    for _ in range(DEEPEST):
        within = [list(x.values()) if isinstance(x, dict) else x for x in level]
        level = [child for x in within if isinstance(x, list) for child in x]
        if not level:
            return
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"its lists and objects are nested more than {DEEPEST} deep"


def check(value: Any, kind: type[Value] | Any, what: str, advice: str = COPY_AGAIN) -> Value:
    """Converts a parsed JSON value to a schema's type.

    Args:
        value: the parsed value.
        kind: the schema: a `msgspec.Struct`, a dataclass, or an annotated type.
        what, advice: see `parse`.

    Raises:
        ValueError: the value does not have this type; the message names the place in the file, the
            value found, and what was expected.
    """
    try:
        return msgspec.convert(value, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{what} {_problem(str(error), value, kind)}. {advice}") from error


def load(content: bytes | str, kind: type[Value] | Any, what: str, advice: str = COPY_AGAIN):
    """Parses JSON and converts it to a schema's type; see `parse` and `check`."""
    return check(parse(content, what, advice), kind, what, advice)


def _problem(message: str, value: Any, kind: Any) -> str:
    """Rewrites a message of msgspec as the predicate of a sentence whose subject is the file."""
    match = _PLACE.fullmatch(message)
    assert match is not None  # every text matches
    problem, path = match["problem"], (match["path"] or "").removeprefix(".")
    if problem.startswith("Object missing required field"):
        missing = re.findall(r"`(.+)`", problem)
        if not path and isinstance(value, dict) and issubclass(kind, msgspec.Struct):
            missing = [f.encode_name for f in msgspec.structs.fields(kind) if f.required]
            missing = [name for name in missing if name not in value]
        where = f"{path} lacks" if path else "it lacks"
        return f"is incomplete: {where} {', '.join(missing)}"
    expected = re.sub(r"^Expected |, got `.*?`$", "", problem)
    expected = re.sub(
        r"`(.+?)`", lambda m: " or ".join(_type(x) for x in m[1].split(" | ")), expected
    )
    if match["key"]:
        return f"has an object{f' {path}' if path else ''} with a key that is not {expected}"
    shown = short(json.dumps(_found(value, match["path"] or "")))
    place = f"{path} = {shown}" if path else f"the value {shown}"
    if problem.startswith("Expected"):
        return f"has {place}, but {expected} was expected"
    return f"has {place}, which is invalid ({expected})"


def _type(name: str) -> str:
    return _TYPES.get(name, name)


def _found(value: Any, path: str) -> Any:
    """Returns the value at a path from a message of msgspec. If the path does not name an entry of
    an object (`[...]`), returns that object."""
    for step in _STEP.finditer(path.partition("[...]")[0]):
        try:
            value = value[step["name"] if step["name"] is not None else int(step["index"])]
        except (KeyError, IndexError, TypeError):
            break
    return value


def short(value: Any) -> str:
    """Returns a value for an error, shortened: a string that is not blank as is, others as JSON."""
    shown = value if isinstance(value, str) and value.strip() else json.dumps(value)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 3]}..."


@contextlib.contextmanager
def damage(what: str, advice: str) -> Iterator[None]:
    """Converts any error that a library raises for damaged bytes into a ValueError.

    OSError and MemoryError are not converted.

    Args:
        what: the first sentence of the error, such as `'FILE is truncated or damaged'`; the reason
            is appended to it.
        advice: what the user can do; the last sentence of the error.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {reason(error)}. {advice}") from error


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message. A KeyError's message is only the key, so the
    result is `'it has no KEY'`."""
    text = (str(error).strip().partition("\n")[0] or type(error).__name__).removesuffix(".")
    return f"it has no {text}" if isinstance(error, KeyError) else text

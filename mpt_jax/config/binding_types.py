"""Check of the values in a gin configuration against the type annotations of their parameters.

Gin accepts any value. Without this check, a string in place of a number would fail deep inside a
job, or not at all: the string 'rte' is also a sequence of three task names.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpt_jax.config import gin_check

_LISTS = (abc.Sequence, abc.Collection, abc.Iterable, list, tuple)
_TABLES = (abc.Mapping, dict)
_PLAIN = (bool, int, float, str, bytes, list, tuple, dict)
_NAMES: dict[Any, tuple[str, str]] = {  # singular and plural
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("True or False", "True or False"),
    type(None): ("None", "None"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
    dict: ("a table", "tables"),
}


class WrongType(ValueError):
    """Error for a value whose type its parameter does not accept."""


def check(entries: Sequence[str]) -> None:
    """Checks every value bound to the entry functions and to the functions that they refer to.

    Values that calls return (`@name()`), and parameters without an annotation, are not checked.

    Args:
        entries: the names of the entry functions.

    Raises:
        WrongType: a value has the wrong type; the message names the macro (or the parameter, if no
            macro sets it), the value and the expected type.
    """
    hints: dict[Callable[..., Any], Mapping[str, Any]] = {}
    for bound in gin_check.bound_values(entries):
        if bound.function not in hints:
            hints[bound.function] = _hints(bound.function)
        hint = hints[bound.function].get(bound.parameter, Any)
        if not _fits(bound.value, hint):
            raise WrongType(_message(bound, hint))


def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the annotations of a function's or class's parameters; {} if they are unknown."""
    try:
        parameters = inspect.signature(function).parameters
        is_plain = isinstance(function, type) and not dataclasses.is_dataclass(function)
        found = typing.get_type_hints(function.__init__ if is_plain else function)  # type: ignore[misc]
    except (NameError, TypeError, ValueError):  # annotations of other libraries may not resolve
        return {}
    # A default is accepted even if its annotation does not say so.
    return {
        name: typing.Optional[found[name]] if parameter.default is None else found[name]  # noqa: UP045
        for name, parameter in parameters.items()
        if name in found
    }


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value matches an annotation; True if it cannot be decided, as for other classes."""
    if hint is Any or gin_check.is_reference(value):
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(kind, type):
        return True
    if kind in _TABLES:
        return isinstance(value, dict) and (
            not parts or all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
        )
    if kind in _LISTS:
        return isinstance(value, list | tuple) and _items_fit(value, parts)
    if value is None or isinstance(value, _PLAIN):
        return not getattr(kind, "_is_protocol", False) and isinstance(value, kind)
    return True


def _items_fit(value: Sequence[Any], parts: tuple[Any, ...]) -> bool:
    if not parts or len(parts) == 1 or parts[-1] is Ellipsis:
        return all(_fits(item, parts[0] if parts else Any) for item in value)
    return len(value) == len(parts) and all(map(_fits, value, parts))


def _message(bound: gin_check.BoundValue, hint: Any) -> str:
    """Returns the error message for a value: what is wrong, and what to write instead."""
    where = f"{bound.function.__name__}.{bound.parameter}"
    name, value = bound.macro or where, bound.value
    found = _NAMES.get(type(value), (f"a {type(value).__name__}",))[0]
    found = "" if value is None or isinstance(value, bool) else f", which is {found}"
    used = f" (it sets {where})" if bound.macro else ""
    wrong = f"{name} must be {_describe(hint)}, got {value!r}{found}{used}."
    return f"{wrong} {_advice(name, value, hint)}"


def _advice(name: str, value: Any, hint: Any) -> str:
    """Returns a sentence with the value that was probably meant."""
    if isinstance(value, str):
        try:
            unquoted = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            unquoted = value
        meant = [unquoted, [value]]
    else:
        meant = [int(value)] if isinstance(value, float) and value.is_integer() else [[value]]
    for other in meant:
        if _fits(other, hint):
            return f"Write {name} = {other!r}."
    return f"Correct {name}."


def _describe(hint: Any, plural: bool = False) -> str:
    """Returns an annotation in words, in the singular or plural."""
    if hint in _NAMES:
        return _NAMES[hint][plural]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if float in parts:  # a number may be whole
            parts = tuple(part for part in parts if part is not int)
        return " or ".join(_describe(part, plural) for part in parts)
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    kind = origin or hint
    if kind is abc.Callable:
        return "functions" if plural else "a function (@name)"
    if kind in _TABLES:
        text = "tables" if plural else "a table"
        known = parts and Any not in parts
        return text + (f" {{{_describe(parts[0])}: {_describe(parts[1])}}}" if known else "")
    if kind in _LISTS:
        text = "lists" if plural else "a list"
        return f"{text} of {_describe(parts[0], True)}" if parts and parts[0] is not Any else text
    name = getattr(hint, "__name__", str(hint))
    return f"objects of {name}" if plural else f"an object of {name} (@...)"

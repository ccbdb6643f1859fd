"""Mistakes in a gin configuration, found before anything runs and worded for their author.

Gin binds whatever it can resolve. What it cannot tell is found here: a macro on the command line
that no file reads, a parameter of something nothing refers to, a misspelt name and what it was
probably meant to be. This module alone looks into gin's tables, which are not public.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

from gin import config as gin_config


class UnreadBinding(ValueError):
    """A setting that would have no effect."""


class UnboundMacro(ValueError):
    """A value that a file needs and nobody gave."""


def set_search_paths(folders: Sequence[str]) -> None:
    """Where gin looks for files, in place of what an earlier run in this process set."""
    gin_config._LOCATION_PREFIXES[:] = list(folders)


# --- Checks after parsing ------------------------------------------------------------------------


def check_macros() -> None:
    """Every macro that is referred to has a value.

    Raises:
        UnboundMacro: names all that have none.
    """
    bound = _bound_macros()
    missing = sorted(
        name for name in _referred_macros() if name not in bound or _is_required(bound[name])
    )
    if missing:
        lines = [f"{name}{_suggest(name, set(bound) - set(missing))}" for name in missing]
        raise UnboundMacro(
            f"These gin macros need a value: {'; '.join(lines)}. Pass --gin.{missing[0]}=<value>, "
            "or add a gin file that sets them."
        )


def check_bindings(bindings: Sequence[str], entries: Sequence[str]) -> None:
    """Every binding of the command line is read by something that runs.

    Files may set more than one stage needs; a command line that does is a mistake.

    Args:
        bindings: `NAME = value` or `scope/name.parameter = value`.
        entries: names of the functions that a run starts from.

    Raises:
        UnreadBinding: nothing reads one of them.
    """
    macros = _referred_macros()
    reached = _reachable(entries)
    for binding in bindings:
        key = binding.partition("=")[0].strip()
        if "." not in key:
            if key not in macros:
                raise UnreadBinding(
                    f"No gin file reads the macro {key}, so setting it would have no effect."
                    f"{_suggest(key, macros)}"
                )
            continue
        scope, selector, complete, _ = gin_config.ParsedBindingKey.parse(key)
        if complete not in reached:
            raise UnreadBinding(
                f"Nothing in this configuration refers to {selector}, so {key} would have no "
                "effect."
            )
        scopes = reached[complete]
        if scope and not any(scope in found for found in scopes):
            raise UnreadBinding(
                f"Nothing refers to {selector} in the scope {scope!r}, so {key} would have no "
                f"effect.{_suggest(scope, {part for found in scopes for part in found})}"
            )


def is_bound(function: Callable[..., Any]) -> bool:
    """Whether the parsed files bind anything of a function."""
    selectors = {selector for _, selector in gin_config._CONFIG}
    return any(gin_config._REGISTRY[selector].wrapped is function for selector in selectors)


def _bound_macros() -> dict[str, Any]:
    return {
        scope: values.get("value")
        for (scope, selector), values in gin_config._CONFIG.items()
        if selector == "gin.macro"
    }


def _referred_macros() -> set[str]:
    references = gin_config.iterate_references(gin_config._CONFIG)
    return {"/".join(found.scopes) for found in references if _selector(found) == "gin.macro"}


def _selector(reference: gin_config.ConfigurableReference) -> str:
    return reference.config_key[1]


def _is_required(value: Any) -> bool:
    is_reference = isinstance(value, gin_config.ConfigurableReference)
    return is_reference and repr(value) == "%gin.REQUIRED"


def _reachable(entries: Sequence[str]) -> dict[str, list[set[str]]]:
    """Complete selector -> the scopes it may be called in, from the entry functions on."""
    config = gin_config._CONFIG
    reached: dict[str, list[set[str]]] = {}
    pending: list[tuple[str, frozenset[str]]] = [
        (selector, frozenset()) for _, selector in config if selector.rpartition(".")[2] in entries
    ]
    seen = set()
    while pending:
        selector, scopes = pending.pop()
        if (selector, scopes) in seen:
            continue
        seen.add((selector, scopes))
        reached.setdefault(selector, []).append(set(scopes))
        for (scope, name), values in config.items():
            if name != selector or (scope and scope not in _paths(scopes)):
                continue
            for found in gin_config.iterate_references(values):
                inner = frozenset(_paths(found.scopes)) if found.scopes else scopes
                pending.append((_selector(found), inner))
    return reached


def _paths(scopes: Any) -> set[str]:
    """The scope names that a call in nested scopes reads: each prefix of the path."""
    if isinstance(scopes, frozenset):
        return set(scopes)
    return {"/".join(scopes[:end]) for end in range(1, len(scopes) + 1)}


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# --- Gin's own errors ----------------------------------------------------------------------------


def explain(error: Exception) -> str | None:
    """Gin's message with the closest known names, or None for an error that is not about gin."""
    text = str(error)
    if match := re.match(r"Couldn't resolve selector (\S+); <module '([\w.]+)'", text):
        selector, module = match.groups()
        known = [name for name in dir(sys.modules.get(module)) if not name.startswith("_")]
        hint = _suggest(selector.rpartition(".")[2], known)
        return f"{module} has no {selector.rpartition('.')[2]!r}.{hint}{_location(text)}"
    if match := re.match(r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", text):
        selector, parameter = match.groups()
        known = _parameters(selector)
        return (
            f"{selector} has no parameter {parameter!r}.{_suggest(parameter, known)} It has: "
            f"{', '.join(known)}.{_location(text)}"
        )
    if match := re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", text):
        name = match.group(1)
        known = {found.name for found in gin_config._INVERSE_REGISTRY.values()}
        return f"No gin file imports {name!r}.{_suggest(name, known)}{_location(text)}"
    if text.startswith("Unable to open file"):
        return f"A gin file includes one that does not exist. {text}"
    if re.match(r"'\w+' was not provided by an import statement", text):
        return f"{text} Add the import to that gin file."
    if isinstance(error, tokenize.TokenError):  # from Python 3.12 on, where gin expects SyntaxError
        return f"Unable to parse value: {error.args[0]}. Is a quote or a bracket left open?"
    return text if isinstance(error, UnreadBinding | UnboundMacro | SyntaxError) else None


def _location(text: str) -> str:
    where = re.search(r"\n  In (.*?) line (\d+)\n\s*(.*)", text)
    return f" ({where[1].rstrip(',')} line {where[2]}: {where[3].strip()})" if where else ""


def _parameters(selector: str) -> list[str]:
    match = gin_config._REGISTRY.matching_selectors(selector.rpartition(".")[2])
    if not match:
        return []
    return list(inspect.signature(gin_config._REGISTRY[match[0]].wrapped).parameters)

"""Checks of a gin configuration before anything runs, with errors for its author.

Gin accepts every binding that it can resolve. This module rejects bindings that would have no
effect: a macro that nothing reads, or a parameter of a function that nothing refers to. Only this
module and `gin_errors` read gin's tables, which are not public.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config as gin_config
from gin import config_parser

from mpt_jax.config.gin_errors import UnboundMacro, UnreadBinding, suggest

# Macro -> the macro whose use it configures. The first has no effect if the second is None.
REFINES = {"START_FROM": "INITIAL_ARTIFACT"}


def set_search_paths(folders: Sequence[str]) -> None:
    """Sets the folders that gin searches, in place of those of an earlier stage in this process."""
    gin_config._LOCATION_PREFIXES[:] = list(folders)


# --- The command line's bindings -----------------------------------------------------------------


class _CommandLine(gin_config.ParseContext):
    """Gin context that resolves the names in command-line bindings. It searches the registered
    functions first, as gin does outside files, and then the imports of all files parsed so far."""

    def __init__(self):
        super().__init__()
        self._enable_dynamic_registration()
        bound: dict[str, set[str]] = {}
        statements = [s for s in gin_config._IMPORTS if not s.module.startswith("__gin__.")]
        for statement in sorted(statements, key=lambda s: s.format()):
            whole = statement.is_from or statement.alias
            module = statement.module if whole else statement.module.partition(".")[0]
            bound.setdefault(statement.bound_name(), set()).add(module)
            self.process_import(statement)
        for name, modules in bound.items():
            if len(modules) > 1:  # files disagree on its module
                del self._symbol_table[name]

    def get_configurable(self, selector):
        """Returns the function or class that a name refers to, or None if the name is unknown."""
        configurable = gin_config._REGISTRY.get_match(selector)
        if configurable is None and selector.partition(".")[0] in self._symbol_table:
            configurable = super().get_configurable(selector)
        return configurable


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Context manager in which gin resolves names with the imports of the files parsed so far."""
    gin_config._PARSE_CONTEXTS.append(_CommandLine())
    try:
        yield
    finally:
        gin_config._PARSE_CONTEXTS.pop()


def bind(bindings: Sequence[str]) -> None:
    """Applies the bindings of the command line. Each is parsed separately.

    Raises:
        SyntaxError: an argument is not a binding.
    """
    for binding in bindings:
        for statement in config_parser.ConfigParser(binding, gin_config.ParserDelegate()):
            if not isinstance(statement, config_parser.BindingStatement):
                raise SyntaxError(
                    f"{binding!r} is not a gin binding. Write NAME = value or "
                    "scope/name.parameter = value."
                )
            key = (statement.scope, statement.selector, statement.arg_name)
            if not statement.arg_name:
                key = (_macro_name(statement), "gin.macro", "value")
            gin_config.bind_parameter(key, statement.value)


def _macro_name(statement: config_parser.BindingStatement) -> str:
    return f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector


# --- Checks after parsing ------------------------------------------------------------------------


def check_macros() -> None:
    """Checks that every macro that is referred to has a value.

    Raises:
        UnboundMacro: some macros have no value; the message lists all of them.
    """
    bound = _bound_macros()
    missing = sorted(
        name for name in _referred_macros() if name not in bound or _is_required(bound[name])
    )
    if missing:
        hints = {name: suggest(name, set(bound) - set(missing)).strip() for name in missing}
        lines = [f"{name} ({hint})" if hint else name for name, hint in hints.items()]
        raise UnboundMacro(
            f"These gin macros need a value: {'; '.join(lines)}. Pass --gin.{missing[0]}=<value>, "
            "or add a gin file that sets them."
        )


def check_bindings(bindings: Sequence[str], entries: Sequence[str]) -> None:
    """Checks that every binding of the command line is read by code that runs.

    Gin files may set more than their stage needs; the command line may not.

    Args:
        bindings: the bindings, `NAME = value` or `scope/name.parameter = value`.
        entries: the names of the entry functions, from which everything that runs is called.

    Raises:
        UnreadBinding: one of the bindings would have no effect.
    """
    macros = _referred_macros()
    reached = _reachable(entries)
    used = set().union(*reached.get("gin.macro", []))
    for binding in bindings:
        key = binding.partition("=")[0].strip()
        if "." not in key:
            if key not in macros:
                raise UnreadBinding(
                    f"No gin file reads the macro {key}, so setting it would have no effect."
                    f"{suggest(key, macros)} Correct the name, remove the binding, or add the gin "
                    "file that reads the macro."
                )
            if key not in used:
                raise UnreadBinding(
                    f"The macro {key} is read only by {' and '.join(_readers(key))}, which this "
                    "configuration does not use, so setting it would have no effect. Remove the "
                    "binding."
                )
            _check_refines(key)
            continue
        scope, selector, complete, _ = gin_config.ParsedBindingKey.parse(key)
        if complete not in reached:
            raise UnreadBinding(
                f"Nothing in this configuration refers to {selector}, so {key} would have no "
                "effect. Remove it, or correct the name."
            )
        scopes = reached[complete]
        if scope and not any(scope in names for names in scopes):
            raise UnreadBinding(
                f"Nothing refers to {selector} in the scope {scope!r}, so {key} would have no "
                f"effect.{suggest(scope, {name for names in scopes for name in names})} Correct "
                "the scope, or remove the binding."
            )


def _check_refines(name: str) -> None:
    other = REFINES.get(name)
    if other is not None and _bound_macros().get(other, "") is None:
        raise UnreadBinding(
            f"{name} configures how {other} is used, but {other} is None, so setting {name} would "
            f"have no effect. Set {other}, or remove {name}."
        )


def check_files(
    parsed: Sequence[gin_config.ParsedConfigFileIncludesAndImports], shipped: Sequence[Path]
) -> None:
    """Checks that every macro that a user's gin file sets is read.

    A user's file may serve several stages, so a macro counts as read if any gin file of this
    library reads or sets it, even a file that this stage does not use.

    Args:
        parsed: the results of parsing the gin files, in order.
        shipped: the folders of this library's gin files.

    Raises:
        UnreadBinding: nothing reads a macro; the message has the macro, its file and line, and the
            closest known macros.
    """
    folders = [folder.resolve() for folder in shipped]
    users = [
        path
        for path in map(_find_file, _file_names(parsed))
        if path and not any(path.resolve().is_relative_to(folder) for folder in folders)
    ]
    if not users:
        return
    known = _referred_macros()
    for path in (path for folder in folders for path in folder.rglob("*.gin")):
        assigned, read = _macros_in(path)
        known |= assigned.keys() | read
    for path in users:
        for name, line in _macros_in(path)[0].items():
            if name not in known:
                raise UnreadBinding(
                    f"Nothing reads the macro {name}, so setting it would have no effect "
                    f"({path} line {line}).{suggest(name, known)} Correct the name, or remove the "
                    "line."
                )


def _file_names(
    parsed: Sequence[gin_config.ParsedConfigFileIncludesAndImports],
) -> Iterator[str]:
    for file in parsed:
        yield file.filename
        yield from _file_names(file.includes)


def _find_file(name: str) -> Path | None:
    """Returns the path of the file that gin read for a name, in the first search path that has it;
    None if gin read it from a package."""
    paths = [Path(os.path.join(prefix, name)) for prefix in gin_config._LOCATION_PREFIXES]
    return next((path for path in paths if path.is_file()), None)


class _Names(config_parser.ParserDelegate):
    """Parser delegate that records which macros a file reads, without resolving any names."""

    def __init__(self):
        self.read: set[str] = set()

    def configurable_reference(self, scoped_configurable_name, evaluate):
        """Ignores references to functions and classes."""

    def macro(self, macro_name):
        """Records the name of a macro."""
        self.read.add(macro_name)


def _macros_in(path: Path) -> tuple[dict[str, int], set[str]]:
    """Returns ({macro that a file sets: line number}, macros that it reads)."""
    names = _Names()
    with path.open() as file:
        assigned = {
            _macro_name(statement): statement.location.line_num
            for statement in config_parser.ConfigParser(file, names)
            if isinstance(statement, config_parser.BindingStatement) and not statement.arg_name
        }
    return assigned, names.read


@dataclasses.dataclass(frozen=True)
class BoundValue:
    """A value that a configuration binds.

    Attributes:
        function: the function or class that is called with it.
        parameter: the name of its parameter.
        macro: the macro that has the value; None if it is bound directly.
        value: the value. Calls, and macros inside containers, are references (`is_reference`).
    """

    function: Callable[..., Any]
    parameter: str
    macro: str | None
    value: Any


def bound_values(entries: Sequence[str]) -> Iterator[BoundValue]:
    """Yields the values of everything that the entry functions may call."""
    macros, reached = _bound_macros(), _reachable(entries)
    for (_, selector), values in gin_config._CONFIG.items():
        if selector not in reached or selector == "gin.macro":
            continue
        for parameter, value in values.items():
            names: list[str] = []
            while is_reference(value) and _selector(value) == "gin.macro":
                name = "/".join(value.scopes)
                if name not in macros or name in names:
                    break
                names.append(name)
                value = macros[name]
            function = gin_config._REGISTRY[selector].wrapped
            yield BoundValue(function, parameter, names[-1] if names else None, value)


def is_reference(value: Any) -> bool:
    """Whether a value is a call (`@name()`), a function (`@name`) or a macro (`%NAME`)."""
    return isinstance(value, gin_config.ConfigurableReference)


def is_bound(function: Callable[..., Any]) -> bool:
    """Whether the parsed files bind any parameter of a function."""
    selectors = {selector for _, selector in gin_config._CONFIG}
    return any(gin_config._REGISTRY[selector].wrapped is function for selector in selectors)


def bound_argument(factory: Callable[..., Any], parameter: str) -> Any:
    """Returns the value that a function or class gets for a parameter that its caller omits.

    The value is set by a `functools.partial` or, if `factory` comes from gin, by the parsed files.
    None if neither sets it.
    """
    if isinstance(factory, functools.partial):
        return factory.keywords.get(parameter, bound_argument(factory.func, parameter))
    for known in gin_config._INVERSE_REGISTRY.values():
        if known.wrapper is factory:
            return copy.deepcopy(gin_config._get_bindings(known.selector).get(parameter))
    return None


def _bound_macros() -> dict[str, Any]:
    return {
        scope: values.get("value")
        for (scope, selector), values in gin_config._CONFIG.items()
        if selector == "gin.macro"
    }


def _referred_macros() -> set[str]:
    references = gin_config.iterate_references(gin_config._CONFIG)
    return {"/".join(ref.scopes) for ref in references if _selector(ref) == "gin.macro"}


def _readers(macro: str) -> list[str]:
    """Returns the parameters and macros whose values refer to a macro."""
    readers = []
    for (scope, selector), values in gin_config._CONFIG.items():
        for parameter, value in values.items():
            references = gin_config.iterate_references(value)
            if any(_selector(x) == "gin.macro" and "/".join(x.scopes) == macro for x in references):
                function = selector.rpartition(".")[2]
                readers.append(scope if selector == "gin.macro" else f"{function}.{parameter}")
    return readers


def _selector(reference: gin_config.ConfigurableReference) -> str:
    return reference.config_key[1]


def _is_required(value: Any) -> bool:
    is_reference = isinstance(value, gin_config.ConfigurableReference)
    return is_reference and repr(value) == "%gin.REQUIRED"


def _reachable(entries: Sequence[str]) -> dict[str, list[set[str]]]:
    """Returns everything that the entry functions may call: the sets of scopes in which each may be
    called, by complete selector."""
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
            for reference in gin_config.iterate_references(values):
                inner = frozenset(_paths(reference.scopes)) if reference.scopes else scopes
                pending.append((_selector(reference), inner))
    return reached


def _paths(scopes: Any) -> set[str]:
    """Returns the scopes whose bindings apply in nested scopes: each prefix of their path."""
    if isinstance(scopes, frozenset):
        return set(scopes)
    return {"/".join(scopes[:end]) for end in range(1, len(scopes) + 1)}

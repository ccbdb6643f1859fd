"""Explanation of gin's errors for the author of a configuration, with the closest known names."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import tokenize
from pathlib import Path
from typing import Any

from gin import config as gin_config

# Names of earlier versions, and their replacements.
RENAMED = {
    "WHOLE_BATCH": "GLOBAL_BATCH_SIZE",
    "whole_batch": "global_batch_size",
    "length_of": "prompt_length_of",
    "INITIAL_ARTEFACT": "INITIAL_ARTIFACT",
    "SOURCE_ARTEFACT": "SOURCE_ARTIFACT",
    "NORMALISE": "NORMALIZE",
    "REPARAMETRISE": "REPARAMETERIZE",
    "artefact": "artifact",
    "artefact_command": "artifact_command",
    "normalise": "normalize",
    "reparametrise": "reparameterize",
}


class UnreadBinding(ValueError):
    """Error for a setting that would have no effect."""


class UnboundMacro(ValueError):
    """Error for a macro that a gin file reads but nothing sets."""


def suggest(name: str, known: Any) -> str:
    """Returns a hint with the closest known names, or the new name of a renamed one."""
    if (new := RENAMED.get(name)) is not None:
        return f" It is now called {new}."
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def explain(error: Exception) -> str | None:
    """Returns a clear message for an error of gin, with the closest known names; None if the error
    is not from gin."""
    text = str(error)
    if match := re.match(r"Couldn't resolve selector (\S+); <module '([\w.]+)'", text):
        selector, module = match.groups()
        known = [name for name in dir(sys.modules.get(module)) if not name.startswith("_")]
        hint = suggest(selector.rpartition(".")[2], known)
        name = selector.rpartition(".")[2]
        return f"{module} has no {name!r}{_location(text)}.{hint or ' Correct the name.'}"
    if match := re.match(r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", text):
        selector, parameter = match.groups()
        known = _parameters(selector)
        return (
            f"{selector} has no parameter {parameter!r}{_location(text)}."
            f"{suggest(parameter, known)} Its parameters are: {', '.join(known)}."
        )
    if match := re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", text):
        name = match.group(1)
        known = {entry.name for entry in gin_config._INVERSE_REGISTRY.values()}
        return (
            f"No gin file imports {name!r}{_location(text)}.{suggest(name, known)} Correct the "
            "name, or bind it in a gin file that imports its module."
        )
    if match := re.match(r"cannot import name '(\w+)' from 'mpt_jax'", text):
        return f"{text.partition(' (')[0]}{_location(text)}.{_moved(match.group(1))}"
    if text.startswith("Unable to open file"):
        return (
            "A gin file includes a file that does not exist. Correct its path, or add its folder "
            f"with --gin_search_paths. Gin reports: {text}"
        )
    if re.match(r"'\w+' was not provided by an import statement", text):
        return f"{text} Add the import to the gin file that uses the name."
    if isinstance(error, tokenize.TokenError):  # from Python 3.12 on, where gin expects SyntaxError
        return f"Unable to parse value: {error.args[0]}. Close the open quote or bracket."
    return text if isinstance(error, UnreadBinding | UnboundMacro | SyntaxError) else None


def _moved(name: str) -> str:
    """Returns a hint with the new import line of a module that was once directly in mpt_jax."""
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob(f"{name}.py"))
    packages = [".".join(path.relative_to(folder.parent).parent.parts) for path in files]
    hints = [f"from {package} import {name}" for package in packages]
    if not hints:
        return " CHANGELOG.md lists the modules that were moved."
    return f" Write {' or '.join(map(repr, hints))}."


def _location(text: str) -> str:
    match = re.search(r"\n  In (.*?) line (\d+)\n\s*(.*)", text)
    return f" ({match[1].rstrip(',')} line {match[2]}: {match[3].strip()})" if match else ""


def _parameters(selector: str) -> list[str]:
    match = gin_config._REGISTRY.matching_selectors(selector.rpartition(".")[2])
    if not match:
        return []
    return list(inspect.signature(gin_config._REGISTRY[match[0]].wrapped).parameters)

"""Comparison of a saved configuration with the current one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

MOST_SHOWN = 20


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], names: Collection[str] | None = None
) -> str:
    """Returns both values of every name whose values differ; empty if none do.

    Args:
        saved: what an earlier start recorded.
        current: the same of this one. JSON values in both, so that equal ones compare equal.
        names: which to compare, in this order; by default those of `current`, since records of
            other versions may hold more.
    """
    names = current if names is None else names
    found = [name for name in names if saved.get(name) != current.get(name)]
    shown = [
        f"{name}: saved {_shown(saved, name)}, current {_shown(current, name)}"
        for name in found[:MOST_SHOWN]
    ]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def check_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    names: Collection[str] | None = None,
    *,
    what: str,
    advice: str,
) -> None:
    """Checks that something was saved with the current configuration.

    Args:
        saved, current, names: see `differences`.
        what: was saved, for the message.
        advice: what the user can do, for the message; one or more sentences.

    Raises:
        ValueError: a value differs; shows all that do.
    """
    if found := differences(saved, current, names):
        raise ValueError(f"{what} was saved with another configuration ({found}). {advice}")


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"

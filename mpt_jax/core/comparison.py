"""Comparison of a saved configuration with the current one, and names listed in messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MOST_SHOWN = 20


def abbreviate(names: Sequence[str], separator: str = ", ") -> str:
    """Joins the first `MOST_SHOWN` names, and counts the others."""
    more = [f"and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return separator.join([*names[:MOST_SHOWN], *more])


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], names: Collection[str] | None = None
) -> str:
    """Returns a text with the names whose values differ and both values; '' if none differ.

    Shows at most `MOST_SHOWN` of them and counts the rest.

    Args:
        saved: the configuration that an earlier start recorded, as JSON values.
        current: the configuration of this start, as JSON values.
        names: the names to compare, in this order. Defaults to those of `current`, since records
            of other versions may have more names.
    """
    names = current if names is None else names
    differing = [name for name in names if saved.get(name) != current.get(name)]
    shown = [
        f"{name}: saved {_shown(saved, name)}, current {_shown(current, name)}"
        for name in differing
    ]
    return abbreviate(shown, "; ")


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
        what: the thing that was saved; the subject of the error's first sentence.
        advice: what the user can do; one or more sentences for the end of the error.

    Raises:
        ValueError: values differ; the message shows them.
    """
    if changes := differences(saved, current, names):
        raise ValueError(f"{what} was saved with another configuration ({changes}). {advice}")


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"

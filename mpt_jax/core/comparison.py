"""Texts for messages: lists of names, and differences between saved and current settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MOST_SHOWN = 20


def abbreviate(names: Sequence[str], separator: str = ", ") -> str:
    """Joins the first `MOST_SHOWN` names, and appends the number of the others."""
    more = [f"and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return separator.join([*names[:MOST_SHOWN], *more])


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], names: Collection[str] | None = None
) -> str:
    """Returns a text that lists the names whose values differ, with both values; '' if none do.

    Lists at most `MOST_SHOWN` names and the number of the others.

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


def data_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Returns a text that lists the changes between two records of a job's data, with both values;
    '' if there are none.

    Compares only the tasks, settings and splits that both records have.

    Args:
        saved: the record that an earlier start saved, from `mpt_jax.data.records.of_job`.
        current: the record of this start.
    """
    changes = []
    for task in current.keys() & saved.keys():
        before, now = saved[task], current[task]
        settings = {"source": (before["source"], now["source"])}
        templates = before.get("template", {}), now.get("template", {})
        for name in templates[0].keys() & templates[1].keys():
            settings[name] = templates[0][name], templates[1][name]
        changes += [
            f"{name} of task {task!r}: saved {values[0]!r}, current {values[1]!r}"
            for name, values in settings.items()
            if values[0] != values[1]
        ]
        changes += [
            f"{split} split of task {task!r}: saved {_rows(before['splits'][split])}, "
            f"current {_rows(now['splits'][split])}"
            for split in now["splits"].keys() & before["splits"].keys()
            if before["splits"][split] != now["splits"][split]
        ]
    return abbreviate(sorted(changes), "; ")


def _rows(split: Mapping[str, Any]) -> str:
    rows = "an unknown number of rows" if split["rows"] is None else f"{split['rows']:,} rows"
    digest = split.get("sha256")
    return f"{rows} (sha256 {digest[:12]})" if digest else rows


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"

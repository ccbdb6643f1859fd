"""Check of arguments that only T5X supports."""

from __future__ import annotations

from typing import Any


def refuse_ineffective(name: str, **settings: tuple[Any, Any]) -> None:
    """Checks that the user has not set any T5X setting that has no effect without T5X.

    Args:
        name: the name of the function that takes the settings.
        **settings: setting -> (its value, its default).

    Raises:
        ValueError: a setting differs from its default.
    """
    for setting, (value, default) in settings.items():
        if value != default:
            raise ValueError(
                f"{name}.{setting} = {value!r} would have no effect without T5X. Leave it at its "
                f"default, {default!r}, or run the job under T5X (docs/t5x.md)."
            )

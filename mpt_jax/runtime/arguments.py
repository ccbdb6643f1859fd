"""Checks of arguments that exist for T5X's sake."""

from __future__ import annotations

from typing import Any


def refuse_ineffective(name: str, **settings: Any) -> None:
    """Checks that no T5X setting was given that would have no effect here.

    Args:
        name: of the function that takes them.
        **settings: setting -> whether it was given; any true value.

    Raises:
        ValueError: one was.
    """
    for setting, value in settings.items():
        if value:
            raise ValueError(
                f"{name}.{setting} would have no effect here; leave it at its default, or run "
                "under T5X."
            )

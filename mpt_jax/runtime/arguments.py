"""Check of arguments that only T5X supports."""

from __future__ import annotations

from typing import Any


def refuse_ineffective(name: str, **settings: Any) -> None:
    """Checks that no T5X setting was set that has no effect without T5X.

    Args:
        name: the function that takes the settings.
        **settings: setting -> a true value if it was set.

    Raises:
        ValueError: a setting was set.
    """
    for setting, value in settings.items():
        if value:
            raise ValueError(
                f"{name}.{setting} would have no effect here. Leave it at its default, or run "
                "under T5X."
            )

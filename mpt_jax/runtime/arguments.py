"""Check of arguments that only T5X supports."""

from __future__ import annotations

from typing import Any


def refuse_ineffective(name: str, **settings: Any) -> None:
    """Checks that the user has not set any T5X setting that has no effect without T5X.

    Args:
        name: the name of the function that takes the settings.
        **settings: setting -> a true value if it differs from its default.

    Raises:
        ValueError: a setting differs from its default.
    """
    for setting, value in settings.items():
        if value:
            raise ValueError(
                f"{name}.{setting} would have no effect without T5X. Leave it at its default, or "
                "run the same command with T5X."
            )

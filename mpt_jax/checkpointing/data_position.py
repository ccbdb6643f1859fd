"""The position in the training data, saved with a checkpoint."""

from __future__ import annotations

import base64
from typing import Any


class DataPosition:
    """Where the training data stands at a saved step; the same for every process.

    A run that meets a loss that is not finite saves the last good state, and by then later batches
    have been taken; so a position is what the data said at some step, and batches to skip since.

    Args:
        batches: the training data; None keeps no position.
    """

    def __init__(self, batches: Any | None):
        self._batches = batches
        self._step, self._packed = 0, None

    def at(self, step: int, taken: int) -> dict[str, Any] | None:
        """The position of a state as JSON values.

        Args:
            step: of the state.
            taken: how many batches have been taken.
        """
        if self._batches is None:
            return None
        if step == taken:
            self._step = step
            self._packed = base64.b64encode(self._batches.state()).decode()
        return {"packed": self._packed, "skip": step - self._step}

    def restore(self, saved: dict[str, Any] | None, step: int) -> None:
        """Brings the data to where it stood at a saved step.

        Raises:
            ValueError: it is of other data, or damaged.
        """
        if self._batches is None or saved is None:
            return
        self._step, self._packed = step - saved["skip"], saved["packed"]
        if self._packed is not None:
            self._batches.restore(_unpack(self._packed))
        for _ in range(saved["skip"]):
            next(self._batches)


def _unpack(packed: str | list[str]) -> bytes:
    """The bytes of a saved position. Earlier versions kept a list, with one for each process."""
    if isinstance(packed, list) and len(packed) != 1:
        raise ValueError(
            f"The checkpoint holds data positions of {len(packed)} processes; in the version that "
            "saved it each had its own. Finish that run with that version."
        )
    return base64.b64decode(packed if isinstance(packed, str) else packed[0])

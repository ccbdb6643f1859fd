"""Position in the training data, saved with a checkpoint."""

from __future__ import annotations

import base64
from typing import Any


class DataPosition:
    """The position in the training data at a saved step; the same for every process.

    After a loss that is not finite, a job saves the last good state, but has already taken later
    batches. So a position consists of the state of the data iterator at some earlier step and the
    number of batches to skip after it.

    Args:
        batches: the iterator over the training data; None keeps no position.
    """

    def __init__(self, batches: Any | None):
        self._batches = batches
        self._step, self._packed = 0, None

    def at(self, step: int, taken: int) -> dict[str, Any] | None:
        """Returns the data position of a state as JSON values, or None without training data.

        Args:
            step: the step of the state.
            taken: the number of batches taken so far; at least `step`.
        """
        if self._batches is None:
            return None
        if step == taken:
            self._step = step
            self._packed = base64.b64encode(self._batches.state()).decode()
        return {"packed": self._packed, "skip": step - self._step}

    def restore(self, saved: dict[str, Any] | None, step: int) -> None:
        """Moves the data to a saved position.

        Args:
            saved: what `at` returned; None leaves the data at its start.
            step: the step of the checkpoint.

        Raises:
            ValueError: the position was saved with other data or by an older version, or is
                corrupt.
        """
        if self._batches is None or saved is None:
            return
        if saved["skip"] > step:
            raise ValueError(
                f"The data position in the checkpoint of step {step} is corrupt: it skips "
                f"{saved['skip']:,} batches, more than the job has taken. Rename the checkpoint to "
                "resume from the previous one."
            )
        self._step, self._packed = step - saved["skip"], saved["packed"]
        if self._packed is not None:
            self._batches.restore(_unpack(self._packed, step))
        for _ in range(saved["skip"]):
            next(self._batches)


def _unpack(packed: str | list[str], step: int) -> bytes:
    """Returns the bytes of a saved position. Earlier versions saved a list, one per process.

    Args:
        packed: the saved position or positions, in base64.
        step: the step of the checkpoint, to show in the error.

    Raises:
        ValueError: there are several positions.
    """
    if isinstance(packed, list) and len(packed) != 1:
        raise ValueError(
            f"The checkpoint of step {step} holds {len(packed)} data positions, one per process, "
            "because an older version of MPT-JAX saved it. Finish the job with that version, or "
            "choose another MODEL_DIR to start again."
        )
    return base64.b64decode(packed if isinstance(packed, str) else packed[0])

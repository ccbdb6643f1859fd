"""One process of a job that reads checkpoints which the second process cannot read whole.

    python -m tests.reading_job FOLDER ADDRESS INDEX

FOLDER holds checkpoint_5 and checkpoint_9. Prints a line for each way in which the second process
fails: the step that was restored, or the error.
"""

from __future__ import annotations

import sys

import jax

from mpt_jax.checkpoints import Checkpoints
from tests import tiny

WAYS = {
    "no answer": TimeoutError("the store does not answer"),
    "no access": ValueError("PERMISSION_DENIED: Error opening 'zarr' driver"),
    "damage": ValueError("DATA_LOSS: Error opening 'zarr' driver"),
}


class Hindered(Checkpoints):
    """Fails in the second process alone, at the newest checkpoint."""

    error: Exception

    def _read(self, step, item, args):
        if jax.process_index() == 1 and step == 9 and item == "state":
            raise self.error
        return super()._read(step, item, args)


def main(folder: str, address: str, index: str) -> None:
    """Reads once for each way."""
    jax.distributed.initialize(address, 2, int(index))
    model = tiny.model()
    state = tiny.state(model, tiny.params(model))
    for way, error in WAYS.items():
        saved = Hindered(folder, read_only=True)
        saved.error = error
        try:
            found = saved.restore(state)
            print(f"{way}: {int(found[0].step) if found else None}", flush=True)
        except OSError as caught:
            print(f"{way}: {caught}", flush=True)
        saved.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Writes the digests of training batches, and positions between them, to a folder.

    python -m tests.golden.make_batches FOLDER

`tests/golden/batches` was written by version 0.1.0 when every host made whole batches with tf.data.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tests.fixtures import golden_batches

POSITION, COUNT = 137, 1000
KEPT = (0, 136, POSITION, POSITION + 1, COUNT - 1)


def main(folder: Path) -> None:
    """Writes batches.json and a position for each kind of batches."""
    found: dict[str, dict[str, str]] = {}
    for sampler in golden_batches.SAMPLERS:
        for kind in golden_batches.KINDS:
            batches, together = golden_batches.iterator(sampler, kind), hashlib.sha256()
            kept = found[f"{sampler}/{kind}"] = {}
            for number in range(COUNT):
                if number == POSITION and sampler == "stochastic" and kind != "buckets":
                    (folder / f"{kind}_after_{POSITION}").write_bytes(batches.state())
                digest = golden_batches.digest(next(batches))
                together.update(digest.encode())
                if number in KEPT:
                    kept[str(number)] = digest
            kept[f"{COUNT} batches"] = together.hexdigest()
    (folder / "batches.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Storage of each group's best parameters in MODEL_DIR/best, with the record they belong to.

    best/history.json             best steps, their scores, and the scores of every evaluation
    best/trainable.safetensors    the trainable parameters, of each group's best step

The two files change together. The history first records what follows beside what was, so a reader,
or a resume after a crash between the two, finds the record of whichever parameters are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from mpt_jax.core.tree import flatten, unflatten

FOLDER, HISTORY, PARAMETERS = "best", "history.json", "trainable.safetensors"


class BestSteps:
    """The best parameters of a job, and their record, in a folder of its MODEL_DIR."""

    def __init__(self, model_dir: str):
        self.folder = epath.Path(model_dir) / FOLDER
        self._written: dict[str, Any] | None = None  # the last record
        self._digest = ""  # of the parameters in the folder

    def exists(self) -> bool:
        """Whether anything was written."""
        return (self.folder / HISTORY).exists()

    def write(self, record: dict[str, Any], trainable: dict[str, Any] | None) -> None:
        """Writes a record, and the parameters if they changed since the last one.

        Args:
            record: JSON values.
            trainable: the parameters; None keeps those in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        history = self.folder / HISTORY
        if trainable is not None:
            leaves = {k: np.ascontiguousarray(v) for k, v in flatten(trainable).items()}
            parameters = save(leaves)
            self._digest = hashlib.sha256(parameters).hexdigest()
            if self._written is not None:
                following = {**record, "trainable_sha256": self._digest}
                _replace(history, json.dumps({**self._written, "next": following}).encode())
            _replace(self.folder / PARAMETERS, parameters)
        self._written = {**record, "trainable_sha256": self._digest}
        _replace(history, json.dumps(self._written).encode())

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record and the parameters.

        Raises:
            ValueError: they are not those that were written.
        """
        path = self.folder / PARAMETERS
        advice = (
            f"Remove {self.folder} and start again: the run goes on from its checkpoint and "
            "selects its best step among the evaluations that follow. Or copy the folder back from "
            "where it is whole."
        )
        try:
            record = json.loads((self.folder / HISTORY).read_text())
            parameters = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} cannot be read ({error}). {advice}") from error
        found = hashlib.sha256(parameters).hexdigest()
        expected = record.get("trainable_sha256", found)  # earlier versions wrote none
        following = record.pop("next", None)
        if found != expected and following and following["trainable_sha256"] == found:
            record = following  # the run was killed between the two files
        elif found != expected:
            raise ValueError(
                f"{path} was changed after it was written: its sha256 is {found}, and {HISTORY} "
                f"has {expected}. {advice}"
            )
        self._written, self._digest = record, found
        return record, unflatten(load(parameters))


def _replace(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, meets the old content or the new."""
    new = path.parent / f".{path.name}.{os.getpid()}.new"
    new.write_bytes(content)
    new.replace(path)

"""Storage of each group's best parameters in MODEL_DIR/best, with a record of their scores.

    best/history.json             best steps, their scores, and the scores of every evaluation
    best/trainable.safetensors    the trainable parameters, from each group's best step

The two files change together. Before the parameters are replaced, the history stores the next
record beside the current one. Even after a crash between the two writes, a reader or a resumed job
therefore finds the record that matches the parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Any

import msgspec
import numpy as np
from etils import epath
from safetensors.numpy import save

from mpt_jax.core import schema
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.runtime.tensors import load_safetensors

FOLDER, HISTORY, PARAMETERS = "best", "history.json", "trainable.safetensors"
SEAL = "record_sha256"  # in a record, the digest of its other fields


class Record(msgspec.Struct):
    """The schema of a record of best steps."""

    run_names: schema.Names
    best_step: Annotated[list[Annotated[int, msgspec.Meta(ge=-1)]], msgspec.Meta(min_length=1)]
    scores: dict[str, dict[str, float]]
    history: dict[schema.Count, list[float | None]]
    trainable_sha256: str = ""

    def __post_init__(self):
        groups = {len(scores) for scores in self.history.values()} | {len(self.best_step)}
        if len(groups) > 1:
            counts = " and ".join(map(str, sorted(groups)))
            raise ValueError(f"its entries are for different numbers of groups: {counts}")
        pairs = enumerate(self.best_step)
        if any(
            step >= 0 and self.history.get(step, {group: None})[group] is None
            for group, step in pairs
        ):
            raise ValueError("a best step has no score")


class History(Record):
    """The schema of history.json."""

    next: Record | None = None


class BestSteps:
    """The best parameters of a job and their record, in a folder of its MODEL_DIR."""

    def __init__(self, model_dir: str):
        self.folder = epath.Path(model_dir) / FOLDER
        self._written: dict[str, Any] | None = None  # the last record
        self._digest = ""  # sha256 of the parameters in the folder

    def exists(self) -> bool:
        """Whether a record has been written."""
        return (self.folder / HISTORY).exists()

    def write(self, record: dict[str, Any], trainable: dict[str, Any] | None) -> None:
        """Writes a record, and the parameters if they changed since the last record.

        Args:
            record: the new record, a dictionary of JSON values.
            trainable: the new parameters; None keeps the parameters that are in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        history = self.folder / HISTORY
        if trainable is not None:
            leaves = {k: np.ascontiguousarray(v) for k, v in flatten(trainable).items()}
            parameters = save(leaves)
            self._digest = hashlib.sha256(parameters).hexdigest()
            if self._written is not None:
                content = {**self._written, "next": self._sealed(record)}
                _replace(history, json.dumps(content).encode())
            _replace(self.folder / PARAMETERS, parameters)
        self._written = self._sealed(record)
        _replace(history, json.dumps(self._written).encode())

    def _sealed(self, record: dict[str, Any]) -> dict[str, Any]:
        return schema.sealed({**record, "trainable_sha256": self._digest}, SEAL)

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (the record, the parameters), read from the folder.

        Raises:
            ValueError: the files cannot be read, or the parameters do not match the record.
        """
        path = self.folder / PARAMETERS
        advice = (
            f"restore the folder from an intact copy. If there is none, rename {self.folder} and "
            "rerun the same command: the job then resumes from its checkpoint and selects best "
            "steps from later evaluations only."
        )
        history = self.folder / HISTORY
        try:
            record = schema.parse(history.read_bytes(), f"{history}", "")
            checked = schema.check(record, History, f"{history}", "")
            next_record = record.pop("next", None)
            for sealed in (record, next_record):
                schema.check_seal(sealed, SEAL, f"{history}", "Undo the change.")
            parameters = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.folder} cannot be read ({schema.reason(error)}). Retry when the storage is "
                f"reachable. If the files are damaged, {advice}"
            ) from error
        digest = hashlib.sha256(parameters).hexdigest()
        expected = checked.trainable_sha256 or digest  # earlier versions wrote none
        if digest != expected and checked.next and checked.next.trainable_sha256 == digest:
            record = next_record  # the run was killed between the two writes
        elif digest != expected:
            raise ValueError(
                f"{path} does not match its record: its sha256 is {digest}, but {HISTORY} has "
                f"{expected}. To repair {self.folder}, {advice}"
            )
        self._written, self._digest = dict(record), digest
        record.pop(SEAL, None)
        return record, unflatten(load_safetensors(parameters, f"{path}", f"To repair it, {advice}"))


def _replace(path: epath.Path, content: bytes) -> None:
    """Replaces a file atomically: a reader sees either the old or the new content."""
    new = path.parent / f".{path.name}.{os.getpid()}.new"
    new.write_bytes(content)
    new.replace(path)

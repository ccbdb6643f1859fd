"""An exported folder as functions. Needs JAX, NumPy and safetensors, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import deserialize

CONFIG = "config.json"
BACKBONE = "backbone.safetensors"
PROMPTS = "prompts.safetensors"
FORMAT = 1
MOST_NAMED = 20  # names that an error lists
# Of all that is written; safetensors' own reading of bytes, other than of files, has no bfloat16.
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "I32": np.int32}


class Exported:
    """An exported model.

    Args:
        folder: as `mpt-jax export` wrote it.
        backbone: a backbone.safetensors, where the folder was written without one.

    Attributes:
        config: config.json.
        names: of tasks, in the order of their rows.
        backbone, prompts: arrays by name, the first two arguments of every function. Prompts of
            the same shapes may be put in their place.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is of another format, or was changed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
    ):
        self.folder = Path(folder)
        if not (self.folder / CONFIG).exists():
            raise FileNotFoundError(f"{folder} has no {CONFIG}: `mpt-jax export` writes one.")
        self.config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text())
        if self.config.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has export format {self.config.get('format')!r}; this reads {FORMAT}."
            )
        self.names: list[str] = self.config["names"]
        self.backbone = self._arrays(Path(backbone or self.folder / BACKBONE), BACKBONE)
        self.prompts = self._arrays(self.folder / PROMPTS, PROMPTS)
        self._functions = {
            (name, length): jax.jit(export.deserialize(self._bytes(file)).call)
            for name, files in self.config["functions"].items()
            for length, file in ((int(key), value) for key, value in files.items())
        }

    def row(self, name: str) -> int:
        """The row of a task; raises ValueError where there is none."""
        if name not in self.names:
            others = len(self.names) - MOST_NAMED
            more = f" and {others} more" if others > 0 else ""
            listed = ", ".join(self.names[:MOST_NAMED])
            raise ValueError(f"Unknown task {name!r}; the export has {listed}{more}.")
        return self.names.index(name)

    def predict(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Any, Any]:
        """Greedy continuations int32 [B, L], 0 after the end of sequence, and their log
        probabilities [B] in nats.

        Args:
            texts: B lists of token ids, each with its end-of-sequence id.
            rows: B rows.

        Raises:
            ValueError: there is no such row, or a text is too long.
        """
        return self._call("predict", texts, rows)

    def score(
        self,
        texts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Any:
        """Log probability [B] of a target for each text, in nats; raises as `predict` does."""
        length = self.config["target_length"]
        return self._call("score", texts, rows, _padded(targets, length, "targets"))

    def _call(
        self, name: str, texts: Sequence[Sequence[int]], rows: Sequence[int], *others: np.ndarray
    ) -> Any:
        # The function would take a row of zeros for any other.
        if wrong := [row for row in rows if not 0 <= row < len(self.names)]:
            raise ValueError(
                f"There is no row {wrong[0]}: the rows of the {len(self.names)} tasks count from 0 "
                "on, in the order of `names`."
            )
        lengths = sorted(length for of, length in self._functions if of == name)
        longest = max(map(len, texts))
        length = next((n for n in lengths if n >= longest), lengths[-1])
        tokens = _padded(texts, length, "texts")
        function = self._functions[name, length]
        return function(self.backbone, self.prompts, tokens, *others, np.asarray(rows, np.int32))

    def _bytes(self, file: str) -> bytearray:
        return bytearray(self._checked(self.folder / file, file))

    def _arrays(self, path: Path, name: str) -> Mapping[str, jax.Array]:
        if not path.exists():
            raise FileNotFoundError(
                f"There is no {path}. Where a folder was written --without-weights, give another "
                "export's backbone.safetensors."
            )
        return {
            leaf: jnp.asarray(np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]))
            for leaf, x in deserialize(self._checked(path, name))
        }

    def _checked(self, path: Path, name: str) -> bytes:
        found = path.read_bytes()
        digest, expected = hashlib.sha256(found).hexdigest(), self.config["files_sha256"][name]
        if digest != expected:
            raise ValueError(
                f"{path} is not the file that this export belongs to: its sha256 is {digest}, "
                f"and {CONFIG} has {expected}."
            )
        return found


def load(
    folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
) -> Exported:
    """An exported model; see `Exported`."""
    return Exported(folder, backbone)


def _padded(texts: Sequence[Sequence[int]], length: int, what: str) -> np.ndarray:
    if (longest := max(map(len, texts))) > length:
        raise ValueError(f"The longest of the {what} has {longest} tokens; the limit is {length}.")
    found = np.zeros((len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        found[row, : len(ids)] = ids
    return found

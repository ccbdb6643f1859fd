"""Loader of exported folders. Needs only JAX, NumPy and safetensors."""

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
MOST_NAMED = 20  # names that an error lists; it only counts the others
# The dtypes that are written. safetensors' reader of bytes, unlike that of files, has no bfloat16.
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "I32": np.int32}


class Exported:
    """An exported model.

    Args:
        folder: a folder that `mpt-jax export` wrote.
        backbone: the backbone.safetensors of another export, if the folder was written without one.

    Attributes:
        config: the contents of config.json.
        names: the task names, in the order of their rows.
        backbone, prompts: arrays by name, the first two arguments of every function. `prompts` may
            be replaced with prompts of the same shapes.

    Raises:
        FileNotFoundError, ValueError: a file is missing or was changed, or the export format is not
            supported.
    """

    def __init__(
        self, folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
    ):
        self.folder = Path(folder)
        if not (self.folder / CONFIG).exists():
            raise FileNotFoundError(
                f"{folder} has no {CONFIG}. Create the folder with `mpt-jax export`."
            )
        self.config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text())
        if self.config.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has export format {self.config.get('format')!r}; this version of "
                f"MPT-JAX reads {FORMAT}. Export the prompts again with this version."
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
        """Returns the row of a task; raises ValueError if the task is unknown."""
        if name not in self.names:
            others = len(self.names) - MOST_NAMED
            more = f" and {others} more" if others > 0 else ""
            listed = ", ".join(self.names[:MOST_NAMED])
            raise ValueError(f"Unknown task {name!r}; choose one of {listed}{more}.")
        return self.names.index(name)

    def predict(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Any, Any]:
        """Returns greedy continuations, int32 [B, L] with 0 after the end of sequence, and their
        log probabilities [B] in nats.

        Args:
            texts: B lists of token ids, each ending with the end-of-sequence id.
            rows: the row of each text's task (see `row`).

        Raises:
            ValueError: a row does not exist, or a text is too long.
        """
        return self._call("predict", texts, rows)

    def score(
        self,
        texts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Any:
        """Returns the log probability [B] of one target per text, in nats. The arguments and errors
        are as in `predict`; `targets` are lists of token ids like `texts`."""
        length = self.config["target_length"]
        return self._call("score", texts, rows, _padded(targets, length, "targets"))

    def _call(
        self, name: str, texts: Sequence[Sequence[int]], rows: Sequence[int], *others: np.ndarray
    ) -> Any:
        # The function does not check rows: others are prompts of zeros, or another task's.
        if unknown := [row for row in rows if not 0 <= row < len(self.names)]:
            raise ValueError(
                f"There is no row {unknown[0]}: the {len(self.names)} tasks have rows 0 to "
                f"{len(self.names) - 1}, in the order of `names`. Get the row of a task with "
                "`row(name)`."
            )
        lengths = sorted(length for function, length in self._functions if function == name)
        longest = max(map(len, texts))
        length = next((n for n in lengths if n >= longest), lengths[-1])
        tokens = _padded(texts, length, "texts")
        function = self._functions[name, length]
        return function(self.backbone, self.prompts, tokens, *others, np.asarray(rows, np.int32))

    def _bytes(self, file: str) -> bytearray:
        return bytearray(self._checked(self.folder / file, file))

    def _arrays(self, path: Path, name: str) -> Mapping[str, jax.Array]:
        if not path.exists():
            advice = "Copy the file again."
            if name == BACKBONE:
                advice = (
                    "If the folder was written with --without-weights, pass the path of the "
                    f"{BACKBONE} of another export as `backbone`. Otherwise copy the file again."
                )
            raise FileNotFoundError(f"{path} does not exist. {advice}")
        return {
            leaf: jnp.asarray(np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]))
            for leaf, x in deserialize(self._checked(path, name))
        }

    def _checked(self, path: Path, name: str) -> bytes:
        content = path.read_bytes()
        digest, expected = hashlib.sha256(content).hexdigest(), self.config["files_sha256"][name]
        if digest != expected:
            other = ", or take it from an export with the same backbone and dtype"
            raise ValueError(
                f"{path} is not the file that was exported: its sha256 is {digest}, but {CONFIG} "
                f"records {expected}. Copy the file again{other if name == BACKBONE else ''}."
            )
        return content


def load(
    folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
) -> Exported:
    """Loads an exported model. The arguments and errors are those of `Exported`."""
    return Exported(folder, backbone)


def _padded(texts: Sequence[Sequence[int]], length: int, what: str) -> np.ndarray:
    if (longest := max(map(len, texts))) > length:
        option = "--target-length" if what == "targets" else "--input-lengths"
        raise ValueError(
            f"The longest of the {what} has {longest} tokens; the limit is {length}. Shorten it, "
            f"or export again with a larger {option}."
        )
    tokens = np.zeros((len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    return tokens

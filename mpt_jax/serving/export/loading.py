"""Loader of exported folders. Needs only JAX, flatbuffers, NumPy and safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import SafetensorError, deserialize

CONFIG = "config.json"
BACKBONE = "backbone.safetensors"
PROMPTS = "prompts.safetensors"
FORMAT = 1
IMAGES = "images"  # field of config.json of an export that scores images
SCORE = "score.jax"  # its function
SEEN = "seen"  # field of `IMAGES` of an export with lanes
SCORE_SEEN = "score_seen.jax"  # its second function
SEAL = "config_sha256"  # the digest of the other fields of config.json
MOST_NAMED = 20  # names that an error lists; it only counts the others
# The dtypes that are written. safetensors' reader of bytes, unlike that of files, has no bfloat16.
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "I32": np.int32}

# The only operations outside StableHLO that exported functions contain. Others could call any code
# that is registered in the process, with pointers from the file.
CUSTOM_CALLS = frozenset({"@shape_assertion"})

ADVICE = "Copy the folder again, or export the prompts again."


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
        FileNotFoundError, ValueError: a file is missing or was changed, the export format is not
            supported, or a function calls code outside StableHLO.
    """

    def __init__(
        self, folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
    ):
        self.folder = Path(folder)
        if not (self.folder / CONFIG).exists():
            raise FileNotFoundError(
                f"{folder} has no {CONFIG}. Create the folder with `mpt-jax export`."
            )
        self.config = _config(self.folder / CONFIG)
        if self.config.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has export format {self.config.get('format')!r}, but this version of "
                f"MPT-JAX reads format {FORMAT}. Export the prompts again with this version."
            )
        _check_config(self.config, self.folder / CONFIG)
        _check_seal(self.config, self.folder / CONFIG)
        self.names: list[str] = self.config["names"]
        self.backbone = self._arrays(Path(backbone or self.folder / BACKBONE), BACKBONE)
        self.prompts = self._arrays(self.folder / PROMPTS, PROMPTS)
        self._score_images, functions = None, self.config.get("functions", {})
        self._score_seen = None
        if IMAGES in self.config:
            self._score_images, functions = jax.jit(self._function(SCORE).call), {}
            if SEEN in self.config[IMAGES]:
                self._score_seen = jax.jit(self._function(SCORE_SEEN).call)
        self._functions = {
            (name, int(length)): jax.jit(self._function(file).call)
            for name, files in functions.items()
            for length, file in files.items()
        }

    def row(self, name: str) -> int:
        """Returns the row of a task; raises ValueError if the task is unknown."""
        if name not in self.names:
            others = len(self.names) - MOST_NAMED
            more = f" and {others} more" if others > 0 else ""
            listed = ", ".join(self.names[:MOST_NAMED])
            raise ValueError(f"Unknown task {name!r}. Choose one of {listed}{more}.")
        return self.names.index(name)

    def predict(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Any, Any]:
        """Returns greedy continuations, int32 [B, L] with 0 after the end of sequence, and their
        log probabilities [B] in nats.

        Args:
            texts: B lists of token ids, each ending with the end-of-sequence id.
            rows: the row of each text's task (see `row`).

        Raises:
            ValueError: the export is of images, a row does not exist, or a text is too long.
        """
        self._check_of_texts()
        return self._call("predict", texts, rows)

    def score(
        self,
        texts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Any:
        """Returns the log probability [B] of one target per text, in nats. The arguments and errors
        are as in `predict`; `targets` are lists of token ids like `texts`."""
        self._check_of_texts()
        length = self.config["target_length"]
        return self._call("score", texts, rows, _padded(targets, length, "targets"))

    def score_images(self, images: np.ndarray, rows: Sequence[int]) -> Any:
        """Returns the log probability [B, C] of every class of each image's task, in nats; minus
        infinity at classes that the task does not have.

        Args:
            images: uint8 [B, S, S, 3], resized as `config['images']['transform']` says.
            rows: the row of each image's task (see `row`).

        Raises:
            ValueError: the export is of texts, a row does not exist, or images have another shape.
        """
        if self._score_images is None:
            raise ValueError(f"{self.folder} is an export of texts. Call predict or score.")
        return self._call_of_images(self._score_images, images, rows)

    def score_seen(self, images: np.ndarray, rows: Sequence[int]) -> Any:
        """Returns the log probability [B, N] of the classes of all lanes in each image's sequence,
        in nats; minus infinity at those of other sequences. Column c is the class
        `config['images']['seen']['classes'][c]`, a pair of a lane and a class.

        Args:
            images: as in `score_images`.
            rows: the row of any lane of each image's sequence (see `row`).

        Raises:
            ValueError: the export has no lanes, a row does not exist, or images have another shape.
        """
        if self._score_seen is None:
            raise ValueError(f"{self.folder} has no lanes. Export artifacts of MULTI-LANE.")
        return self._call_of_images(self._score_seen, images, rows)

    def _call_of_images(self, function: Any, images: np.ndarray, rows: Sequence[int]) -> Any:
        self._check_rows(rows)
        size = self.config[IMAGES]["transform"]["size"]
        if images.dtype != np.uint8 or images.shape != (len(rows), size, size, 3):
            raise ValueError(
                f"images must be uint8 [{len(rows)}, {size}, {size}, 3], one for each row, got "
                f"{images.dtype} {list(images.shape)}. Resize them as config.json says."
            )
        numbers = np.asarray(rows, np.int32)
        return function(self.backbone, self.prompts, images, numbers)

    def _check_of_texts(self) -> None:
        if self._score_images is not None:
            raise ValueError(f"{self.folder} is an export of images. Call score_images.")

    def _check_rows(self, rows: Sequence[int]) -> None:
        # The functions do not check rows: others are prompts of zeros, or another task's.
        if unknown := [row for row in rows if not 0 <= row < len(self.names)]:
            raise ValueError(
                f"There is no row {unknown[0]}: the {len(self.names)} tasks have rows 0 to "
                f"{len(self.names) - 1}, in the order of `names`. Get the row of a task with "
                "`row(name)`."
            )

    def _call(
        self, name: str, texts: Sequence[Sequence[int]], rows: Sequence[int], *others: np.ndarray
    ) -> Any:
        self._check_rows(rows)
        lengths = sorted(length for function, length in self._functions if function == name)
        longest = max(map(len, texts))
        length = next((n for n in lengths if n >= longest), lengths[-1])
        tokens = _padded(texts, length, "texts")
        function = self._functions[name, length]
        return function(self.backbone, self.prompts, tokens, *others, np.asarray(rows, np.int32))

    def _function(self, file: str) -> export.Exported:
        path = self.folder / file
        content = bytearray(self._checked(path, file))
        try:
            function = export.deserialize(content)
            module = function.mlir_module()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever the reader of the format raises
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not an exported function ({reason}). {ADVICE}") from error
        targets = re.findall(r'custom_call\b"?\s*(@"[^"]*"|@[\w.$-]+|)', module)
        if others := sorted(set(targets) - CUSTOM_CALLS):
            raise ValueError(
                f"{path} calls code outside StableHLO ({', '.join(others)[:200] or 'unnamed'}), "
                f"which no export of MPT-JAX does. {ADVICE}"
            )
        return function

    def _arrays(self, path: Path, name: str) -> Mapping[str, jax.Array]:
        if not path.exists():
            advice = "Copy the file again."
            if name == BACKBONE:
                advice = (
                    "If the folder was written with --without-weights, pass the path of the "
                    f"{BACKBONE} of another export as `backbone`. Otherwise copy the file again."
                )
            raise FileNotFoundError(f"{path} does not exist. {advice}")
        content = self._checked(path, name)
        try:
            return {
                leaf: jnp.asarray(np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]))
                for leaf, x in deserialize(content)
            }
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is not a file of an export ({error}). {ADVICE}") from error

    def _checked(self, path: Path, name: str) -> bytes:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist. {ADVICE}")
        content = path.read_bytes()
        digest, expected = hashlib.sha256(content).hexdigest(), self.config["files_sha256"][name]
        if digest != expected:
            other = ", or take it from an export with the same backbone and dtype"
            raise ValueError(
                f"{path} differs from the file that was exported: its sha256 is {digest}, but "
                f"{CONFIG} records {expected}. Copy the file "
                f"again{other if name == BACKBONE else ''}."
            )
        return content


def load(
    folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None = None
) -> Exported:
    """Loads an exported model. The arguments and errors are as in `Exported`."""
    return Exported(folder, backbone)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} cannot be parsed as JSON ({reason}). {ADVICE}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object. {ADVICE}")
    return config


def _check_seal(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError if config.json was changed after its digest was recorded; see
    `mpt_jax.core.schema.sealed`. Exports of earlier versions have no digest, and pass."""
    content = json.dumps({name: value for name, value in config.items() if name != SEAL})
    digest, expected = hashlib.sha256(content.encode()).hexdigest(), config.get(SEAL)
    if expected not in (None, digest):
        raise ValueError(
            f"{path} was changed after it was written: the sha256 of its other fields is {digest}, "
            f"but its {SEAL} is {str(expected)[:80]}. Undo the change, copy the file again, or "
            "export the prompts again."
        )


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError if a field that the loader uses is missing or invalid. Does not use a
    schema of MPT-JAX, so that this file works without the package."""
    names, length = config.get("names"), config.get("target_length")
    functions: Any = config.get("functions")
    digests: Any = config.get("files_sha256")
    is_names = isinstance(names, list) and names and all(isinstance(x, str) for x in names)
    is_table = isinstance(functions, dict) and all(
        isinstance(files, dict)
        and files
        and all(_is_length(key) and _is_file(file) for key, file in files.items())
        for files in functions.values()
    )
    is_digests = isinstance(digests, dict) and {BACKBONE, PROMPTS} <= set(digests)
    named = [x for files in functions.values() for x in files.values()] if is_table else []
    checks = {
        "names": is_names,
        "target_length": type(length) is int and 0 < length < 2**31,
        "functions": is_table and {"predict", "score"} <= set(functions),
        "files_sha256": is_digests and set(named) <= set(digests),
    }
    if IMAGES in config:
        images = config[IMAGES]
        scores = {SCORE, SCORE_SEEN} if isinstance(images, dict) and SEEN in images else {SCORE}
        checks = {
            "names": is_names,
            IMAGES: _is_images(images),
            "files_sha256": is_digests and scores <= set(digests),
        }
    for field, valid in checks.items():
        if not valid:
            problem = "is missing"
            if field in config:
                problem = f"has the invalid value {str(config[field])[:80]}"
            raise ValueError(f"The field {field} of {path} {problem}. {ADVICE}")


def _is_images(images: Any) -> bool:
    transform = images.get("transform") if isinstance(images, dict) else None
    size = transform.get("size") if isinstance(transform, dict) else None
    return type(size) is int and 0 < size < 2**15


def _is_length(key: str) -> bool:
    return key.isascii() and key.isdecimal() and 0 < int(key[:10]) < 2**31 and len(key) < 11


def _is_file(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name


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

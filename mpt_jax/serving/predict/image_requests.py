"""Parser of requests about images.

    {"task": NAME, "image": PATH}               the most probable class
    {"task": NAME, "image_base64": TEXT}        the same, with the content of the file
    {"sequence": NAME, "image": PATH}           among the classes of all lanes beside lane NAME
    {"task": NAME, "image": PATH, "classes": [TEXT, ...]}
                                                among these classes, in the context of the task

Any request may have an "id" of any JSON type. The answer repeats it. In mode 'score', the answer
has the score of every class.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.batching import images
from mpt_jax.core import schema
from mpt_jax.core.runs import unknown_name
from mpt_jax.serving.predict.requests import MODES, Failure, label_of, object_of, text_of

FIELDS = ("task", "sequence", "image", "image_base64", "classes", "id")
MOST_CLASSES = 1_000  # of a request
MOST_CHARACTERS = 250  # of a class name
MOST_BYTES = 2**25  # of an encoded image
MOST_LINE_BYTES = MOST_BYTES * 4 // 3 + 2**20  # base64 writes 3 bytes as 4


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """A request that can be answered.

    Attributes:
        label: the first fields of the answer, as in `requests.Request`.
        row: the row of the task.
        image: uint8 [S,S,3].
        all_scores: whether the answer has the score of every class.
        seen: whether the classes are those of all lanes in the sequence of the row.
        classes: the names of the classes; None for those of the task.
    """

    label: Mapping[str, Any]
    row: int
    image: np.ndarray
    all_scores: bool = False
    seen: bool = False
    classes: tuple[str, ...] | None = None


class ImageReader:
    """Parser of requests.

    Args:
        names: the names of the tasks, in the order of the rows.
        transform: the settings of the image transform: `size`, `mode`, `resize_to`.
        mode: `'predict'` or `'score'`.
        lanes: whether rows are lanes, so that requests can name a sequence.
        no_classes: why requests cannot bring class names; None if they can.
    """

    def __init__(
        self,
        names: Sequence[str],
        transform: Mapping[str, Any],
        mode: str = "predict",
        lanes: bool = False,
        no_classes: str | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"Unknown mode {mode!r}. Set it to {' or '.join(MODES)}.")
        self._rows = {name: row for row, name in enumerate(names)}
        settings = ("size", "mode", "resize_to")
        self._transform: dict[str, Any] = {name: transform.get(name) for name in settings}
        self._mode, self._lanes, self._no_classes = mode, lanes, no_classes

    def read(self, line: bytes, number: int) -> ImageRequest | Failure:
        """Parses line `number`, counted from 1. Returns a `Failure` if the line is invalid."""
        fields = object_of(line, number, MOST_LINE_BYTES)
        if isinstance(fields, Failure):
            return fields
        label = label_of(fields, number)
        try:
            return self._request(fields, label)
        except (ValueError, OSError) as error:
            return Failure(label, str(error))

    def _request(self, fields: Mapping[str, Any], label: Mapping[str, Any]) -> ImageRequest:
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise ValueError(
                f"Unknown fields {schema.short(unknown)}. Known fields: {', '.join(FIELDS)}. "
                "Use id for a value that the answer should repeat."
            )
        row, seen = self._row(fields)
        classes = self._classes(fields)
        image = images.transform(images.decode(_content(fields)), **self._transform)
        return ImageRequest(label, row, image, self._mode == "score", seen, classes)

    def _row(self, fields: Mapping[str, Any]) -> tuple[int, bool]:
        """Returns the row that a request names, and whether it names the sequence of the row."""
        seen = "sequence" in fields
        if seen and "task" in fields:
            raise ValueError(
                "A request has either task, for the classes of one lane, or sequence, for those of "
                "all lanes. Omit one of them."
            )
        if seen and not self._lanes:
            raise ValueError(
                "The field sequence needs prompts with lanes (MULTI-LANE), and these have none. "
                "Use task."
            )
        what = "sequence" if seen else "task"
        name = text_of(fields, what)
        if name not in self._rows:
            raise ValueError(unknown_name(what, schema.short(name), list(self._rows)))
        return self._rows[name], seen

    def _classes(self, fields: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Returns the class names of a request; None if it has none."""
        if "classes" not in fields:
            return None
        if self._no_classes is not None:
            raise ValueError(
                f"The field classes does not work with these prompts, since {self._no_classes}. "
                "Omit it."
            )
        names = fields["classes"]
        if not isinstance(names, list) or not 2 <= len(names) <= MOST_CLASSES:
            raise ValueError(
                f"classes is {schema.short(names)}. Write a list of 2 to {MOST_CLASSES:,} names."
            )
        for name in names:
            if not isinstance(name, str) or not 0 < len(name.strip()) <= MOST_CHARACTERS:
                raise ValueError(
                    f"The class name {schema.short(name)} is not a text of 1 to "
                    f"{MOST_CHARACTERS:,} characters. Correct it."
                )
        return tuple(names)


def _content(fields: Mapping[str, Any]) -> bytes:
    """Returns the encoded image of a request.

    Raises:
        ValueError: the request has no image or two, the file is not regular, cannot be read or is
            too large, or the text is not base64.
    """
    if ("image" in fields) == ("image_base64" in fields):
        raise ValueError(
            "A request needs either image, the path of a file, or image_base64, the content of one."
        )
    if "image_base64" in fields:
        text = text_of(fields, "image_base64")
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"image_base64 is not base64 ({error}). Encode the file.") from error
        size = len(content)
    else:
        path = Path(text_of(fields, "image"))
        try:
            size, content = _read(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"image {schema.short(str(path))} cannot be read: {reason}."
            ) from error
    if size > MOST_BYTES:
        raise ValueError(
            f"The image has {size:,} bytes, and the limit is {MOST_BYTES:,}. Save a smaller file."
        )
    return content


def _read(path: Path) -> tuple[int, bytes]:
    """Returns the size of a file and its content; of a file that is too large, at most
    `MOST_BYTES` + 1 bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the path is invalid, or not of a regular file.
    """
    status = path.stat()
    # A device can be endless, and a FIFO can block.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > MOST_BYTES:
        return status.st_size, b""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)  # the size may be out of date, or 0 as in /proc
    return len(content), content

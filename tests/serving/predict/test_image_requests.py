"""Requests about images: what is read, and every error that a line can have."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpt_jax.serving.predict import image_requests
from mpt_jax.serving.predict.image_requests import ImageReader, ImageRequest
from mpt_jax.serving.predict.requests import Failure
from tests.fixtures.image_files import encoded, noise, png

PIXELS = noise(8, 8)
PNG = encoded(PIXELS, "PNG")
TEXT = base64.b64encode(PNG).decode()
TRANSFORM = {"kind": "transform", "size": 8, "mode": "crop", "resize_to": None}
READER = ImageReader(("pets", "shapes"), TRANSFORM)


def read(fields, reader=READER):
    line = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return reader.read(line, 3)


@pytest.mark.parametrize("mode", ["predict", "score"])
def test_read_path_and_base64(mode, tmp_path):
    path = tmp_path / "ä image.png"
    path.write_bytes(PNG)
    reader = ImageReader(("pets", "shapes"), TRANSFORM, mode)
    for fields in ({"image": str(path)}, {"image_base64": TEXT}):
        found = read({"task": "shapes", "id": [None], **fields}, reader)
        assert isinstance(found, ImageRequest)
        assert found.label == {"line": 3, "id": [None]} and found.row == 1
        assert found.all_scores == (mode == "score")
        np.testing.assert_array_equal(found.image, PIXELS)


@pytest.mark.parametrize(
    ("settings", "box"),
    [({"mode": "crop", "resize_to": None}, (8, 0, 24, 16)), ({"mode": "squash"}, None)],
)
def test_read_applies_the_transform(settings, box):
    image = Image.fromarray(noise(16, 32))
    found = read(
        {"task": "pets", "image_base64": base64.b64encode(encoded(image, "PNG")).decode()},
        ImageReader(("pets",), {"size": 8, **settings}),
    )
    assert isinstance(found, ImageRequest)
    bicubic = Image.Resampling.BICUBIC
    narrow = (image.crop(box) if box else image).resize((8, 16), bicubic)
    difference = np.abs(np.asarray(narrow.resize((8, 8), bicubic)).astype(int) - found.image)
    inner = difference[:, 2:-2] if box else difference  # the filter reads beyond the crop
    assert inner.max() <= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "pest", "image_base64": TEXT}, "Unknown task 'pest'. Did you mean 'pets'"),
        ({"task": "x" * 10**5, "image_base64": TEXT}, "Unknown task 'xxx"),
        ({"image_base64": TEXT}, "task"),
        ({"task": 3, "image_base64": TEXT}, "task"),
        ({"task": "pets"}, "A request needs either image, the path of a file, or image_base64"),
        ({"task": "pets", "image": "x", "image_base64": TEXT}, "A request needs either image"),
        ({"task": "pets", "image": "/none/x.png"}, "image /none/x.png cannot be read: No such"),
        ({"task": "pets", "image": "/"}, "image / cannot be read: it is not a regular file."),
        ({"task": "pets", "image": "a\0b"}, "cannot be read: .*null"),
        ({"task": "pets", "image": "x" * 10**5}, "cannot be read: File name too long"),
        ({"task": "pets", "image": "\ud800"}, "cannot be read: "),
        ({"task": "pets", "image": ["x"]}, "image"),
        ({"task": "pets", "image_base64": "%%%"}, "image_base64 is not base64 .*Encode the file."),
        ({"task": "pets", "image_base64": TEXT[:-1]}, "image_base64 is not base64"),
        ({"task": "pets", "image_base64": "é"}, "image_base64 is not base64"),
        ({"task": "pets", "image_base64": ""}, "image"),
        ({"task": "pets", "image_base64": "aGVsbG8="}, "not a JPEG, PNG, GIF or BMP image. Save"),
        ({"task": "pets", "image_base64": TEXT[:80]}, "The image is damaged"),
        ({"task": "pets", "inputs": "x", "image_base64": TEXT}, "Unknown fields .*inputs.*Known"),
        (b"nope", "JSON"),
        (b"", "."),
        (b"[1]", "object"),
    ],
    ids=lambda x: None if isinstance(x, str) else repr(x)[:60],
)
def test_read_bad_line_is_a_failure_with_a_sentence(fields, says):
    found = read(fields)
    assert isinstance(found, Failure) and found.label == {"line": 3}
    assert re.search(says, found.error), found.error
    assert found.error.endswith((".", "?")) and len(found.error) < 1000


def test_read_failure_repeats_the_id():
    found = read({"task": "pets", "id": {"a": 1}})
    assert isinstance(found, Failure) and found.label == {"line": 3, "id": {"a": 1}}


def test_read_oversized_file_fails_before_it_is_read(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    found = read({"task": "pets", "image": str(path)})
    assert isinstance(found, Failure)
    assert found.error.startswith("The image has 1,099,511,627,776 bytes, and the limit is 33,554,")


@pytest.mark.parametrize("kind", ["device", "fifo"])
def test_read_file_that_is_not_regular_fails_without_opening_it(kind, tmp_path, monkeypatch):
    """It would fill the memory, or wait for a writer."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("open", "read_bytes"):
        monkeypatch.setattr(Path, name, lambda path, *_: pytest.fail(f"{path} was opened"))
    path = {"device": "/dev/zero", "fifo": str(tmp_path / "fifo")}[kind]
    found = read({"task": "pets", "image": path})
    assert isinstance(found, Failure)
    assert found.error == f"image {path} cannot be read: it is not a regular file."


def test_read_file_of_unknown_size_is_bounded(tmp_path, monkeypatch):
    """A file of /proc has the size 0, and a file can grow after its size was read."""
    monkeypatch.setattr(image_requests, "MOST_BYTES", 10)
    found = read({"task": "pets", "image": "/proc/self/status"})
    assert isinstance(found, Failure)
    assert found.error.startswith("The image has 11 bytes, and the limit is 10.")


def test_read_oversized_content_and_pixels_fail(monkeypatch):
    monkeypatch.setattr(image_requests, "MOST_BYTES", len(PNG) - 1)
    found = read({"task": "pets", "image_base64": TEXT})
    assert isinstance(found, Failure) and f"has {len(PNG):,} bytes, and the limit" in found.error
    large = base64.b64encode(png(10_000, 10_000, b"")).decode()
    found = read({"task": "pets", "image_base64": large})
    assert isinstance(found, Failure) and "too many pixels" in found.error


def test_read_base64_of_a_file_of_the_maximum_size():
    """PNG readers ignore what follows the last chunk."""
    content = PNG.ljust(image_requests.MOST_BYTES, b"\0")
    found = read({"task": "pets", "image_base64": base64.b64encode(content).decode()})
    assert isinstance(found, ImageRequest), found.error
    np.testing.assert_array_equal(found.image, PIXELS)
    found = read(b" " * (image_requests.MOST_LINE_BYTES + 1) + b"{}")
    assert isinstance(found, Failure) and "at most 45,787,818 are read" in found.error


def test_reader_unknown_mode_fails():
    with pytest.raises(ValueError, match="Unknown mode 'rank'. Set it to predict or score"):
        ImageReader(("pets",), TRANSFORM, "rank")

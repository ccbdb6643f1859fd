"""Images for callers without TensorFlow: decoding and the evaluation transform, with Pillow.

`data/image_transforms.py` does the same in tf.data; its pixels differ from these by at most one
level, and by two where a value is an exact half before it is rounded.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS, MAX_EDGE = 2**26, 2**16  # of one image, as in data/image_formats.py
FORMATS = ("JPEG", "PNG", "GIF", "BMP")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image to RGB. Transparency and EXIF orientation are ignored, and an animation is
    represented by its first frame. 16-bit values are reduced to their high byte.

    Raises:
        ValueError: the content is not an image of a known format, is damaged, or has more than
            `MAX_PIXELS` pixels or a longer edge than `MAX_EDGE`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_EDGE:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except _BOMBS as error:
        raise ValueError(
            f"The image has too many pixels ({error}), and the limit is {MAX_PIXELS:,}, and "
            f"{MAX_EDGE:,} for an edge. Save it with fewer pixels."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"The content is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image. Save the "
            "image in one of these formats."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"The image is damaged ({error}). Save it again, or copy it from an intact copy."
        ) from error


def transform(
    image: Image.Image, size: int, mode: str = "crop", resize_to: int | None = None
) -> np.ndarray:
    """Returns the pixels that a backbone reads, uint8 [S,S,3].

    Args:
        image: an RGB image. One of S x S pixels is returned unchanged, unless `resize_to` is
            larger.
        size: S.
        mode: `'crop'` resizes the shorter edge to `resize_to` and crops the center; `'squash'`
            resizes both edges to S.
        resize_to: the length of the shorter edge before the crop; None for S.
    """
    if image.size == (size, size) and resize_to in (None, size):
        return np.asarray(image)
    width = height = size
    if mode != "squash":
        edge, shorter = resize_to or size, min(image.size)
        width, height = (edge * length // shorter for length in image.size)
    left, right = _interval(image.width, width, size)
    top, bottom = _interval(image.height, height, size)
    # The bicubic filter reads two pixels on each side, or more if the image shrinks.
    margin = 2 * max(image.height / height, 1) + 1
    first, last = max(math.floor(top - margin), 0), min(math.ceil(bottom + margin), image.height)
    rows = image.crop((0, first, image.width, last))
    # The width first in every version of Pillow, and only the pixels of the crop: the other pixels
    # of a long image could take more memory than the machine has.
    columns = rows.resize(
        (size, rows.height), Image.Resampling.BICUBIC, box=(left, 0, right, rows.height)
    )
    box = (0, top - first, size, bottom - first)
    return np.asarray(columns.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _interval(length: int, resized: int, size: int) -> tuple[float, float]:
    """Returns where the central `size` of `resized` pixels begin and end along an edge of the image
    with `length` pixels."""
    # Half of an odd margin is rounded to the even number, as torchvision does.
    first = round((resized - size) / 2)
    return first * length / resized, min((first + size) * length / resized, length)

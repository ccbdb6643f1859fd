"""Images for callers without TensorFlow: decoding and the evaluation transform, with Pillow.

`data/image_transforms.py` does the same in tf.data; its pixels differ from these by at most one
level, except at sizes that Pillow 13 resizes in the other order of axes.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**26  # of one image, as in data/image_formats.py
FORMATS = ("JPEG", "PNG", "GIF", "BMP")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image to RGB. Transparency and EXIF orientation are ignored, and an animation is
    represented by its first frame.

    Raises:
        ValueError: the content is not an image of a known format, is damaged, or has more than
            `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"The image has {image.width} x {image.height} pixels, and the limit is "
                    f"{MAX_PIXELS:,}. Save it with fewer pixels."
                )
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(
            f"The content is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image. Save the "
            "image in one of these formats."
        ) from error
    except (OSError, SyntaxError, *_BOMBS) as error:
        raise ValueError(
            f"The image is damaged ({error}). Save it again, or copy it from an intact copy."
        ) from error


def transform(
    image: Image.Image, size: int, mode: str = "crop", resize_to: int | None = None
) -> np.ndarray:
    """Returns the pixels that a backbone reads, uint8 [S,S,3].

    Args:
        image: an RGB image. One of S x S pixels is returned unchanged.
        size: S.
        mode: `'crop'` resizes the shorter edge to `resize_to` and crops the center; `'squash'`
            resizes both edges to S.
        resize_to: the length of the shorter edge before the crop; None for S.
    """
    if image.size != (size, size):
        if mode == "squash":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            edge, shorter = resize_to or size, min(image.size)
            width, height = (edge * length // shorter for length in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            # Half of an odd margin is rounded to the even number, as torchvision does.
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)

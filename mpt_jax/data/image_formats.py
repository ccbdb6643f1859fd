"""Decoder of JPEG, PNG, GIF and BMP files, with checks of the header before any pixel is decoded.

Pixels are those of Pillow's `Image.open(file).convert("RGB")`: transparency and EXIF orientation
are ignored, and an animation is represented by its first frame. 16-bit values are reduced to their
high byte, also in gray images, where Pillow clips them.
"""

from __future__ import annotations

import struct

import numpy as np
import tensorflow as tf

MAX_PIXELS = 2**26  # of one image, which takes 192 MiB decoded; a 60-megapixel photo passes
MAX_EDGE = 2**16  # pixels: resizing the width of a long image takes memory for each of its rows

_REPLACE = "Replace the image, or remove the example from the data."
_SAVE_AS_PNG = "Save the image as PNG."
_GRAPHIC_CONTROL = 0xF9  # an extension block of GIF
_BITFIELDS = 3  # a compression of BMP: uncompressed, with a mask for each color
_USUAL_MASKS = (0xFF0000, 0xFF00, 0xFF)


def pixels(encoded: bytes) -> np.ndarray:
    """Decodes an image.

    Args:
        encoded: the content of the file.

    Returns:
        RGB values, uint8 [h, w, 3].

    Raises:
        ValueError: the image cannot be decoded, or has more than `MAX_PIXELS` pixels or a longer
            edge than `MAX_EDGE`. The message starts with a clause ('its JPEG data is truncated or
            damaged'), and says what to do.
    """
    found = next((x for x in _FORMATS if encoded.startswith(x[0])), None)
    if found is None:
        start = f"it starts with the bytes {encoded[:4].hex(' ')}" if encoded else "it is empty"
        raise ValueError(f"{start}, so it is not a JPEG, PNG, GIF or BMP image. {_REPLACE}")
    _, name, decode = found
    try:
        return decode(encoded)
    except (tf.errors.InvalidArgumentError, struct.error, IndexError) as error:
        raise ValueError(f"its {name} data is truncated or damaged. {_REPLACE}") from error


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"its header announces {width} x {height} pixels. {_REPLACE}")
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels, and the limit for an image is {MAX_PIXELS:,}. Save "
            "it with fewer pixels."
        )
    if max(height, width) > MAX_EDGE:
        raise ValueError(
            f"it has {width} x {height} pixels, and the limit for an edge is {MAX_EDGE:,}. Crop it "
            "to a shorter one."
        )


def _jpeg(encoded: bytes) -> np.ndarray:
    height, width, _ = tf.io.extract_jpeg_shape(encoded).numpy().tolist()  # reads the header only
    _check_size(height, width)
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()


def _png(encoded: bytes) -> np.ndarray:
    width, height = struct.unpack_from(">II", encoded, 16)
    _check_size(height, width)
    return tf.io.decode_png(encoded, channels=3).numpy()


def _gif(encoded: bytes) -> np.ndarray:
    screen_width, screen_height = struct.unpack_from("<HH", encoded, 6)
    position = header = 13 + _color_table(encoded[10])
    background = 0  # what Pillow draws around a frame that does not fill the screen
    while encoded[position] != ord(","):
        if encoded[position] != ord("!"):
            raise IndexError("the file has no frame")
        if encoded[position + 1] == _GRAPHIC_CONTROL and encoded[position + 3] & 1:
            background = encoded[position + 6]
        position = _after_data(encoded, position + 2)
    left, top, width, height, flags = struct.unpack_from("<HHHHB", encoded, position + 1)
    screen_height, screen_width = max(screen_height, top + height), max(screen_width, left + width)
    _check_size(screen_height, screen_width)
    end = _after_data(encoded, position + 11 + _color_table(flags))
    # The first frame at (0, 0), since TensorFlow decodes all frames and cuts off what is beyond the
    # largest. Without extensions: one of them makes pixels transparent, which become black.
    block = b",\0\0\0\0" + encoded[position + 5 : end]
    frame = tf.io.decode_gif(encoded[:header] + block + b";").numpy()[0]
    table = (position + 10 if flags & 0x80 else 13) + 3 * background
    screen = np.empty((screen_height, screen_width, 3), np.uint8)
    screen[:] = np.frombuffer(encoded[table : table + 3].ljust(3, b"\0"), np.uint8)
    screen[top : top + height, left : left + width] = frame
    return screen


def _color_table(flags: int) -> int:
    """Returns the number of bytes of the color table that the flags of a GIF block announce."""
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _after_data(encoded: bytes, position: int) -> int:
    """Returns the position after a sequence of data blocks of a GIF, each led by its size."""
    while size := encoded[position]:
        position += 1 + size
    return position + 1


def _bmp(encoded: bytes) -> np.ndarray:
    start, header, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", encoded, 10)
    if header < 40:
        raise ValueError(f"it is a BMP image with a header of {header} bytes. {_SAVE_AS_PNG}")
    _check_size(abs(height), width)
    masks = struct.unpack_from("<III", encoded, 54) if compression == _BITFIELDS else _USUAL_MASKS
    plain = compression == 0 or (compression == _BITFIELDS and masks == _USUAL_MASKS)
    if bits not in (8, 24, 32) or not plain:
        raise ValueError(
            f"it is a BMP image of {bits} bits per pixel and compression {compression}, but only "
            f"uncompressed images of 8, 24 or 32 bits can be read. {_SAVE_AS_PNG}"
        )
    values = tf.io.decode_bmp(encoded).numpy()
    if bits != 8:
        return values[..., :3]
    table = encoded[14 + header : start]
    colors = np.zeros((256, 4), np.uint8)  # blue, green, red, unused; missing entries are black
    given = np.frombuffer(table[: min(len(table) // 4, 256) * 4], np.uint8).reshape(-1, 4)
    colors[: len(given)] = given
    return colors[:, 2::-1][values[..., 0]]


# (first bytes of a file, name of its format, decoder)
_FORMATS = (
    (b"\xff\xd8\xff", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
)

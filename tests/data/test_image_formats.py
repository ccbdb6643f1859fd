"""Decoding image files: pixels of Pillow, damaged files, and files that are too large."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from mpt_jax.data import image_formats
from tests.fixtures.image_files import encoded, moved_gif, noise, photo, png, png_16_bit

PHOTO = photo(43, 61)
RGB = Image.fromarray(PHOTO)
ALPHA = RGB.copy()
ALPHA.putalpha(Image.fromarray(noise(43, 61, 1)[..., 0]))
PALETTE = RGB.quantize(50)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: rotate by 90 degrees

FILES = {
    "jpeg": encoded(RGB, "JPEG", quality=90),
    "jpeg 4:2:0": encoded(RGB, "JPEG", subsampling=2),
    "jpeg progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg gray": encoded(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg exif": encoded(RGB, "JPEG", exif=ROTATED),
    "png": encoded(RGB, "PNG"),
    "png gray": encoded(RGB.convert("L"), "PNG"),
    "png black and white": encoded(RGB.convert("1"), "PNG"),
    "png gray, alpha": encoded(ALPHA.convert("LA"), "PNG"),
    "png alpha": encoded(ALPHA, "PNG"),
    "png palette": encoded(PALETTE, "PNG"),
    "png 4 bit": encoded(RGB.quantize(16), "PNG", bits=4),
    "png transparent color": encoded(PALETTE, "PNG", transparency=3),
    "png 16 bit": png_16_bit(np.random.default_rng(0).integers(0, 2**16, (5, 6, 3))),
    "bmp": encoded(RGB, "BMP"),
    "bmp gray": encoded(RGB.convert("L"), "BMP"),
    "bmp palette": encoded(PALETTE, "BMP"),
    "bmp 32 bit": encoded(ALPHA, "BMP"),
    "gif": encoded(PALETTE, "GIF"),
    "gif gray": encoded(RGB.convert("L"), "GIF"),
    "gif transparent color": encoded(PALETTE, "GIF", transparency=3),
    "gif animated": encoded(
        PALETTE,
        "GIF",
        save_all=True,
        append_images=[RGB.rotate(90).quantize(20)],
        comment=b"c" * 300,
    ),
    **{
        f"{kind} {size}": encoded(RGB.resize(size), kind)
        for kind in ("JPEG", "PNG", "GIF", "BMP")
        for size in ((1, 1), (1, 7), (7, 1))
    },
}
for corner in ((0, 0), (5, 7), (30, 2)):
    FILES[f"gif frame at {corner}"] = moved_gif(FILES["gif"], (80, 45), corner)
    FILES[f"gif transparent frame at {corner}"] = moved_gif(
        FILES["gif transparent color"], (61, 60), corner
    )


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_pillow(name):
    pixels = image_formats.pixels(FILES[name])
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow(FILES[name]))


def test_gray_of_16_bits_keeps_its_high_byte():
    gray = np.random.default_rng(0).integers(0, 2**16, (5, 6)).astype(np.uint16)
    pixels = image_formats.pixels(encoded(Image.fromarray(gray), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat(gray[..., None] >> 8, 3, axis=-1))


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "gif animated", "bmp palette"])
def test_truncated_file_fails(name):
    content = FILES[name]
    end = 1 + content.index(b"!", 1000) if name == "gif animated" else len(content)
    for length in range(12, end, max(1, end // 40)):
        if name.startswith("png") and length > end - 12:  # without its empty last chunk
            continue
        with pytest.raises(ValueError, match="data is truncated or damaged. Replace the image, or"):
            image_formats.pixels(content[:length])


@pytest.mark.parametrize("name", ["jpeg cmyk", "png palette", "gif animated", "bmp", "bmp palette"])
def test_random_damage_gives_pixels_or_one_sentence(name):
    draw = np.random.default_rng(0)
    errors = 0
    for _ in range(200):
        content = bytearray(FILES[name])
        for place in draw.integers(0, [30, len(content), len(content)]):
            content[place] = draw.integers(256)
        try:
            pixels = image_formats.pixels(bytes(content))
        except ValueError as error:
            errors += 1
            assert str(error).startswith(("its ", "it ")) and str(error).endswith((".",))
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert errors > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "it is empty, so it is not a JPEG, PNG, GIF or BMP image. Replace the image, or remove",
        ),
        (b"<html>", "it starts with the bytes 3c 68 74 6d, so it is not"),
        (encoded(RGB, "TIFF"), "it starts with the bytes"),
        (b"\xff\xd8\xffjunk", "its JPEG data is truncated or damaged"),
        (png(2, 0, b""), "its header announces 0 x 2 pixels"),
        (encoded(RGB.convert("1"), "BMP"), "BMP image of 1 bits per pixel and compression 0, but"),
        (b"BM" + bytes(12) + b"\x0c" + bytes(40), "BMP image with a header of 12 bytes. Save the"),
    ],
)
def test_unusable_file_fails(content, message):
    with pytest.raises(ValueError, match=message):
        image_formats.pixels(content)


def _with_size(name: str, width: int, height: int) -> bytes:
    content = bytearray(FILES[name])
    if name == "png":
        return png(height, width, b"")
    if name == "jpeg":
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    elif name == "bmp":
        struct.pack_into("<ii", content, 18, width, height)
    else:
        return moved_gif(bytes(content), (width, height), (0, 0))
    return bytes(content)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp"])
def test_size_is_checked_before_pixels_are_decoded(name):
    limit = f"it has 60000 x 2000 pixels, and the limit for an image is {2**26:,}. Save it with"
    with pytest.raises(ValueError, match=limit):
        image_formats.pixels(_with_size(name, 60000, 2000))
    # A size within the limit is checked only by decoding: of PNG and BMP, since the screen of a GIF
    # may be larger than its frame, and libjpeg fills missing pixels in.
    if name in ("png", "bmp"):
        with pytest.raises(ValueError, match="truncated or damaged"):
            image_formats.pixels(_with_size(name, 6000, 2000))


def test_long_edge_is_refused_before_pixels_are_decoded():
    for width, height in ((2**16 + 1, 1), (2, 2**16 + 1)):
        limit = f"it has {width} x {height} pixels, and the limit for an edge is 65,536. Crop it"
        with pytest.raises(ValueError, match=limit):
            image_formats.pixels(_with_size("png", width, height))


def test_frame_of_gif_is_limited():
    content = bytearray(FILES["gif"])
    frame = content.index(b",", 13 + 3 * 64)
    struct.pack_into("<HH", content, frame + 5, 60000, 2000)
    with pytest.raises(ValueError, match="it has 60000 x 2000 pixels, and the limit"):
        image_formats.pixels(bytes(content))

"""Images without TensorFlow: the pixels of the tf.data transform, and files that cannot be read."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mpt_jax.batching import images
from mpt_jax.data import image_formats
from mpt_jax.data.image_transforms import ImageTransform
from tests.fixtures.image_files import encoded, noise, photo, png, png_16_bit
from tests.fixtures.processes import run_script

PHOTO = photo(43, 61)
RGB = Image.fromarray(PHOTO)
GRAY = RGB.convert("L")
ALPHA = RGB.copy()
ALPHA.putalpha(Image.fromarray(noise(43, 61, 1)[..., 0]))
PALETTE = RGB.quantize(50)
WIDE = np.random.default_rng(0).integers(0, 2**16, (5, 6, 3))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: rotate by 90 degrees
FILES = {
    "jpeg": encoded(RGB, "JPEG"),
    "jpeg progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg gray": encoded(GRAY, "JPEG"),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg exif": encoded(RGB, "JPEG", exif=ROTATED),
    "png": encoded(RGB, "PNG"),
    "png gray": encoded(GRAY, "PNG"),
    "png black and white": encoded(RGB.convert("1"), "PNG"),
    "png gray, alpha": encoded(ALPHA.convert("LA"), "PNG"),
    "png alpha": encoded(ALPHA, "PNG"),
    "png palette": encoded(PALETTE, "PNG"),
    "png transparent color": encoded(PALETTE, "PNG", transparency=3),
    "png 16 bit": png_16_bit(WIDE),
    "png gray, 16 bit": encoded(Image.fromarray(WIDE[..., 0].astype(np.uint16)), "PNG"),
    "bmp": encoded(RGB, "BMP"),
    "bmp palette": encoded(PALETTE, "BMP"),
    "gif": encoded(PALETTE, "GIF"),
    "gif transparent color": encoded(PALETTE, "GIF", transparency=3),
    "gif animated": encoded(PALETTE, "GIF", save_all=True, append_images=[RGB.quantize(9)]),
    "one pixel": encoded(PHOTO[:1, :1], "PNG"),
}
SIZES = [
    *((21, 30), (64, 50), (37, 37), (32, 32), (1, 1), (1, 9), (9, 1), (100, 133), (75, 50)),
    *((33, 32), (31, 33), (40, 300), (300, 41), (375, 500), (2000, 333), (7, 5), (256, 256)),
]
TRANSFORMS = [
    ImageTransform(32),
    ImageTransform(32, resize_to=37),
    ImageTransform(33),
    ImageTransform(32, "squash"),
    ImageTransform(224, resize_to=256),
]


def ours(image: np.ndarray, settings: ImageTransform) -> np.ndarray:
    arguments = (settings.size, settings.mode, settings.resize_to)
    return images.transform(Image.fromarray(image), *arguments)


# --- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_decode_equals_pixels_of_the_pipeline(name):
    found = images.decode(FILES[name])
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), image_formats.pixels(FILES[name]))


@pytest.mark.parametrize("settings", TRANSFORMS, ids=str)
def test_transform_equals_that_of_the_pipeline(settings):
    """At most one level of 255; two at exact halves before rounding, in at most 1 of 100 pixels.
    Most halves are those of 21 x 30 pixels, enlarged by 32 / 21 and 45 / 30."""
    spec = tf.TensorSpec([None, None, 3], tf.uint8)
    run = tf.function(settings, input_signature=[spec], autograph=False)
    for height, width in SIZES:
        for make in (noise, photo):
            image = make(height, width)
            found = ours(image, settings)
            assert found.dtype == np.uint8 and found.shape == (settings.size, settings.size, 3)
            difference = np.abs(found.astype(int) - run(image).numpy())
            where = (make.__name__, height, width)
            assert difference.max() <= 2 and (difference > 1).mean() < 0.01, where
            assert difference.mean() < 0.02, where


@pytest.mark.parametrize("settings", TRANSFORMS, ids=str)
def test_transform_of_final_size_is_returned_unchanged_unless_it_is_enlarged(settings):
    """Then it is what Pillow's filter makes of the whole image, without its margin."""
    image, edge = noise(settings.size, settings.size), settings.resize_to or settings.size
    whole = Image.fromarray(image).resize((edge, edge), Image.Resampling.BICUBIC)
    first = round((edge - settings.size) / 2)
    expected = np.asarray(whole)[first:, first:][: settings.size, : settings.size]
    difference = np.abs(ours(image, settings).astype(int) - expected)
    assert difference.max() <= (0 if edge == settings.size else 1)


def test_transform_crop_and_squash_of_a_known_image():
    """Three constant squares side by side: the crop is the middle one, and `squash` has all."""
    image = np.zeros((40, 120, 3), np.uint8)
    image[:] = np.repeat([10, 120, 230], 40)[:, None]
    crop, squash = (ours(image, ImageTransform(20, mode)) for mode in ("crop", "squash"))
    assert np.unique(crop[:, 3:-3]).tolist() == [120]
    assert squash[:, [2, 10, 17]].mean((0, 2)).tolist() == [10, 120, 230]


# --- Files that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The content is not a JPEG, PNG, GIF or BMP image. Save the image in one of"),
        (b"<html>", "not a JPEG, PNG, GIF or BMP image"),
        (encoded(RGB, "TIFF"), "not a JPEG, PNG, GIF or BMP image"),
        (encoded(RGB, "WEBP"), "not a JPEG, PNG, GIF or BMP image"),
        (FILES["jpeg"][:-300], "The image is damaged .*truncated.*Save it again, or copy it"),
        (FILES["png"][:500], "The image is damaged"),
        (FILES["gif"][:900], "The image is damaged"),
        (FILES["bmp"][:900], "The image is damaged"),
        (FILES["png"][:60] + b"\xff" * 40 + FILES["png"][100:], "The image is damaged"),
        # Above our limit, above Pillow's limit for a warning, and above its limit for an error.
        (png(8193, 8192, b""), r"too many pixels \(8192 x 8193\), and the limit is 67,1"),
        (png(10_000, 10_000, b""), "too many pixels .*and the limit is 67,108,864, and 65,536"),
        (png(1, 65_537, b""), r"too many pixels \(.*, and 65,536 for an edge. Save it"),
        (png(30_000, 30_000, b""), "too many pixels .*and the limit is 67,108,864, and 65,536"),
    ],
    ids=lambda x: None if isinstance(x, str) else f"{len(x)} bytes",
)  # fmt: skip
def test_decode_bad_file_fails_with_a_sentence(content, message):
    with pytest.raises(ValueError, match=message):
        images.decode(content)


def test_decode_largest_allowed_header_reaches_the_pixels():
    with pytest.raises(ValueError, match="The image is damaged"):
        images.decode(png(8192, 8192, b"", depth=1, color=0))


@pytest.mark.parametrize("kind", ["jpeg cmyk", "png palette", "png gray, 16 bit", "bmp", "gif"])
def test_decode_changed_bytes_fail_only_with_our_errors(kind):
    """Truncated files, and files with changed bytes, most of them in the header."""
    rng, whole = np.random.default_rng(0), FILES[kind]
    outcomes = {"read": 0, "refused": 0}
    for number in range(300):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[rng.integers(len(content)) :]
        for _ in range(number % 3):
            content[rng.integers(100 if number % 2 else len(content))] = rng.integers(256)
        try:
            pixels = images.transform(images.decode(bytes(content)), 8)
        except ValueError as error:
            assert str(error).startswith(("The image ", "The content is not ")), error
            assert str(error).endswith((".", "copy.")), error
            outcomes["refused"] += 1
        else:
            assert pixels.shape == (8, 8, 3)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0, outcomes


# --- Memory --------------------------------------------------------------------------------------

LONG = """
import resource
import numpy as np
from PIL import Image
from mpt_jax.batching import images
content = {content}
image = images.decode(content)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for mode in ("crop", "squash"):
    pixels = images.transform(image, 224, mode)
    assert pixels.shape == (224, 224, 3) and np.unique(pixels).tolist() == [90], mode
"""


def strip(height: int, width: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), (90, 90, 90)), "PNG")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit of memory")
@pytest.mark.parametrize("shape", [(1, 65_536), (65_536, 1)])
def test_transform_of_a_long_image_takes_little_memory(shape):
    """The whole of it at 224 x 14,680,064 pixels would take 9 GiB; the limit is 2 GiB."""
    run_script(LONG.format(content=strip(*shape)), fresh=True)

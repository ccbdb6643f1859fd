"""The toy image world: pictures of colored, textured shapes, drawn from a seed without files.

An image has one to four objects on a background. 20% of the pairs of a shape and a color are held
out: the pretraining of the tiny CLIP and most tasks never show them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Bool, Float, Int, UInt8
from mpt_jax.tasks.toy_shapes import FIELDS, NOISY, TEXTURES

SHAPES = tuple(FIELDS)
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.15),
    "orange": (0.95, 0.50, 0.10),
    "purple": (0.50, 0.15, 0.65),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.27, 0.12),
    "gray": (0.50, 0.50, 0.50),
    "cyan": (0.20, 0.80, 0.85),
}
TEXTURE_NAMES = (*TEXTURES, NOISY)
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
    "beige": (0.85, 0.78, 0.62),
    "navy": (0.08, 0.10, 0.32),
    "mint": (0.68, 0.90, 0.75),
    "maroon": (0.35, 0.05, 0.12),
}
SIZES = ("small", "medium", "large")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
MOST_OBJECTS = 4
STYLES = ("filled", "outline", "inverted", "tinted", "blurred", "rotated")

SIDE = 32  # pixels; lengths below are for images of this size
_RADII = (5.0, 7.5, 10.5)  # of a single object
_RADII_OF_SEVERAL = (4.5, 5.8, 7.2)
_OFFSET, _OFFSET_OF_SEVERAL = 6.0, 8.0  # of centers from the middle of the image
_DARK = 0.35  # brightness of the dark parts of a texture
_NOISE = 0.03
_TINTS = ((1.0, 0.6, 0.6), (0.6, 1.0, 0.6), (0.6, 0.6, 1.0))
_OUTLINE = 0.8  # half of the width of a line, in pixels
_FINER = 2  # supersampling in each direction


def _held_out() -> Bool[np.ndarray, "12 10"]:
    """Returns which pairs of shape and color are held out: two colors of each shape."""
    table = np.zeros((len(SHAPES), len(COLORS)), bool)
    shape = np.arange(len(SHAPES))
    for first in (0, 5):
        table[shape, (3 * shape + first) % len(COLORS)] = True
    return table


HELD_OUT = _held_out()


@dataclasses.dataclass
class Scenes:
    """What is on B images, as indices into the names above.

    Attributes:
        shapes, colors: of each object; an image has the first `counts` of its four.
        textures, backgrounds, sizes: of each image.
        positions: from 0 (top left) to 8 (bottom right) by rows; of single objects only.
        counts: the number of objects, from 1 to 4.
    """

    shapes: Int[np.ndarray, "B 4"]
    colors: Int[np.ndarray, "B 4"]
    textures: Int[np.ndarray, " B"]
    backgrounds: Int[np.ndarray, " B"]
    sizes: Int[np.ndarray, " B"]
    positions: Int[np.ndarray, " B"]
    counts: Int[np.ndarray, " B"]

    def __len__(self) -> int:
        return len(self.counts)


def generator(*parts: str | int) -> np.random.Generator:
    """Returns a random generator that depends only on the given names and numbers."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def of_every_object(values: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B 4"]:
    """Returns the attribute of images as that of each of their objects."""
    return np.repeat(values[:, None], MOST_OBJECTS, 1)


def colors_for(
    shapes: Int[np.ndarray, "*some"], rng: np.random.Generator
) -> Int[np.ndarray, "*some"]:
    """Returns for each shape a random color whose pair is not held out."""
    return np.argmax(rng.random((*shapes.shape, len(COLORS))) * ~HELD_OUT[shapes], -1)


def shapes_for(
    colors: Int[np.ndarray, "*some"], rng: np.random.Generator
) -> Int[np.ndarray, "*some"]:
    """Returns for each color a random shape whose pair is not held out."""
    return np.argmax(rng.random((*colors.shape, len(SHAPES))) * ~HELD_OUT.T[colors], -1)


def sample(count: int, rng: np.random.Generator) -> Scenes:
    """Returns random scenes of single objects or of up to four equal ones, without held-out pairs.

    More than half have a single object.
    """
    shapes = rng.integers(len(SHAPES), size=count)
    return Scenes(
        shapes=of_every_object(shapes),
        colors=of_every_object(colors_for(shapes, rng)),
        textures=rng.integers(len(TEXTURE_NAMES), size=count),
        backgrounds=rng.integers(len(BACKGROUNDS), size=count),
        sizes=rng.integers(len(SIZES), size=count),
        positions=rng.integers(len(ROWS) * len(COLUMNS), size=count),
        counts=rng.choice(4, count, p=(0.55, 0.15, 0.15, 0.15)) + 1,
    )


def sample_different(count: int, rng: np.random.Generator) -> Scenes:
    """Returns random scenes of one to four objects of different shapes, without held-out pairs."""
    scenes = sample(count, rng)
    shapes = np.argsort(rng.random((count, len(SHAPES))), 1)[:, :MOST_OBJECTS]
    counts = rng.integers(1, MOST_OBJECTS + 1, count)
    return dataclasses.replace(scenes, shapes=shapes, colors=colors_for(shapes, rng), counts=counts)


# --- drawing ---------------------------------------------------------------------------------


def draw(
    scenes: Scenes, rng: np.random.Generator, size: int = SIDE, style: str = "filled"
) -> UInt8[np.ndarray, "B S S 3"]:
    """Draws scenes, with small random changes of places, angles and colors, and with noise.

    Args:
        scenes: what to draw.
        rng: the source of the random changes and of the noise.
        size: the height and width S of the images in pixels.
        style: one of `STYLES`; all but `filled` are absent from pretraining.

    Raises:
        ValueError: the style is unknown.
    """
    if style not in STYLES:
        raise ValueError(unknown_name("style", style, STYLES))
    number = len(scenes)
    background = np.array(list(BACKGROUNDS.values()))[scenes.backgrounds]
    image = np.empty((number, size, size, 3), np.float32)
    image[:] = (background + rng.uniform(-0.03, 0.03, (number, 3)))[:, None, None]
    colors = np.array(list(COLORS.values()))[scenes.colors]
    colors = (colors + rng.uniform(-0.05, 0.05, colors.shape)).astype(np.float32)
    owner, slot = np.nonzero(np.arange(MOST_OBJECTS) < scenes.counts[:, None])
    cover, dark = _coverage(scenes, rng, size, style, owner, slot)
    for place in range(MOST_OBJECTS):
        rows, own = owner[slot == place], slot == place
        painted = cover[own] - (1 - np.float32(_DARK)) * dark[own]
        image[rows] *= 1 - cover[own][..., None]
        image[rows] += painted[..., None] * colors[rows, place][:, None, None]
    image = _restyle(image, rng, style)
    image += np.float32(_NOISE) * rng.standard_normal(image.shape, np.float32)
    return np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)


def _coverage(
    scenes: Scenes,
    rng: np.random.Generator,
    size: int,
    style: str,
    owner: Int[np.ndarray, " M"],
    slot: Int[np.ndarray, " M"],
) -> tuple[Float[np.ndarray, "M S S"], Float[np.ndarray, "M S S"]]:
    """Returns how much of each pixel each object covers, and how much of that is dark.

    Args:
        scenes, rng, size, style: as in `draw`.
        owner, slot: the image and the number of each of M objects.
    """
    centers, radii = _places(scenes, rng)
    angles = rng.uniform(-1, 1, radii.shape) * (math.pi if style == "rotated" else math.pi / 22)
    centers, radii, cosine, sine = (
        values[owner, slot].astype(np.float32)[..., None, None]
        for values in (centers, radii, np.cos(angles), np.sin(angles))
    )
    fine = _FINER * size
    grid = (np.arange(fine, dtype=np.float32) + np.float32(0.5)) * np.float32(SIDE / fine)
    across, down = grid - centers[:, 0], grid[:, None] - centers[:, 1]
    x, y = cosine * across + sine * down, cosine * down - sine * across
    shapes, textures = scenes.shapes[owner, slot], scenes.textures[owner]
    shift = rng.uniform(0, 6, (len(owner), 2, 1, 1)).astype(np.float32)
    speckles = rng.integers(0, 2, (len(owner), size, size)).astype(np.float32)
    distance, dark = np.empty_like(x), np.zeros_like(x)
    for number, field in enumerate(FIELDS.values()):
        own = shapes == number
        distance[own] = field(x[own] / radii[own], y[own] / radii[own]) * radii[own]
    for number, name in enumerate(TEXTURE_NAMES):
        own = textures == number
        if name == NOISY:
            dark[own] = speckles[own].repeat(_FINER, 1).repeat(_FINER, 2)
        else:
            moved = (0, 0) if name == "gradient" else (shift[own, 0], shift[own, 1])
            dark[own] = TEXTURES[name](x[own] + moved[0], y[own] + moved[1], radii[own])
    if style == "outline":
        distance, dark = np.abs(distance + _OUTLINE) - np.float32(_OUTLINE), np.zeros_like(x)
    cover = np.clip(np.float32(0.5) - distance * np.float32(fine / SIDE), 0, 1)
    return _halved(cover), _halved(cover * dark)


def _places(
    scenes: Scenes, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "B 4 2"], Float[np.ndarray, "B 4"]]:
    """Returns the center (x, y) and radius of each object, in pixels of a 32-pixel image."""
    number, single = len(scenes), scenes.counts[:, None] == 1
    column, row = scenes.positions % 3 - 1, scenes.positions // 3 - 1
    alone = _OFFSET * np.stack([column, row], -1)[:, None]
    corners = np.argsort(rng.random((number, MOST_OBJECTS)), 1)
    together = _OFFSET_OF_SEVERAL * np.stack([2 * (corners % 2) - 1, 2 * (corners // 2) - 1], -1)
    centers = SIDE / 2 + np.where(single[..., None], alone, together)
    radii = np.where(
        single,
        np.array(_RADII)[scenes.sizes][:, None],
        np.array(_RADII_OF_SEVERAL)[scenes.sizes][:, None],
    )
    shape = (number, MOST_OBJECTS)
    return centers + rng.uniform(-1, 1, (*shape, 2)), radii * rng.uniform(0.95, 1.05, shape)


def _halved(x: Float[np.ndarray, "M fine fine"]) -> Float[np.ndarray, "M S S"]:
    """Returns the means of squares of 2 x 2 values."""
    rows = x[:, ::2] + x[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) * np.float32(0.25)


def _restyle(
    image: Float[np.ndarray, "B S S 3"], rng: np.random.Generator, style: str
) -> Float[np.ndarray, "B S S 3"]:
    """Returns images with the part of a style that concerns whole images."""
    if style == "inverted":
        return 1 - image
    if style == "tinted":
        tints = np.array(_TINTS, np.float32)[rng.integers(len(_TINTS), size=len(image))]
        return image * tints[:, None, None]
    if style == "blurred":
        for axis in (1, 1, 2, 2):
            widths = [(0, 0)] * 4
            widths[axis] = (1, 1)
            padded, size = np.pad(image, widths, "edge"), image.shape[axis]
            parts = [padded.take(range(i, i + size), axis) for i in range(3)]
            image = (parts[0] + parts[1] + parts[2]) / np.float32(3)
    return image

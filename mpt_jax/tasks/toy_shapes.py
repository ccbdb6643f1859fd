"""Shapes and textures of the toy image world, as functions of coordinates.

A shape is a signed distance field: negative inside, zero on the edge, positive outside. The unit
of `x` (to the right) and `y` (down) is the radius of the shape. Only +, *, sqrt, min and max are
applied to pixels, which round alike on all machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpt_jax.core.shapes import Float

Pixels = Float[np.ndarray, "B S S"]
Field = Callable[[Pixels, Pixels], Pixels]


def _halfplanes(x: Pixels, y: Pixels, sides: int, inner: float) -> list[Pixels]:
    """Returns the distances from the sides of a regular polygon that stands on a side."""
    angles = [math.pi / 2 + 2 * math.pi * i / sides for i in range(sides)]
    return [np.float32(math.cos(a)) * x + np.float32(math.sin(a)) * y - inner for a in angles]


def _polygon(sides: int, inner: float, lower: float = 0.0) -> Field:
    """Returns a regular polygon with the inner radius `inner`, moved down by `lower`."""

    def field(x: Pixels, y: Pixels) -> Pixels:
        first, *others = _halfplanes(x, y - np.float32(lower), sides, inner)
        for plane in others:
            first = np.maximum(first, plane)
        return first

    return field


def _circle(x: Pixels, y: Pixels, radius: float = 1.0) -> Pixels:
    return np.sqrt(x * x + y * y) - np.float32(radius)


def _box(x: Pixels, y: Pixels, half_width: float, half_height: float) -> Pixels:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _square(x: Pixels, y: Pixels) -> Pixels:
    return _box(x, y, 0.85, 0.85)


def _diamond(x: Pixels, y: Pixels, reach: float = 1.1) -> Pixels:
    return (np.abs(x) + np.abs(y) - np.float32(reach)) * np.float32(math.sqrt(0.5))


def _star(x: Pixels, y: Pixels) -> Pixels:
    """A point is in a pentagram if it is inside at least four of its five lines, so the field is
    the second largest distance."""
    planes = _halfplanes(x, y, 5, 1.1 * math.cos(math.radians(72)))
    largest, second = np.maximum(planes[0], planes[1]), np.minimum(planes[0], planes[1])
    for plane in planes[2:]:
        second = np.maximum(second, np.minimum(largest, plane))
        largest = np.maximum(largest, plane)
    return second


def _cross(x: Pixels, y: Pixels) -> Pixels:
    return np.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0))


def _ring(x: Pixels, y: Pixels) -> Pixels:
    return np.abs(_circle(x, y, 0.76)) - np.float32(0.24)


def _heart(x: Pixels, y: Pixels) -> Pixels:
    """The union of a diamond and of circles whose diameters are its upper sides."""
    reach, y = 0.85, y - np.float32(0.08)
    half = np.float32(reach / 2)
    lobes = _circle(np.abs(x) - half, y + half, reach * math.sqrt(0.5))
    return np.minimum(_diamond(x, y, reach), lobes)


def _arrow(x: Pixels, y: Pixels) -> Pixels:
    """An arrow that points up: a triangle above a shaft."""
    tip = np.float32(1.0)
    head = np.maximum((np.abs(x) - y - tip) * np.float32(math.sqrt(0.5)), y)
    return np.minimum(head, _box(x, y - np.float32(0.4), 0.3, 0.6))


def _moon(x: Pixels, y: Pixels) -> Pixels:
    return np.maximum(_circle(x, y), -_circle(x - np.float32(0.5), y, 0.85))


FIELDS: dict[str, Field] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(3, 0.62, 0.27),
    "diamond": _diamond,
    "pentagon": _polygon(5, 0.82),
    "hexagon": _polygon(6, 0.87),
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "arrow": _arrow,
    "moon": _moon,
}


# --- textures --------------------------------------------------------------------------------
# A texture maps coordinates and the radius, in pixels of a 32-pixel image, to how dark the color
# is, from 0 to 1.

Texture = Callable[[Pixels, Pixels, Float[np.ndarray, "B 1 1"]], Pixels]


def _phase(x: Pixels, period: float) -> Pixels:
    """Returns the position within a period, from 0 to 1."""
    x = x / np.float32(period)
    return x - np.floor(x)


def _float(dark: np.ndarray) -> Pixels:
    return dark.astype(np.float32)


TEXTURES: dict[str, Texture] = {
    "plain": lambda x, y, radius: np.zeros_like(x),
    "striped": lambda x, y, radius: _float(_phase(y, 4) < 0.5),
    "dotted": lambda x, y, radius: _float(
        (_phase(x, 5) - 0.5) ** 2 + (_phase(y, 5) - 0.5) ** 2 < 0.1
    ),
    "checked": lambda x, y, radius: _float((_phase(x, 6) < 0.5) != (_phase(y, 6) < 0.5)),
    "gradient": lambda x, y, radius: np.clip(0.5 + 0.5 * x / radius, 0, 1),
}
NOISY = "noisy"  # independent pixels, which need random numbers instead of coordinates

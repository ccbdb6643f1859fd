"""The toy image world: its shapes against their areas, and what its images show."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from mpt_jax.tasks import toy_images as world
from mpt_jax.tasks.toy_shapes import FIELDS, TEXTURES

SIN36, COS36, COS72 = (
    f(math.radians(a)) for f, a in ((math.sin, 36), (math.cos, 36), (math.cos, 72))
)


def scenes(count: int = 40, seed: int = 0, **values) -> world.Scenes:
    """Single large plain shapes on white, in the middle, unless `values` say otherwise."""
    fixed = {"counts": 1, "textures": 0, "backgrounds": 0, "sizes": 2, "positions": 4, **values}
    arrays = {k: np.broadcast_to(np.asarray(v), (count,)).copy() for k, v in fixed.items()}
    return dataclasses.replace(world.sample(count, world.generator("scenes", seed)), **arrays)


def colored(color: str, shape: str, count: int = 40, **values) -> world.Scenes:
    found = scenes(count, **values)
    found.colors[:] = list(world.COLORS).index(color)
    found.shapes[:] = world.SHAPES.index(shape)
    return found


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(world, "_NOISE", 0.0)


def draw(of: world.Scenes, style: str = "filled", seed: int = 0) -> np.ndarray:
    return world.draw(of, world.generator("draw", seed), style=style)


# --- shapes ----------------------------------------------------------------------------------


def lens(first: float, second: float, distance: float) -> float:
    """The area that two circles share."""
    a = (distance**2 + first**2 - second**2) / (2 * distance)
    b = distance - a
    return sum(
        r**2 * math.acos(x / r) - x * math.sqrt(r**2 - x**2) for r, x in ((first, a), (second, b))
    )


AREAS = {
    "circle": math.pi,
    "square": 1.7**2,
    "triangle": 3 * math.sqrt(3) * 0.62**2,
    "diamond": 2 * 1.1**2,
    "pentagon": 5 * 0.82**2 * math.tan(math.pi / 5),
    "hexagon": 6 * 0.87**2 * math.tan(math.pi / 6),
    "star": 5 * 1.1 * (1.1 * COS72 / COS36) * SIN36,
    "cross": 2 * 2 * 0.68 - 0.68**2,
    "ring": math.pi * (1 - 0.52**2),
    "heart": 2 * 0.85**2 * (1 + math.pi / 4),
    "arrow": 1 + 0.6 * 1.0,
    "moon": math.pi - lens(1.0, 0.85, 0.5),
}


@pytest.mark.parametrize("shape", world.SHAPES)
def test_field_is_negative_on_the_area_of_the_shape(shape):
    side = np.linspace(-1.5, 1.5, 1200, dtype=np.float32)
    x, y = np.broadcast_arrays(side[None, None, :], side[None, :, None])
    inside = FIELDS[shape](x, y) < 0
    assert inside.mean() * 9 == pytest.approx(AREAS[shape], rel=0.01)
    rows, columns = np.nonzero(inside[0])
    reach = [side[i] for values in (rows, columns) for i in (values.min(), values.max())]
    assert np.max(np.abs(reach)) < 1.15  # so that shapes stay on the image


@pytest.mark.parametrize("name", TEXTURES)
def test_texture_darkness_is_within_its_range(name):
    side = np.linspace(-30, 30, 601, dtype=np.float32)[:-1]
    x, y = np.broadcast_arrays(side[None, None, :], side[None, :, None])
    dark = TEXTURES[name](x, y, np.full((1, 1, 1), 9, np.float32))
    assert dark.min() == 0 and dark.max() == (0 if name == "plain" else 1)
    share = {"plain": 0.0, "dotted": 0.1 * math.pi}.get(name, 0.5)
    assert dark.mean() == pytest.approx(share, abs=0.05)


# --- images ----------------------------------------------------------------------------------


def test_images_are_the_same_in_every_process():
    """The digest must never change, because results of the suite depend on the images."""
    drawn = draw(world.sample(24, world.generator("golden")))
    assert drawn.shape == (24, 32, 32, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, draw(world.sample(24, world.generator("golden"))))
    assert not np.array_equal(drawn, draw(world.sample(24, world.generator("golden")), seed=1))
    digests = [hashlib.sha256(drawn.tobytes()).hexdigest()[:16]]
    digests += [
        hashlib.sha256(draw(colored("red", "heart", 8), style).tobytes()).hexdigest()[:16]
        for style in world.STYLES
    ]
    assert digests == GOLDEN


GOLDEN = [
    "d1e7e0e5c6fe0a06",
    "624533190041aef2",
    "046a42ca68190751",
    "8d17ad1db987a298",
    "88da5ea6879b9c6a",
    "5fd2f2cec074ee9a",
    "a81ba82d823a9fb3",
]


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_number_of_objects_and_their_color(count):
    drawn = draw(colored("blue", "square", counts=count, sizes=0))
    mask = np.abs(drawn - np.array([38, 64, 217])).max(-1) < 60
    assert {ndimage.label(image)[1] for image in mask} == {count}


@pytest.mark.usefixtures("no_noise")
def test_position_and_size_of_single_objects():
    areas = []
    for size in range(3):
        drawn = draw(colored("red", "circle", 9, sizes=size, positions=np.arange(9)))
        mask = drawn[..., 1] < 128
        for position, image in enumerate(mask):
            row, column = ndimage.center_of_mass(image)
            expected = np.array([position // 3, position % 3]) * 6 + 9.5
            assert np.abs(np.array([row, column]) - expected).max() < 1.5
        areas.append(mask[4].sum())
    np.testing.assert_allclose(areas, math.pi * np.array([5, 7.5, 10.5]) ** 2, rtol=0.15)


@pytest.mark.usefixtures("no_noise")
def test_colors_and_backgrounds_are_those_of_their_names():
    for color, rgb in world.COLORS.items():
        for number, background in enumerate(world.BACKGROUNDS.values()):
            drawn = draw(colored(color, "square", 4, backgrounds=number)) / 255
            assert np.abs(drawn[:, 16, 16] - rgb).max() < 0.06
            assert np.abs(drawn[:, 0, 0] - background).max() < 0.04


@pytest.mark.usefixtures("no_noise")
def test_styles_against_operations_on_whole_images():
    of = scenes(40, positions=np.arange(40) % 9)
    plain = draw(of).astype(float)
    np.testing.assert_allclose(draw(of, "inverted"), 255 - plain, atol=1)
    blurred = ndimage.uniform_filter(plain, (0, 3, 3, 0), mode="nearest")
    blurred = ndimage.uniform_filter(blurred, (0, 3, 3, 0), mode="nearest")
    np.testing.assert_allclose(draw(of, "blurred"), blurred, atol=1.5)
    ratios = draw(of, "tinted")[:, 0, 0] / plain[:, 0, 0]
    assert {tuple(np.sort(ratio.round(1))) for ratio in ratios} == {(0.6, 0.6, 1.0)}
    circles = colored("red", "circle", 40)
    full = (draw(circles)[..., 1] < 128).sum((1, 2))
    line = (draw(circles, "outline")[..., 1] < 128).sum((1, 2))
    np.testing.assert_allclose(full, math.pi * 10.5**2, rtol=0.15)
    np.testing.assert_allclose(line, 2 * math.pi * (10.5 - 0.8) * 1.6, rtol=0.3)
    arrows = colored("red", "arrow", 40)
    upright, turned = (draw(arrows, style)[..., 1] < 128 for style in ("filled", "rotated"))
    assert (upright == upright[:1]).mean() > 0.9 > (turned == turned[:1]).mean()
    np.testing.assert_allclose(upright.sum((1, 2)), turned.sum((1, 2)), rtol=0.2)


def test_noise_has_its_deviation():
    of = colored("gray", "square", 200)
    corner = draw(of)[:, :4, :4] / 255.0
    assert corner[:, :, :, 0].std((1, 2)).mean() == pytest.approx(0.03 * 0.85, abs=0.006)
    middle = draw(of)[:, 14:18, 14:18] / 255.0
    assert middle.std((1, 2)).mean() == pytest.approx(0.03, abs=0.003)


@pytest.mark.parametrize("name", ["colors", pytest.param("sizes", marks=pytest.mark.slow)])
def test_attribute_is_visible_to_a_linear_probe_of_pixels(name):
    """With all other attributes random, except that objects are single and in the middle."""
    found = world.sample(1200, world.generator("probe"))
    found = dataclasses.replace(
        found,
        counts=np.ones(1200, int),
        positions=np.full(1200, 4),
        backgrounds=np.zeros(1200, int),
    )
    labels = found.colors[:, 0] if name == "colors" else found.sizes
    pixels = draw(found)[:, ::2, ::2].reshape(1200, -1) / 255 - 0.5
    probe = LogisticRegression(C=0.03, max_iter=300).fit(pixels[:900], labels[:900])
    chance = 1 / len(np.unique(labels))
    assert probe.score(pixels[900:], labels[900:]) > 2.4 * chance


def test_size_of_the_image_is_a_choice():
    drawn = world.draw(scenes(3), world.generator("size"), size=48)
    assert drawn.shape == (3, 48, 48, 3)


def test_unknown_style_is_an_error():
    with pytest.raises(ValueError, match="sketch"):
        draw(scenes(1), "sketch")


# --- held-out pairs --------------------------------------------------------------------------


def test_one_fifth_of_the_pairs_is_held_out_and_never_sampled():
    assert world.HELD_OUT.shape == (12, 10) and world.HELD_OUT.sum() == 24
    assert set(world.HELD_OUT.sum(1)) == {2} and set(world.HELD_OUT.sum(0)) == {2, 3}
    rng = world.generator("pairs")
    for sample in (world.sample, world.sample_different):
        found = sample(4000, rng)
        assert not world.HELD_OUT[found.shapes, found.colors].any()
        seen = np.zeros_like(world.HELD_OUT)
        seen[found.shapes, found.colors] = True
        np.testing.assert_array_equal(seen, ~world.HELD_OUT)


def test_different_objects_have_different_shapes():
    found = world.sample_different(500, world.generator("different"))
    assert all(len(set(row)) == 4 for row in found.shapes.tolist())
    assert set(found.counts.tolist()) == {1, 2, 3, 4}

"""SeqIO registration of the toy image tasks: importing this module registers them.

    toy_shape, toy_color, ...       seven source tasks
    toy_outline, toy_tint, ...      seven target tasks, each with a shift from the pretraining
    toy_many_1 ... 4                the classes of toy_many in four tasks, and of toy_shape in
    toy_shape_1 ... 4               four, for sequences (`incremental`)

Images are drawn when a task is first read, and depend only on the names of the task and the split.
Those of toy_digits are real: the handwritten digits that scikit-learn ships.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpt_jax.core.shapes import Int, UInt8
from mpt_jax.tasks import images, incremental
from mpt_jax.tasks import toy_captions as words
from mpt_jax.tasks import toy_images as world
from mpt_jax.tasks.image_sources import Index

SIZES = {"train": 2000, "validation": 200, "test": 500}
DIGIT_SIZES = {"train": 700, "validation": 200, "test": 897}  # in the order of the data set

Arrays = tuple[UInt8[np.ndarray, "N S S 3"], np.ndarray]
Place = Callable[[Int[np.ndarray, " N"], np.random.Generator], world.Scenes]


@dataclasses.dataclass(frozen=True)
class ToyImageTask:
    """A task of the suite.

    Attributes:
        name: the name of the task.
        class_names: the class names in label order.
        templates: the texts in which `{}` stands for a class name.
        draw: returns the images of a split, and their labels: int [N], or bool [N, C] if an image
            may have several classes. Its arguments are the names of the task and of the split.
        metric: the name of the metric, see `images.METRICS`.
        multi_label: whether an image may have several classes.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Callable[[str, str], Arrays]
    metric: str = "accuracy"
    multi_label: bool = False

    def arrays(self, split: str) -> Arrays:
        """Returns the images of a split and their labels, see `draw`."""
        return self.draw(self.name, split)


# --- what tasks show -------------------------------------------------------------------------


def _single(labels: np.ndarray, rng: np.random.Generator, **values: np.ndarray) -> world.Scenes:
    """Returns random scenes of single objects, with the given attributes."""
    scenes = world.sample(len(labels), rng)
    return dataclasses.replace(scenes, counts=np.ones_like(labels), **values)


def _pair(
    shapes: Int[np.ndarray, " N"], colors: Int[np.ndarray, " N"], rng: np.random.Generator
) -> world.Scenes:
    values = (shapes, colors)
    shapes, colors = (world.of_every_object(x) for x in values)
    return _single(values[0], rng, shapes=shapes, colors=colors)


def _shape(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
    return _pair(labels, world.colors_for(labels, rng), rng)


def _color(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
    return _pair(world.shapes_for(labels, rng), labels, rng)


def _of_pairs(pairs: Int[np.ndarray, "C 2"]) -> Place:
    def place(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
        return _pair(pairs[labels, 0], pairs[labels, 1], rng)

    return place


def _attribute(name: str) -> Place:
    """Returns scenes whose labels are the attribute `name` of `world.Scenes`."""

    def place(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
        return _single(labels, rng, **{name: labels})

    return place


def _count(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
    return dataclasses.replace(world.sample(len(labels), rng), counts=labels + 1)


def _gray_texture(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> world.Scenes:
    """Returns gray objects on white or black."""
    scenes = _color(np.full_like(labels, list(world.COLORS).index("gray")), rng)
    backgrounds = rng.integers(2, size=len(labels))
    return dataclasses.replace(scenes, textures=labels, backgrounds=backgrounds)


def _drawn(place: Place, classes: int, style: str = "filled") -> Callable[[str, str], Arrays]:
    """Returns images with equally frequent labels, to within one image."""

    def draw(name: str, split: str) -> Arrays:
        rng = world.generator(name, split)
        labels = rng.permutation(np.arange(SIZES[split]) % classes)
        return world.draw(place(labels, rng), rng, style=style), labels

    return draw


def _many(name: str, split: str) -> Arrays:
    """Returns images of one to four shapes, and which shapes these are."""
    rng = world.generator(name, split)
    scenes = world.sample_different(SIZES[split], rng)
    labels = np.zeros((len(scenes), len(world.SHAPES)), bool)
    owner, slot = np.nonzero(np.arange(world.MOST_OBJECTS) < scenes.counts[:, None])
    labels[owner, scenes.shapes[owner, slot]] = True
    return world.draw(scenes, rng), labels


def _digits(name: str, split: str) -> Arrays:
    """Returns handwritten digits, enlarged from 8 x 8 gray pixels by cubic interpolation."""
    from scipy import ndimage
    from sklearn import datasets

    del name
    digits: Any = datasets.load_digits()
    first = sum(list(DIGIT_SIZES.values())[: list(DIGIT_SIZES).index(split)])
    rows = slice(first, first + DIGIT_SIZES[split])
    factor = world.SIDE / digits.images.shape[1]
    gray: Any = ndimage.zoom(
        digits.images[rows] / 16, (1, factor, factor), order=3, mode="nearest", grid_mode=True
    )
    pixels = np.rint(255 * np.clip(gray, 0, 1)).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, -1), digits.target[rows]


# --- tasks -----------------------------------------------------------------------------------

# As many pairs as are held out, of the same shapes, and none of them held out.
_SEEN_PAIRS = np.argwhere(np.roll(world.HELD_OUT, 1, 1))
_NEW_PAIRS = np.argwhere(world.HELD_OUT)
_COLORS = tuple(world.COLORS)
_THING = ("a photo of a {} thing.", "a picture of a {} object.")
_NOUN = ("a photo of a {}.", "a picture of a {}.")


def _first(table: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(names[0] for names in table)


def _pair_names(pairs: Int[np.ndarray, "C 2"]) -> tuple[str, ...]:
    return tuple(f"{_COLORS[color]} {world.SHAPES[shape]}" for shape, color in pairs)


_BACKGROUNDS = tuple(world.BACKGROUNDS)
_COUNTS = ("one thing", "two things", "three things", "four things")
_POSITIONS = _first(words.POSITION_WORDS)

SOURCE_TASKS = (
    ToyImageTask("toy_shape", world.SHAPES, _NOUN, _drawn(_shape, 12)),
    ToyImageTask("toy_color", _COLORS, _THING, _drawn(_color, 10)),
    ToyImageTask("toy_texture", world.TEXTURE_NAMES, _THING, _drawn(_attribute("textures"), 6)),
    ToyImageTask(
        "toy_shape_color", _pair_names(_SEEN_PAIRS), _NOUN, _drawn(_of_pairs(_SEEN_PAIRS), 24)
    ),
    ToyImageTask("toy_size", world.SIZES, _THING, _drawn(_attribute("sizes"), 3)),
    ToyImageTask(
        "toy_background",
        _BACKGROUNDS,
        ("a photo of a thing on a {} background.", "a picture of an object on a {} background."),
        _drawn(_attribute("backgrounds"), 6),
    ),
    ToyImageTask("toy_count", _COUNTS, ("a photo of {}.", "a picture of {}."), _drawn(_count, 4)),
)
TARGET_TASKS = (
    ToyImageTask(
        "toy_outline", world.SHAPES, ("a drawing of a {}.",), _drawn(_shape, 12, "outline")
    ),
    ToyImageTask("toy_tint", _COLORS, _THING, _drawn(_color, 10, "tinted")),
    ToyImageTask("toy_gray_texture", world.TEXTURE_NAMES, _THING, _drawn(_gray_texture, 6)),
    ToyImageTask(
        "toy_position",
        _POSITIONS,
        ("a photo of a thing at the {}.", "a picture of an object at the {}."),
        _drawn(_attribute("positions"), 9),
    ),
    ToyImageTask("toy_many", world.SHAPES, _NOUN, _many, "map_11point", multi_label=True),
    ToyImageTask("toy_compound", _pair_names(_NEW_PAIRS), _NOUN, _drawn(_of_pairs(_NEW_PAIRS), 24)),
    ToyImageTask("toy_digits", words.NUMBERS, ("a photo of a {}.",), _digits),
)
TASKS = {task.name: task for task in SOURCE_TASKS + TARGET_TASKS}
DIVIDED = ("toy_many", "toy_shape")  # also registered as sequences of tasks


# --- registration ----------------------------------------------------------------------------


class ToyImages(images.ArrayImages):
    """Source of the images of a task, which are drawn and encoded at first use."""

    def __init__(self, task: ToyImageTask):
        super().__init__({}, task.class_names, task.multi_label)
        self.task = task

    def __str__(self) -> str:
        return self.task.name

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits."""
        return tuple(SIZES)

    @property
    def class_ids(self) -> Sequence[str]:
        """The class names in label order."""
        return self.classes

    def read_listing(self) -> tuple[Sequence[str] | None, dict[str, tuple[Index, Sequence[Any]]]]:
        """Draws and encodes the images; see `ListedImages.read_listing`."""
        data = {split: self.task.arrays(split) for split in SIZES}
        return images.ArrayImages(data, self.classes, self.multi_label).read_listing()


def register() -> None:
    """Registers all tasks of the suite."""
    for task in TASKS.values():
        source = ToyImages(task)
        images.register(task.name, source, templates=task.templates, metric_fns=(task.metric,))
        if task.name in DIVIDED:
            sizes = incremental.task_sizes(len(task.class_names), 0, 3)
            incremental.register(task.name, source, sizes, templates=task.templates)


register()

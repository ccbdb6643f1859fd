"""The two task suites for the tables on images: published sets, and the small image world."""

from __future__ import annotations

import importlib
import math

from mpt_jax.experiments.paper.suites import Length, Suite
from mpt_jax.experiments.paper.variants import Variant

# ELEVATER's sets that are not among the source sets, over which MVLPT's figures are averaged.
OTHERS = (
    *("hateful_memes", "cifar10", "mnist", "resisc45", "country211", "voc2007", "cifar100"),
    *("patch_camelyon", "rendered_sst2", "gtsrb", "fer2013", "kitti_distance"),
)
ALSO_SOURCES = (
    *("oxford_flowers102", "oxford_pets", "food101", "stanford_cars", "fgvc_aircraft"),
    *("caltech101", "dtd", "eurosat"),
)
SOURCES = (
    *("imagenet", "caltech101", "food101", "stanford_cars", "oxford_pets", "oxford_flowers"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
)
VOC_SEQUENCE, TOY_SEQUENCE = "voc2007_b0_c4", "toy_many"
BASE, NEW = "_base", "_new"  # suffixes of tasks with half of the classes
_EPOCHS, _BATCH, _EVERY = 200, 32, 10  # MVLPT's recipe; evaluated every 10 epochs


def _length(task: str, variant: Variant, shots: int | None) -> Length:
    """Returns MVLPT's training length: 200 epochs in batches of 32."""
    del variant
    assert shots is not None  # all tables on images are few-shot
    images = shots * _number_of_classes(task)
    epoch = max(1, images // _BATCH)
    rows = min(_BATCH, images)
    return Length(_EPOCHS * epoch, rows, period=_EVERY * epoch, epoch=epoch)


def _number_of_classes(task: str) -> int:
    """Returns the number of classes of a published set, or of half of it."""
    name = task.removesuffix(BASE)
    module = importlib.import_module(f"mpt_jax.tasks.image_sets.{name.split('_')[0]}")
    (number,) = (found.classes.number for found in module.SETS if found.name == name)
    return math.ceil(number / 2) if name != task else number


def halves(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the tasks with half of the classes of `tasks`: the base classes of all,
    then the new ones."""
    return tuple(f"{name}{half}" for half in (BASE, NEW) for name in tasks)


def _sequence(name: str, seed: int) -> list[str]:
    """Returns the tasks of a sequence, as runs of a seed: all examples, in its order."""
    module = importlib.import_module("mpt_jax.tasks.image_sets.multilane")
    return [f"{task}_s{seed}" for task in module.sequence(name)]


IMAGES = Suite(
    name="images",
    tasks={name: f"elevater_{name}" for name in (*OTHERS, *ALSO_SOURCES)}
    | {name: name for name in (*halves(tuple(f"coop_{x}" for x in SOURCES)), VOC_SEQUENCE)},
    sources={name: f"coop_{name}" for name in SOURCES},
    modules=tuple(f"mpt_jax.tasks.image_sets.{x}" for x in ("coop", "elevater", "multilane")),
    files=(),
    test_files=(),
    source_steps=None,
    length=_length,
    rates={},
    tested_apart=True,
    sequence=_sequence,
    sequence_steps=180,  # 30 epochs of 1,500 images, the mean over VOC's tasks, in batches of 256
)

# toy_tint and toy_gray_texture were used to choose the learning rates (docs/study/vision.md), so no
# table has them as targets.
TOY_TARGETS = ("toy_outline", "toy_position", "toy_many", "toy_compound", "toy_digits")
TOY_SOURCES = (
    *("toy_shape", "toy_color", "toy_texture", "toy_shape_color", "toy_size", "toy_background"),
    "toy_count",
)
TOY_TRANSFER = (
    *("toy_shape", "toy_color", "toy_texture", "toy_size", "toy_background"),
    *("toy_outline", "toy_compound", "toy_digits"),
)
TOY_HALVES = ("toy_outline", "toy_compound", "toy_digits")


def _toy_sequence(name: str, seed: int) -> list[str]:
    """Returns the tasks of the sequence; each seed has its own order of the classes."""
    del name  # there is one
    return importlib.import_module("mpt_jax.tasks.toy_sequences").sequence(seed)


TOY_IMAGES = Suite(
    name="toy_images",
    tasks={name: name for name in (*TOY_TARGETS, *TOY_SOURCES, *halves(TOY_HALVES))},
    sources={name: name for name in TOY_SOURCES},
    modules=("mpt_jax.tasks.toy_image_tasks", "mpt_jax.tasks.toy_sequences"),
    files=("gin/tiny_vision.gin", "gin/runs/last_step.gin"),
    test_files=("gin/tiny_vision.gin",),
    source_steps=100,
    length=lambda task, variant, shots: Length(steps=100, rows=8, epoch=4),
    rates={
        "linear_probe": 1.0,
        "coop": 0.0003,
        "cocoop": 0.0003,
        "vpt": 0.08,
        "upt": 0.005,
        "coop_vpt": 0.005,
        "mcoop": 0.3,
        "mvpt": 0.08,
        "mupt": 0.3,
        "mcoop_vpt": 0.3,
        "clip_mpt": 0.08,
    },
    tested_apart=False,
    is_toy=True,
    source_files=("gin/runs/no_evaluation.gin",),
    sequence=_toy_sequence,
    sequence_steps=100,
)

SUITES = {"paper": IMAGES, "toy": TOY_IMAGES}

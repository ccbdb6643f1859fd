"""CoOp's 11 source sets: importing this module registers `coop_imagenet` to `coop_ucf101`.

CoOp's own splits are files that only its authors host; `images.register_selection` replays them.
The splits here have the same proportions, by a stable hash within each class: 50/20/30 of all
images where CoOp made a split, and a fifth of train as validation where a set has train and test.
"""

from __future__ import annotations

from mpt_jax.tasks.image_sets import class_names as names
from mpt_jax.tasks.image_sets.rows import ImageSet, listed, register, root, tfds
from mpt_jax.tasks.image_sets.templates import COOP
from mpt_jax.tasks.image_sources import ImageSource
from mpt_jax.tasks.image_splits import DividedImages, Share, held_out, pooled

PREFIX = "coop_"
# CoOp's train, validation and test.
SIZES = {
    "imagenet": (1_281_167, 50_000, 50_000),
    "caltech101": (4_128, 1_649, 2_465),
    "food101": (50_500, 20_200, 30_300),
    "stanford_cars": (6_509, 1_635, 8_041),
    "oxford_pets": (2_944, 736, 3_669),
    "oxford_flowers": (4_093, 1_633, 2_463),
    "fgvc_aircraft": (3_334, 3_333, 3_333),
    "sun397": (15_880, 3_970, 19_850),
    "dtd": (2_820, 1_128, 1_692),
    "eurosat": (13_500, 5_400, 8_100),
    "ucf101": (7_639, 1_898, 3_783),
}


def sets(base: str) -> tuple[ImageSet, ...]:
    """Returns the table of the suite.

    Args:
        base: The folder with the sets that TFDS does not have.
    """
    classes = {
        "imagenet": names.imagenet(base),
        "caltech101": names.tfds_names(
            "caltech101:3.0.2",
            100,
            drop=("background_google", "faces_easy"),
            exceptions=names.CALTECH_COOP,
        ),
        "food101": names.tfds_names("food101:2.1.0", 101),
        "stanford_cars": names.tfds_names("cars196:2.1.0", 196, rename=names.year_first),
        "oxford_pets": names.tfds_names(
            "oxford_iiit_pet:4.0.0", 37, rename=lambda x: names.readable(x).lower()
        ),
        "oxford_flowers": names.tfds_names(
            "oxford_flowers102:2.1.1", 102, exceptions=names.FLOWERS_COOP
        ),
        "fgvc_aircraft": names.shipped("fgvc_aircraft"),
        "sun397": names.tfds_names("sun397/standard-part1-120k:4.0.0", 397, rename=names.scene),
        "dtd": names.tfds_names("dtd:3.0.1", 47),
        "eurosat": names.table(names.EUROSAT_COOP),
        "ucf101": names.shipped("ucf101"),
    }
    sources = {
        "imagenet": tfds(
            "imagenet2012:5.1.0",
            {"train": 1_281_167, "validation": 50_000},
            classes["imagenet"],
            ("file_name",),
            **{"train": "train", "validation": "validation", "test": "validation"},
        ),
        "caltech101": _divided(
            "caltech101",
            tfds(
                "caltech101:3.0.2",
                {"train": 3_060, "test": 6_084},
                classes["caltech101"],
                ("label", "image/file_name"),
            ),
            pooled("train", "test"),
        ),
        "food101": _divided(
            "food101",
            tfds(
                "food101:2.1.0",
                {"train": 75_750, "validation": 25_250},
                classes["food101"],
                ("id",),
            ),
            pooled("train", "validation"),
        ),
        "stanford_cars": _divided(
            "stanford_cars",
            tfds(
                "cars196:2.1.0", {"train": 8_144, "test": 8_041}, classes["stanford_cars"], ("id",)
            ),
            held_out(),
        ),
        "oxford_pets": _divided(
            "oxford_pets",
            tfds(
                "oxford_iiit_pet:4.0.0",
                {"train": 3_680, "test": 3_669},
                classes["oxford_pets"],
                ("file_name",),
            ),
            held_out(),
        ),
        "oxford_flowers": _divided(
            "oxford_flowers",
            tfds(
                "oxford_flowers102:2.1.1",
                {"train": 1_020, "validation": 1_020, "test": 6_149},
                classes["oxford_flowers"],
                ("file_name",),
            ),
            pooled("train", "validation", "test"),
        ),
        "fgvc_aircraft": listed(base, "fgvc_aircraft", classes["fgvc_aircraft"]),
        "sun397": _divided(
            "sun397",
            tfds(
                "sun397/standard-part1-120k:4.0.0",
                {"train": 19_850, "test": 19_850},
                classes["sun397"],
                ("file_name",),
            ),
            held_out(),
        ),
        "dtd": _divided(
            "dtd",
            tfds(
                "dtd:3.0.1",
                {"train": 1_880, "validation": 1_880, "test": 1_880},
                classes["dtd"],
                ("file_name",),
            ),
            pooled("train", "validation", "test"),
        ),
        "eurosat": _divided(
            "eurosat",
            tfds("eurosat/rgb:2.0.0", {"train": 27_000}, classes["eurosat"], ("filename",)),
            pooled("train"),
        ),
        "ucf101": listed(base, "ucf101", classes["ucf101"]),
    }
    return tuple(
        ImageSet(PREFIX + name, source, classes[name], COOP[name])
        for name, source in sources.items()
    )


def _divided(name: str, source: ImageSource, parts: dict[str, Share]) -> DividedImages:
    published = dict(zip(("train", "validation", "test"), SIZES[name], strict=True))
    return DividedImages(source, parts, PREFIX + name, published=published)


SETS = sets(root())
register(SETS)

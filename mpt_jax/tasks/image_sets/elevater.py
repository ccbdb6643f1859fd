"""ELEVATER's 20 target sets: importing this module registers `elevater_hateful_memes` to
`elevater_kitti_distance`.

Sets that TFDS has with ELEVATER's splits keep them. EuroSAT and RESISC45 are only one split in
TFDS; they are divided by a stable hash, so their images differ from ELEVATER's lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpt_jax.tasks.image_sets import class_names as names
from mpt_jax.tasks.image_sets import kitti, voc
from mpt_jax.tasks.image_sets.class_names import ClassTable
from mpt_jax.tasks.image_sets.rows import ImageSet, folders, listed, register, root, tfds
from mpt_jax.tasks.image_sets.templates import ELEVATER
from mpt_jax.tasks.image_sources import ImageSource
from mpt_jax.tasks.image_splits import DividedImages, pooled

PREFIX = "elevater_"
# Train, validation and test of the toolkit; 0 for a split that it does not have.
SIZES = {
    "hateful_memes": (8_500, 0, 500),
    "cifar10": (50_000, 0, 10_000),
    "cifar100": (50_000, 0, 10_000),
    "mnist": (60_000, 0, 10_000),
    "oxford_flowers102": (1_020, 1_020, 6_149),
    "oxford_pets": (3_680, 0, 3_669),
    "resisc45": (3_150, 3_150, 25_200),
    "country211": (31_650, 10_550, 21_100),
    "food101": (75_750, 0, 25_250),
    "stanford_cars": (8_144, 0, 8_041),
    "fgvc_aircraft": (3_334, 3_333, 3_333),
    "caltech101": (3_060, 0, 6_084),
    "dtd": (1_880, 1_880, 1_880),
    "voc2007": (2_501, 2_510, 4_952),
    "patch_camelyon": (262_144, 32_768, 32_768),
    "rendered_sst2": (6_920, 827, 1_821),
    "gtsrb": (26_640, 12_569, 12_630),
    "eurosat": (5_000, 5_000, 5_000),
    "fer2013": (28_709, 3_589, 3_589),
    "kitti_distance": (6_347, 423, 711),
}
# Metrics other than accuracy; the first selects the best step. MVLPT reports accuracy for
# hateful_memes.
METRICS: Mapping[str, tuple[str, ...]] = {
    "caltech101": ("mean_per_class",),
    "fgvc_aircraft": ("mean_per_class",),
    "oxford_flowers102": ("mean_per_class",),
    "oxford_pets": ("mean_per_class",),
    "voc2007": ("map_11point",),
    "hateful_memes": ("roc_auc", "accuracy"),
}

CLASSES: Mapping[str, ClassTable] = {
    "hateful_memes": names.table(names.HATEFUL_MEMES),
    "cifar10": names.table({x: x for x in names.CIFAR10}),
    "cifar100": names.shipped("cifar100"),
    "mnist": names.table({x: x for x in "0123456789"}),
    "oxford_flowers102": names.tfds_names(
        "oxford_flowers102:2.1.1", 102, exceptions=names.FLOWERS_ELEVATER
    ),
    "oxford_pets": names.tfds_names("oxford_iiit_pet:4.0.0", 37),
    "resisc45": names.tfds_names("resisc45:3.0.0", 45),
    "country211": names.shipped("country211"),
    "food101": names.tfds_names("food101:2.1.0", 101),
    "stanford_cars": names.tfds_names("cars196:2.1.0", 196),
    "fgvc_aircraft": names.shipped("fgvc_aircraft"),
    "caltech101": names.tfds_names("caltech101:3.0.2", 102, exceptions=names.CALTECH_ELEVATER),
    "dtd": names.tfds_names("dtd:3.0.1", 47),
    "voc2007": names.table({x: names.VOC_SPACED.get(x, x) for x in names.VOC}),
    "patch_camelyon": names.table(names.PATCH_CAMELYON),
    "rendered_sst2": names.table(names.RENDERED_SST2),
    "gtsrb": names.shipped("gtsrb"),
    "eurosat": names.table(names.EUROSAT_ELEVATER),
    "fer2013": names.table({str(label): name for label, name in names.FER2013.items()}),
    "kitti_distance": names.table(names.KITTI_DISTANCE),
}


def sets(base: str) -> tuple[ImageSet, ...]:
    """Returns the table of the suite, with `elevater_voc2007_published`, whose class names lack
    spaces as the published ones do.

    Args:
        base: The folder with the sets that TFDS does not have.
    """
    sources: dict[str, ImageSource] = {
        "hateful_memes": listed(base, "hateful_memes", CLASSES["hateful_memes"]),
        "cifar10": _tfds("cifar10", "cifar10:3.0.2", ("id",)),
        "cifar100": _tfds("cifar100", "cifar100:3.0.2", ("id",)),
        "mnist": _tfds("mnist", "mnist:3.0.1", ()),  # TFDS has no feature that identifies an image
        "oxford_flowers102": _tfds("oxford_flowers102", "oxford_flowers102:2.1.1", ("file_name",)),
        "oxford_pets": _tfds("oxford_pets", "oxford_iiit_pet:4.0.0", ("file_name",)),
        "resisc45": _divided("resisc45", "resisc45:3.0.0", 31_500, (0.1, 0.1, 0.8)),
        "country211": folders(base, "country211", CLASSES["country211"]),
        "food101": tfds(
            "food101:2.1.0",
            {"train": 75_750, "validation": 25_250},
            CLASSES["food101"],
            ("id",),
            **{"train": "train", "test": "validation"},
        ),
        "stanford_cars": _tfds("stanford_cars", "cars196:2.1.0", ("id",)),
        "fgvc_aircraft": listed(base, "fgvc_aircraft", CLASSES["fgvc_aircraft"]),
        "caltech101": _tfds("caltech101", "caltech101:3.0.2", ("label", "image/file_name")),
        "dtd": _tfds("dtd", "dtd:3.0.1", ("file_name",)),
        "voc2007": voc.source(),
        "patch_camelyon": _tfds("patch_camelyon", "patch_camelyon:2.0.0", ("id",)),
        "rendered_sst2": folders(base, "rendered_sst2", CLASSES["rendered_sst2"]),
        "gtsrb": listed(base, "gtsrb", CLASSES["gtsrb"]),
        "eurosat": _divided("eurosat", "eurosat/rgb:2.0.0", 27_000, (5 / 27,) * 3),
        "fer2013": listed(base, "fer2013", CLASSES["fer2013"]),
        "kitti_distance": kitti.source(),
    }
    rows = [
        ImageSet(
            PREFIX + name, source, CLASSES[name], ELEVATER[name], METRICS.get(name, ("accuracy",))
        )
        for name, source in sources.items()
    ]
    published = ImageSet(
        f"{PREFIX}voc2007_published",
        voc.source(),
        names.table({x: x for x in names.VOC}),
        ELEVATER["voc2007"],
        METRICS["voc2007"],
        drawn_as=f"{PREFIX}voc2007",
    )
    return (*rows, published)


def _tfds(name: str, data: str, ids: Sequence[str]) -> ImageSource:
    """Returns the source of a TFDS data set with the splits of the toolkit."""
    splits = zip(("train", "validation", "test"), SIZES[name], strict=True)
    return tfds(data, {split: size for split, size in splits if size}, CLASSES[name], ids)


def _divided(name: str, data: str, size: int, shares: Sequence[float]) -> DividedImages:
    whole = tfds(data, {"train": size}, CLASSES[name], ("filename",))
    published = dict(zip(("train", "validation", "test"), SIZES[name], strict=True))
    parts = pooled("train", shares=shares)
    return DividedImages(whole, parts, PREFIX + name, published=published)


SETS = sets(root())
register(SETS)

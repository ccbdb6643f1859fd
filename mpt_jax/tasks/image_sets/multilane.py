"""MULTI-LANE's sequences of tasks: importing this module registers

    voc2007_b0_c4_1 ... voc2007_b0_c4_5      Pascal VOC 2007, four classes in each task
    voc2007_b10_c2_1 ... voc2007_b10_c2_6    ten classes, then two in each task
    cifar100_b0_c10_1 ... cifar100_b0_c10_10 CIFAR-100, ten classes in each task

Classes are in alphabetical order. VOC trains on its train and validation splits, and has no other
validation. COCO 2014 and ImageNet-R are not here; `incremental.register` divides any source.
"""

from __future__ import annotations

from mpt_jax.core.runs import look_up
from mpt_jax.tasks import incremental
from mpt_jax.tasks.image_sets import elevater, voc
from mpt_jax.tasks.image_sets.rows import tfds
from mpt_jax.tasks.image_splits import DividedImages, Share

# Name -> (classes, of the first task or 0, of each further task).
VOC = {"voc2007_b0_c4": (20, 0, 4), "voc2007_b10_c2": (20, 10, 2)}
CIFAR = {"cifar100_b0_c10": (100, 0, 10)}


def sequence(name: str) -> list[str]:
    """Returns the tasks of a sequence in order.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    sizes = incremental.task_sizes(*look_up("sequence", name, {**VOC, **CIFAR}))
    return [f"{name}_{number}" for number in range(1, len(sizes) + 1)]


def register() -> None:
    """Registers the tasks."""
    parts = {"train": Share(("train", "validation")), "test": Share(("test",))}
    whole = DividedImages(voc.source(), parts, "voc2007_trainval")
    for name, division in VOC.items():
        incremental.register(name, whole, incremental.task_sizes(*division), splits=tuple(parts))
    classes = elevater.CLASSES["cifar100"]
    train, _, test = elevater.SIZES["cifar100"]
    source = tfds("cifar100:3.0.2", {"train": train, "test": test}, classes, ("id",))
    for name, division in CIFAR.items():
        sizes = incremental.task_sizes(*division)
        incremental.register(name, source, sizes, splits=("train", "test"))


register()

"""MULTI-LANE's sequences of tasks: importing this module registers

    voc2007_b0_c4_1 ... voc2007_b0_c4_5      Pascal VOC 2007, four classes in each task
    voc2007_b10_c2_1 ... voc2007_b10_c2_6    ten classes, then two in each task
    cifar100_b0_c10_1 ... cifar100_b0_c10_10 CIFAR-100, ten classes in each task

Classes are in alphabetical order. VOC trains on its train and validation splits, and has no other
validation. COCO 2014 and ImageNet-R are not here; `incremental.register` divides any source.
"""

from __future__ import annotations

from mpt_jax.tasks import incremental
from mpt_jax.tasks.image_sets import elevater, voc
from mpt_jax.tasks.image_sets.rows import tfds
from mpt_jax.tasks.image_splits import DividedImages, Share

# Name -> (classes of the first task or 0, classes of each further task).
VOC = {"voc2007_b0_c4": (0, 4), "voc2007_b10_c2": (10, 2)}
VOC_CLASSES, CIFAR_CLASSES = 20, 100
CIFAR = "cifar100_b0_c10"


def sequence(name: str) -> list[str]:
    """Returns the tasks of a sequence in order."""
    base, step = VOC.get(name, (0, 10))
    sizes = incremental.task_sizes(VOC_CLASSES if name in VOC else CIFAR_CLASSES, base, step)
    return [f"{name}_{number}" for number in range(1, len(sizes) + 1)]


def register() -> None:
    """Registers the tasks."""
    parts = {"train": Share(("train", "validation")), "test": Share(("test",))}
    whole = DividedImages(voc.source(), parts, "voc2007_trainval")
    for name, (base, step) in VOC.items():
        sizes = incremental.task_sizes(VOC_CLASSES, base, step)
        incremental.register(name, whole, sizes, splits=tuple(parts))
    classes = elevater.CLASSES["cifar100"]
    train, _, test = elevater.SIZES["cifar100"]
    source = tfds("cifar100:3.0.2", {"train": train, "test": test}, classes, ("id",))
    sizes = incremental.task_sizes(CIFAR_CLASSES, 0, 10)
    incremental.register(CIFAR, source, sizes, splits=("train", "test"))


register()

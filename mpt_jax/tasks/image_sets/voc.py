"""Pascal VOC 2007 as multi-label classification."""

from __future__ import annotations

from mpt_jax.tasks.image_sets.class_names import VOC
from mpt_jax.tasks.image_tfds import TfdsImages

SIZES = {"train": 2_501, "validation": 2_510, "test": 4_952}
# What an image is for a class of which it shows only objects that are marked difficult.
POLICIES = {"negative": "labels_no_difficult", "positive": "labels"}


def source(difficult: str = "negative") -> TfdsImages:
    """Returns the source of the task.

    Args:
        difficult: What an image is for a class of which it shows only objects that are marked
            difficult: 'negative' or 'positive'. It may thus have no class.

    Raises:
        ValueError: `difficult` is neither.
    """
    if difficult not in POLICIES:
        raise ValueError(f"difficult={difficult!r} is not a policy. Use {' or '.join(POLICIES)}.")
    return TfdsImages(
        "voc/2007:5.0.0",
        {split: split for split in SIZES},
        SIZES,
        VOC,
        label=POLICIES[difficult],
        ids=("image/filename",),
        multi_label=True,
    )

"""KITTI's distance task: how far the nearest vehicle is, derived from the detection labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from mpt_jax.tasks.image_tfds import TfdsImages

VEHICLES = 3  # types 0, 1 and 2 are Car, Van and Truck
NEAR, MIDDLE, FAR = 8.0, 20.0, 999.0  # upper bounds of the first three classes, in meters
NOTHING = 1000.0  # distance if there is no vehicle
SIZES = {"train": 6_347, "validation": 423, "test": 711}


def distance_class(row: Mapping[str, Any]) -> tf.Tensor:
    """Returns the class of an image, int32 [1]: 0, 1 or 2 if the nearest vehicle is at most 8, 20
    or 999 meters away, else 3. The distance is the z coordinate of its location."""
    objects = row["objects"]
    is_vehicle = objects["type"] < VEHICLES
    away = tf.where(is_vehicle, objects["location"][:, 2], NOTHING)
    nearest = tf.reduce_min(tf.concat([away, [NOTHING]], 0))
    bounds = tf.constant([NEAR, MIDDLE, FAR])
    return tf.reduce_sum(tf.cast(nearest > bounds, tf.int32))[None]


def source() -> TfdsImages:
    """Returns the source of the task."""
    return TfdsImages(
        "kitti:3.3.0",
        {split: split for split in SIZES},
        SIZES,
        ("0", "1", "2", "3"),
        derive=distance_class,
        reads=("objects",),
        ids=("image/file_name",),
    )

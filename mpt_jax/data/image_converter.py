"""SeqIO feature converter that produces the batch contract of images.

    image         uint8   [B, S, S, 3]  decoded, resized and, in training, augmented
    task_ids      int32   [B]           bank row of the example
    label         int32   [B]           class id within the example's task; -1 in a multi-label task
    labels        float32 [B, C]        classes of the example, 0 or 1; only with multi-label tasks
    loss_weights  float32 [B]           1; 0 in rows that only fill a batch
    example_ids   int32   [B]           hash of the example's name

For an image cache, which decodes an image only once, a batch has in place of `image`

    image_files   string  [B]           encoded images
    image_names   string  [B]           the examples, for errors

Prompts of images need no reserved positions, because all images have the same number of patches.
The model normalizes pixels, so a batch has one byte per value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax.core.batch import FILE_NAMES, FILES
from mpt_jax.core.runs import Runs
from mpt_jax.data import image_transforms
from mpt_jax.data.classes import TARGETS
from mpt_jax.data.feature_converter import assert_that, unknown_run
from mpt_jax.data.image_preprocessors import EXAMPLE_NAMES, IMAGE, example_id
from mpt_jax.data.preprocessors import TASK_IDS, map_dataset, task_id
from mpt_jax.data.token_tables import PASS_NUMBERS

_Spec = seqio.FeatureConverter.FeatureSpec


class PromptImageConverter(seqio.FeatureConverter):
    """Converts features of image tasks into the batch contract of images.

    Args:
        runs: the runs of the job; the name of an example's task determines its bank row.
        transform: the transform of images; the model supplies it.
        num_classes: the number of classes of each bank row; the model supplies it.
        multi_label: whether the task of each bank row is multi-label; the model supplies it.
        augmentation: the augmentation of training images, in place of the transform; None for the
            transform. The model supplies it. Only examples of a `TaskMixture` have the number of
            their pass, without which they are not augmented.
        seed: the seed of the augmentation.
        decode: whether batches have images or, for an image cache, encoded files.
        pack, use_custom_packing_ops: must be False, because an image fills its row.

    Raises:
        ValueError: packing is requested, or augmentation of images that are not decoded.
    """

    TASK_FEATURES = {
        IMAGE: _Spec(dtype=tf.string),
        TARGETS: _Spec(dtype=tf.int32),
        TASK_IDS: _Spec(dtype=tf.int32),
        EXAMPLE_NAMES: _Spec(dtype=tf.string),
    }
    MODEL_FEATURES = {
        "image": _Spec(dtype=tf.uint8, rank=3),
        "task_ids": _Spec(dtype=tf.int32, rank=0),
        "label": _Spec(dtype=tf.int32, rank=0),
        "labels": _Spec(dtype=tf.float32),
        "loss_weights": _Spec(dtype=tf.float32, rank=0),
        "example_ids": _Spec(dtype=tf.int32, rank=0),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(  # noqa: PLR0913 - gin and the model bind each of them
        self,
        runs: Runs,
        transform: image_transforms.ImageTransform,
        num_classes: Sequence[int],
        multi_label: Sequence[bool],
        augmentation: image_transforms.Augmentation | None = None,
        seed: int = 0,
        decode: bool = True,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
    ):
        if pack or use_custom_packing_ops:
            raise ValueError(
                "Images cannot be packed, because each fills its row of a batch. Drop "
                "--gin_file=gin/runs/packed.gin (set DatasetConfig.pack = False)."
            )
        if augmentation is not None and not decode:
            raise ValueError(
                "Images are augmented (AUGMENTATION), so they have to be decoded in every step. "
                "Set PromptImageConverter.decode to True (omit gin/runs/image_cache.gin)."
            )
        for name in runs.run_names:
            task_id(name)
        super().__init__(pack=False, apply_length_check=False)
        self.runs = runs
        self._transform, self.augmentation = transform, augmentation
        self._seed, self._decode = seed, decode
        self._num_classes = tuple(num_classes)
        self._multi_label = tuple(multi_label)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, Any] | None = None
    ) -> tf.data.Dataset:
        """Converts a dataset; raises ValueError if its examples are not those of image tasks."""
        del task_feature_lengths  # images have no length limits
        features: list[str] = sorted(dict(ds.element_spec))  # type: ignore[arg-type]
        if missing := sorted(set(self.TASK_FEATURES) - set(features)):
            raise ValueError(
                f"The dataset has no feature {missing[0]!r} (it has {', '.join(features)}), so it "
                "is not of image tasks. Register the tasks with mpt_jax.tasks.images.register, or "
                "use a stage for texts."
            )
        return map_dataset(ds, self._converted)

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, Any] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each model feature, without the batch."""
        return {name: shape for name, (shape, _) in self.feature_shapes().items()}

    def feature_shapes(
        self, task_feature_lengths: Mapping[str, Any] | None = None
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape, without the batch, and the dtype of each model feature."""
        del task_feature_lengths  # images have no length limits
        size = self._transform.size
        images: dict[str, tuple[tuple[int, ...], str]] = {"image": ((size, size, 3), "uint8")}
        if not self._decode:
            images = dict.fromkeys((FILES, FILE_NAMES), ((), "string"))
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            **images,
            "task_ids": ((), "int32"),
            "label": ((), "int32"),
            "loss_weights": ((), "float32"),
            "example_ids": ((), "int32"),
        }
        if any(self._multi_label):
            shapes["labels"] = ((max(self._num_classes),), "float32")
        return shapes

    def _convert_features(self, ds: Any, task_feature_lengths: Any) -> Any:
        raise TypeError("Call the converter itself.")  # abstract in SeqIO

    def _converted(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Converts one example, in the graph."""
        row, name = self._row(example), example[EXAMPLE_NAMES][0]
        targets = self._checked_targets(example[TARGETS], row, name)
        is_multi = tf.constant(self._multi_label)[row]
        features = {
            **self._image(
                example, tf.strings.join(["example ", name, " of ", self._run_name(row)])
            ),
            "task_ids": row,
            "label": tf.where(is_multi, -1, tf.reduce_max(tf.concat([targets, [-1]], 0))),
            "loss_weights": tf.constant(1.0),
            "example_ids": example_id(name),
        }
        if any(self._multi_label):
            most = max(self._num_classes)
            # A row of zeros, because an example may have no class.
            hot = tf.concat([tf.one_hot(targets, most), tf.zeros([1, most])], 0)
            features["labels"] = tf.reduce_max(hot, 0)
        return features

    def _image(self, example: Mapping[str, tf.Tensor], what: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the pixels of an example's image, or its file."""
        if not self._decode:
            return {FILES: example[IMAGE][0], FILE_NAMES: what}
        pixels = image_transforms.decode(example[IMAGE][0], what)
        if self.augmentation is not None and PASS_NUMBERS in example:
            number = example_id(example[EXAMPLE_NAMES][0])
            image = self.augmentation(pixels, self._seed, example[PASS_NUMBERS][0], number)
        else:
            image = self._transform(pixels)
        size = self._transform.size
        image.set_shape([size, size, 3])
        return {"image": image}

    def _row(self, example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns the example's bank row, a scalar. Fails in the graph for an unknown task."""
        identity = example[TASK_IDS][0]
        is_run = tf.equal(tf.constant([task_id(n) for n in self.runs.run_names]), identity)
        check = assert_that(tf.reduce_any(is_run), lambda: unknown_run(self.runs, identity))
        with tf.control_dependencies([check]):
            return tf.argmax(is_run, output_type=tf.int32)

    def _checked_targets(self, targets: tf.Tensor, row: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
        """Returns the class ids; fails in the graph if the task has no such class, or if a
        single-label example does not have exactly one."""
        count = tf.constant(self._num_classes)[row]
        in_range = tf.reduce_all((targets >= 0) & (targets < count))
        enough = tf.constant(self._multi_label)[row] | tf.equal(tf.size(targets), 1)

        def message() -> tf.Tensor:
            return tf.strings.join(
                [
                    "Example ",
                    name,
                    " of ",
                    self._run_name(row),
                    tf.strings.format(" has the class ids {}, but its task has ", targets),
                    tf.strings.format("{} classes. Correct the labels of the data.", count),
                ]
            )

        with tf.control_dependencies([assert_that(in_range & enough, message)]):
            return tf.identity(targets)

    def _run_name(self, row: tf.Tensor) -> tf.Tensor:
        return tf.constant(self.runs.run_names)[row]

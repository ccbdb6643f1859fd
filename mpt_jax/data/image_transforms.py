"""Decoding, resizing and augmentation of images in tf.data pipelines.

Images stay uint8: the model normalizes them on the device. Resizing is Pillow's bicubic filter with
antialiasing, which the published CLIP and ViT weights were trained and evaluated with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from mpt_jax.data import image_formats

MODES = ("crop", "squash")
_TRIES = 10  # crops that are drawn before the fallback, as in torchvision


def decode(encoded: tf.Tensor | bytes, what: tf.Tensor | str) -> tf.Tensor:
    """Decodes an image in a graph; `image_formats` says which files it reads.

    An image that cannot be decoded raises `tf.errors.InvalidArgumentError`, whose message
    `dataset_iterator.plain_message` turns into one that names the example.

    Args:
        encoded: the content of the file, a scalar string.
        what: the example in errors, a scalar string: 'row 17 of pets (cat_3.jpg)'.

    Returns:
        RGB values, uint8 [h, w, 3].
    """

    def pixels(content):
        try:
            return image_formats.pixels(content), ""
        except ValueError as error:
            return np.zeros((0, 0, 3), np.uint8), str(error)

    # An error of a TensorFlow operation cannot be given the example's name in a graph. Stateless,
    # because tf.data cannot save the position of a stateful function.
    image, problem = tf.numpy_function(pixels, [encoded], [tf.uint8, tf.string], stateful=False)
    problem.set_shape([])
    message = tf.strings.join(["The image of ", what, " cannot be used: ", problem])
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(problem, ""), [message])]):
        image = tf.identity(image)
    image.set_shape([None, None, 3])
    return image


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Deterministic transform to a square image, for evaluation and for training without
    augmentation.

    Attributes:
        size: S, the number of pixels of an edge of the result.
        mode: 'crop' resizes the shorter edge and crops the center; 'squash' resizes both edges to
            S, which changes the aspect ratio.
        resize_to: length of the shorter edge before cropping; by default S.

    Raises:
        ValueError: a setting is out of range or would have no effect.
    """

    size: int
    mode: str = "crop"
    resize_to: int | None = None

    def __post_init__(self):
        _check_image_size("ImageTransform", self.size)
        if self.mode not in MODES:
            raise ValueError(
                f"ImageTransform.mode must be {' or '.join(map(repr, MODES))}, got {self.mode!r}. "
                "Correct the binding."
            )
        if self.resize_to is not None and self.mode != "crop":
            raise ValueError(
                f"ImageTransform.resize_to = {self.resize_to} would have no effect with the mode "
                f"{self.mode!r}. Unset it, or set ImageTransform.mode to 'crop'."
            )
        if self.resize_to is not None and self.resize_to < self.size:
            raise ValueError(
                f"ImageTransform.resize_to is {self.resize_to}, less than the size of the crop, "
                f"{self.size}. Set it to at least {self.size}."
            )

    def __call__(self, image: tf.Tensor) -> tf.Tensor:
        """Transforms uint8 [h, w, 3] to uint8 [S, S, 3]. An image of S x S is returned unchanged,
        unless `resize_to` is larger."""
        shape = tf.shape(image)
        is_done = tf.reduce_all(tf.equal(shape[:2], self.size))
        is_done &= self.resize_to in (None, self.size)
        result = tf.cond(is_done, lambda: image, lambda: self._resized(image, shape[0], shape[1]))
        result.set_shape([self.size, self.size, 3])
        return result

    def of_file(self, encoded: bytes, what: str) -> np.ndarray:
        """Decodes and transforms an image outside of a graph.

        Args:
            encoded: the content of the file.
            what: the example in errors.

        Returns:
            uint8 [S, S, 3].

        Raises:
            ValueError: the image cannot be decoded.
        """
        try:
            pixels = image_formats.pixels(encoded)
        except ValueError as error:
            raise ValueError(f"The image of {what} cannot be used: {error}") from error
        return self(tf.constant(pixels)).numpy()

    def _resized(self, image: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        if self.mode == "squash":
            return _resize(image, (self.size, self.size), (0, 0), self.size)
        edge = tf.cast(self.resize_to or self.size, tf.int64)
        height, width = tf.cast(height, tf.int64), tf.cast(width, tf.int64)
        shorter = tf.minimum(height, width)
        resized = (edge * height // shorter, edge * width // shorter)
        # torchvision rounds half of an odd margin to the even number.
        first = [tf.round(tf.cast(x - self.size, tf.float64) / 2) for x in resized]
        return _resize(image, resized, (first[0], first[1]), self.size)

    def config(self) -> dict[str, Any]:
        """Returns the settings as JSON values, for fingerprints."""
        return {"kind": "transform", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random crop, resized to a square, and random horizontal flip, for training.

    Crops are drawn as by torchvision's RandomResizedCrop. The draws are a function of the seed, the
    epoch and the example only, so they are independent of machines, workers and order.

    Attributes:
        size: S, the number of pixels of an edge of the result.
        area: smallest and largest area of a crop, as a fraction of the image.
        ratio: smallest and largest aspect ratio (width / height) of a crop.
        flip: probability of the flip.

    Raises:
        ValueError: a setting is out of range.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self):
        _check_image_size("Augmentation", self.size)
        for name, highest, limit in (
            ("area", 1.0, " and at most 1"),
            ("ratio", 100.0, " and at most 100"),
        ):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise ValueError(
                    f"Augmentation.{name} must be two ascending numbers above 0{limit}, got "
                    f"{(low, high)}. Correct the binding."
                )
        if not 0 <= self.flip <= 1:
            raise ValueError(
                f"Augmentation.flip must be between 0 and 1, got {self.flip}. Correct the binding."
            )

    def __call__(self, image: tf.Tensor, seed: Any, epoch: Any, example_id: Any) -> tf.Tensor:
        """Crops, resizes and flips an image.

        Args:
            image: uint8 [h, w, 3].
            seed: the seed of the run, an integer of at most 63 bits.
            epoch: the number of the pass over the data, at most 2**31 - 1.
            example_id: the number of the example, uint32.

        Returns:
            uint8 [S, S, 3].
        """
        shape = tf.shape(image)
        top, left, height, width, flips = self.draw(shape[0], shape[1], seed, epoch, example_id)
        crop = image[top : top + height, left : left + width]
        result = _resize(crop, (self.size, self.size), (0, 0), self.size)
        result = tf.where(flips, result[:, ::-1], result)
        result.set_shape([self.size, self.size, 3])
        return result

    def draw(self, height: Any, width: Any, seed: Any, epoch: Any, example_id: Any):
        """Draws the crop of an image of `height` x `width` pixels and whether it is flipped;
        the last arguments are those of `__call__`.

        Returns:
            (top, left, height, width) of the crop, int32 scalars, and a boolean scalar.
        """
        key = tf.bitwise.bitwise_or(
            tf.bitwise.left_shift(tf.cast(epoch, tf.int64), tf.constant(32, tf.int64)),
            tf.cast(example_id, tf.int64),
        )
        # float64, so that rounding to pixels does not depend on the last bits of exp and sqrt,
        # which differ between processors.
        uniform = tf.random.stateless_uniform(
            [2 * _TRIES + 3],
            tf.stack([tf.cast(seed, tf.int64), key]),
            dtype=tf.float64,
            alg="philox",
        )
        tall, wide = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
        low, high = self.area
        areas = tall * wide * (low + (high - low) * uniform[:_TRIES])
        low, high = np.log(self.ratio)
        ratios = tf.exp(low + (high - low) * uniform[_TRIES : 2 * _TRIES])
        # tf.round, as Python's round, rounds halves to even numbers.
        widths, heights = tf.round(tf.sqrt(areas * ratios)), tf.round(tf.sqrt(areas / ratios))
        fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= tall)
        crop_tall, crop_wide = self._fallback(tall, wide)
        top, left = (tall - crop_tall) // 2, (wide - crop_wide) // 2
        found, chosen = tf.reduce_any(fits), tf.argmax(fits)
        crop_tall = tf.where(found, heights[chosen], crop_tall)
        crop_wide = tf.where(found, widths[chosen], crop_wide)
        top = tf.where(found, tf.floor(uniform[-3] * (tall - crop_tall + 1)), top)
        left = tf.where(found, tf.floor(uniform[-2] * (wide - crop_wide + 1)), left)
        box = [tf.cast(x, tf.int32) for x in (top, left, crop_tall, crop_wide)]
        return *box, uniform[-1] < self.flip

    def _fallback(self, tall: tf.Tensor, wide: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns height and width of the largest crop with an aspect ratio within bounds."""
        low, high = self.ratio
        ratio = wide / tall
        crop_tall = tf.where(ratio < low, tf.round(wide / low), tall)
        crop_wide = tf.where(ratio > high, tf.round(tall * high), wide)
        return crop_tall, crop_wide

    def config(self) -> dict[str, Any]:
        """Returns the settings as JSON values, for fingerprints."""
        settings = dataclasses.asdict(self)
        pairs = {"area": list(self.area), "ratio": list(self.ratio)}
        return {"kind": "augmentation", **settings, **pairs}


def _check_image_size(owner: str, size: int) -> None:
    if not 1 <= size <= 2**12:
        raise ValueError(
            f"{owner}.size must be between 1 and {2**12}, got {size}. Set it to the image size of "
            "the backbone."
        )


def _resize(image: tf.Tensor, resized: Any, first: Any, size: int) -> tf.Tensor:
    """Resizes an image and crops the result, as Pillow: the width first, rounded to uint8, then the
    height. Only the pixels of the crop are computed.

    Pillow 13 resizes the height first if it shrinks much more than the width. Here the width is
    always first, as in the earlier versions, with which the published weights were trained.

    Args:
        image: uint8 [h, w, 3].
        resized: height and width after resizing.
        first: the first row and column of the crop.
        size: S, height and width of the crop.

    Returns:
        uint8 [S, S, 3].
    """
    shape = tf.shape(image)
    # Rows are a batch, and later a row is one pixel with many channels, so each filter runs along
    # one dimension only.
    columns = _filter(image[:, tf.newaxis], 2, resized[1], first[1], size)
    columns = tf.reshape(columns, [1, shape[0], 1, 3 * size])
    rows = _filter(columns, 1, resized[0], first[0], size)
    return tf.cast(tf.reshape(rows, [size, size, 3]), tf.uint8)


def _filter(images: tf.Tensor, axis: int, resized: Any, first: Any, size: int) -> tf.Tensor:
    """Resizes axis 1 or 2 of images, and returns `size` entries of that axis from `first` on, in
    float32 but rounded and limited to 0..255. The other of the two axes must have the length 1."""
    scale = tf.cast(resized, tf.float64) / tf.cast(tf.shape(images)[axis], tf.float64)
    scale, first = tf.cast(scale, tf.float32), tf.cast(first, tf.float32)
    order = 1 if axis == 1 else -1  # of the two axes in the arguments
    values = tf.raw_ops.ScaleAndTranslate(
        images=images,
        size=[size, 1][::order],
        scale=tf.stack([scale, 1.0][::order]),
        translation=tf.stack([-first, 0.0][::order]),
        kernel_type="keyscubic",  # a = -0.5, Pillow's bicubic
        antialias=True,
    )
    return tf.clip_by_value(tf.floor(values + 0.5), 0.0, 255.0)

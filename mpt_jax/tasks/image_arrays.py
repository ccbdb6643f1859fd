"""Source of images in arrays, in memory or in an NPZ file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import tensorflow as tf
from etils import epath

from mpt_jax.core import schema
from mpt_jax.data import image_formats
from mpt_jax.runtime.tensors import load_npy
from mpt_jax.tasks.image_files import ORDER, Listing
from mpt_jax.tasks.image_sources import Index, ListedImages, check_classes

MOST_BYTES = 2**33  # of the arrays in an NPZ file
SUFFIX = ".npy"  # of a file in an NPZ file


class ArrayImages(ListedImages):
    """Source of images in arrays, which are encoded as PNG files at first use.

    Args:
        data: Split -> (images uint8 [n, h, w, 3 or 1] or [n, h, w], labels int [n], or bool [n, C]
            with `multi_label`); or the path of an NPZ file with the arrays `<split>_images` and
            `<split>_labels`.
        classes: The class names in label order.
        multi_label: Whether an image may have any number of classes.
    """

    def __init__(
        self,
        data: Mapping[str, tuple[Any, Any]] | str | os.PathLike[str],
        classes: Sequence[str],
        multi_label: bool = False,
    ):
        super().__init__((), multi_label)
        self.arrays, self.classes = data, tuple(classes)
        self._digests: dict[str, str] = {}

    def __str__(self) -> str:
        return "arrays" if isinstance(self.arrays, Mapping) else str(self.arrays)

    def load(self, item: tf.Tensor) -> tf.Tensor:
        """Returns `item`, which is an encoded image."""
        return item

    def sha256(self, split: str) -> str:
        """Returns the SHA-256 of a split's ids, labels and pixels. Takes one pass over the images,
        since an encoding may differ between versions of TensorFlow."""
        if split in self._digests:  # few-shot runs ask again
            return self._digests[split]
        digest = hashlib.sha256(super().sha256(split).encode())
        for item in self.listing[1][split][1]:
            pixels = image_formats.pixels(item)
            digest.update(f" {pixels.shape} ".encode() + pixels.tobytes())
        self._digests[split] = digest.hexdigest()
        return self._digests[split]

    def read_listing(self) -> Listing:
        """Encodes the arrays; see `ListedImages.read_listing`.

        Raises:
            FileNotFoundError: the NPZ file does not exist.
            ValueError: an array has another shape or type, a label is out of range, or a class has
                no image.
        """
        data = self.arrays
        if not isinstance(data, Mapping):
            data = _read_npz(epath.Path(data))
        listed: dict[str, tuple[Index, Sequence[Any]]] = {}
        for split in [x for x in ORDER if x in data] or [None]:
            if split is None or set(data) - set(ORDER):
                raise ValueError(
                    f"{self} has the splits {', '.join(map(repr, data)) or 'none'}, but only "
                    f"{', '.join(ORDER)} are known. Rename the splits."
                )
            images = _checked_images(data[split][0], f"{self}, {split}")
            labels = self._checked_labels(data[split][1], len(images), f"{self}, {split}")
            ids = tuple(f"{split}/{i}" for i in range(len(images)))
            encoded = [tf.io.encode_png(image).numpy() for image in images]
            listed[split] = Index(ids, labels), encoded
        check_classes(self, self.classes, [index for index, _ in listed.values()])
        return self.classes, listed

    def _checked_labels(self, given: Any, size: int, what: str) -> tuple[tuple[int, ...], ...]:
        labels, number = np.asarray(given), len(self.classes)
        shape = (size, number) if self.multi_label else (size,)
        kinds = "b" if self.multi_label else "iu"
        if labels.shape != shape or labels.dtype.kind not in kinds:
            kind = "booleans" if self.multi_label else "integers"
            raise ValueError(
                f"{what}: labels are {labels.dtype} {list(labels.shape)}, but {kind} of shape "
                f"{list(shape)} were expected. Pass one label for each image, or set multi_label."
            )
        if self.multi_label:
            return tuple(tuple(np.flatnonzero(row).tolist()) for row in labels)
        if outside := [x for x in labels.tolist() if not 0 <= x < number]:
            raise ValueError(
                f"{what}: {len(outside):,} of {size:,} labels are out of range, such as "
                f"{outside[0]}; there are {number} classes. Use labels from 0 to {number - 1}."
            )
        return tuple((x,) for x in labels.tolist())


def _checked_images(given: Any, what: str) -> np.ndarray:
    images = np.asarray(given)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{what}: images are {images.dtype} {list(np.shape(given))}, but uint8 [n, h, w, 3] or "
            "[n, h, w, 1] was expected. Convert them, for example with (255 * x).astype('uint8')."
        )
    if 0 in images.shape:
        raise ValueError(f"{what}: images of shape {list(images.shape)} are empty. Add images.")
    return images


def _read_npz(path: epath.Path) -> dict[str, tuple[Any, Any]]:
    """Reads an NPZ file, without objects, after checking the size of its arrays.

    Raises:
        FileNotFoundError, ValueError: see `ArrayImages.read_listing`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"The file {path} does not exist. Correct the path; relative paths start from the "
            "working directory."
        )
    with path.open("rb") as file:
        with schema.damage(
            f"{path} cannot be read as an NPZ file",
            "Write it with numpy.savez, with uint8 images and integer labels.",
        ):
            try:
                members = _npz_members(file)
            except OSError as error:  # a damaged offset
                raise ValueError(error.strerror) from error
    splits = [name.removesuffix("_images") for name in members if name.endswith("_images")]
    absent = [f"{x}_labels" for x in splits if f"{x}_labels" not in members]
    if not splits or absent:
        raise ValueError(
            f"{path} has the arrays {', '.join(members) or 'none'}, but lacks "
            f"{(absent or ['train_images'])[0]}. Write <split>_images and <split>_labels."
        )

    def array(name: str) -> np.ndarray:
        return load_npy(members.pop(name), f"{path}, {name},")

    return {x: (array(f"{x}_images"), array(f"{x}_labels")) for x in splits}


def _npz_members(file: IO[bytes]) -> dict[str, bytes]:
    """Returns array name -> its `.npy` file, of an NPZ file of at most `MOST_BYTES` of arrays."""
    with zipfile.ZipFile(file) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(SUFFIX)]
        # An archive with another size fails, since a member is read up to its declared size.
        size = sum(info.file_size for info in found)
        if size > MOST_BYTES:
            raise ValueError(f"its arrays have {size:,} bytes, the limit is {MOST_BYTES:,}")
        return {info.filename.removesuffix(SUFFIX): archive.read(info) for info in found}

"""Decoding of safetensors and `.npy` files, whose sizes are checked before anything is allocated.

safetensors checks its header against the size of the file. NumPy does not: it allocates an array of
the size that the header declares before it reads the values.
"""

from __future__ import annotations

import io
import math

import numpy as np
from safetensors.numpy import load

from mpt_jax.core import schema

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_safetensors(content: bytes, what: str, advice: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, by name.

    Args:
        content: the bytes of the file.
        what: the file; the subject of the error's first sentence.
        advice: what the user can do; the last sentence of the error.

    Raises:
        ValueError: the file is damaged, or has a dtype that NumPy lacks.
    """
    with schema.damage(f"{what} cannot be read", advice):
        return load(content)


def load_npy(content: bytes, what: str) -> np.ndarray:
    """Returns the array of a `.npy` file of numbers.

    Args:
        content: the bytes of the file.
        what: the file; the subject of the error's first sentence.

    Raises:
        ValueError: the file is truncated, damaged or pickled, or its header does not match its
            size.
    """
    with schema.damage(
        f"{what} is truncated, damaged, or not a plain array of numbers",
        "Copy it again, or save the array again with numpy.save.",
    ):
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"its format version {'.'.join(map(str, version))} is not supported")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.kind not in "biufc":
            raise ValueError(f"its values have the type {dtype}")
        size = math.prod(shape) * dtype.itemsize
        held = len(content) - file.tell()
        if min(shape, default=0) < 0 or size != held:
            raise ValueError(f"its shape {shape} needs {size} bytes of values, but it has {held}")
        file.seek(0)
        return np.load(file, allow_pickle=False)

"""Arrays from bytes: headers are compared with the file before anything is allocated."""

from __future__ import annotations

import io

import numpy as np
import pytest

from mpt_jax.runtime.tensors import load_npy, load_safetensors


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_load_npy_returns_the_array(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = load_npy(npy(array), "F.npy")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_load_npy_of_a_shape_beyond_the_file_error():
    content = npy(np.zeros((10, 10), np.float32)).replace(b"(10, 10)", b"(9999999999, 9999999999)")
    with pytest.raises(ValueError, match=r"^F.npy is truncated, .* Copy it again"):
        load_npy(content, "F.npy")
    content = npy(np.zeros((10, 10), np.float32)).replace(b"(10, 10)", b"(99, 99)")
    with pytest.raises(
        ValueError, match=r"its shape \(99, 99\) needs 39204 bytes of values, but it has 400"
    ):
        load_npy(content, "F.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy(np.zeros(4))[:-1],
        npy(np.array([{}], object), allow_pickle=True),
        npy(np.zeros(2, [("a", "f4")])),
        npy(np.zeros(3)).replace(b"(3,)", b"(-3,)"[:4]),
    ],
)
def test_load_npy_of_damaged_or_pickled_files_error(content):
    with pytest.raises(ValueError, match=r"^F.npy is truncated, damaged, or not a plain array"):
        load_npy(content, "F.npy")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
        b"[" * 3000,
    ],
)
def test_load_safetensors_of_absurd_headers_error(header):
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(ValueError, match=r"^F cannot be read: .* Copy it\.$"):
        load_safetensors(content, "F", "Copy it.")

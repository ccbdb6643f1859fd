"""Task ids of text batches and of image batches, through the same functions."""

import jax.numpy as jnp
import numpy as np

from mpt_jax.core import batch as contract
from tests.fixtures import tiny

IMAGES = {
    "task_ids": jnp.asarray([2, 0, 1], jnp.int32),
    "loss_weights": jnp.asarray([1.0, 1.0, 0.0]),
    "image": jnp.zeros((3, 4, 4, 3), jnp.uint8),
}


def texts():
    return {name: jnp.asarray(x) for name, x in tiny.batch([2, 0, 1]).items()}


def test_row_task_ids_of_texts_and_images():
    np.testing.assert_array_equal(contract.row_task_ids(texts()), [2, 0, 1])
    np.testing.assert_array_equal(contract.row_task_ids(IMAGES), [2, 0, 1])


def test_num_rows_of_arrays_and_shapes():
    assert contract.num_rows(texts()) == contract.num_rows(IMAGES) == 3


def test_used_task_ids_replaces_padding():
    np.testing.assert_array_equal(contract.used_task_ids(IMAGES, 9), [2, 0, 9])
    batch = texts()
    used = np.asarray(contract.used_task_ids(batch, 9))
    is_real = np.asarray(contract.encoder_mask(batch))
    np.testing.assert_array_equal(used[~is_real], 9)
    np.testing.assert_array_equal(used[is_real], np.asarray(batch["encoder_task_ids"])[is_real])


def test_map_task_ids_changes_task_ids_alone():
    for batch, names in ((texts(), contract.TASK_IDS[:2]), (IMAGES, contract.TASK_IDS[2:])):
        mapped = contract.map_task_ids(batch, lambda ids: ids + 5)
        assert mapped.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(mapped[name], value + 5 if name in names else value)


def test_is_packed():
    assert not contract.is_packed(texts()) and not contract.is_packed(IMAGES)
    assert contract.is_packed({**texts(), "encoder_segment_ids": jnp.ones((3, 8), jnp.int32)})

"""Rows of finished runs are left out of a batch; others keep their order and shard."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.training.row_compaction import RowCompactor
from tests.fixtures import tiny

RUNS = Runs(["a", "b", "c", "d"], groups="independent")


def whole(rows_each: int) -> dict[str, np.ndarray]:
    return tiny.batch(np.repeat(np.arange(4), rows_each).tolist(), seed=3)


def test_row_compactor_pack_keeps_order_and_pads_with_empty_rows():
    batch = whole(4)
    packed = RowCompactor(RUNS).pack(batch, [True, False, False, True])
    for name, value in packed.items():
        np.testing.assert_array_equal(value, batch[name][[0, 1, 2, 3, 12, 13, 14, 15]], name)
    packed = RowCompactor(RUNS).pack(batch, [False, False, True, False])
    assert len(packed["encoder_input_tokens"]) == 4
    # Three runs of four need all sixteen rows; one of three fills half of eight.
    three = RowCompactor(RUNS).pack(batch, [True, True, False, True])
    np.testing.assert_array_equal(three["encoder_input_tokens"], batch["encoder_input_tokens"])
    one = RowCompactor(RUNS, num_microbatches=8).pack(batch, [False, False, True, False])
    assert len(one["encoder_input_tokens"]) == 8
    for name, value in one.items():
        np.testing.assert_array_equal(value[:4], batch[name][8:12], name)
        if not name.endswith("task_ids"):
            assert not value[4:].any(), name
    assert (one["encoder_task_ids"][4:] == 2).all() and (one["decoder_task_ids"][4:] == 2).all()


def test_row_compactor_capacities_halve_and_divide():
    assert RowCompactor(RUNS).capacities(48) == [48, 24, 12, 6, 3]
    assert RowCompactor(RUNS, shards=4, num_microbatches=2).capacities(64) == [16, 8, 4, 2]
    assert RowCompactor(RUNS, shards=8).capacities(24) == [3]


def test_row_compactor_several_shards_keep_rows_on_their_shard():
    batch, active = whole(8), [True, False, False, True]
    task_ids = []
    for process in range(2):
        compactor = RowCompactor(RUNS, shards=4, first_shard=2 * process, local_shards=2)
        mine = {name: value[16 * process : 16 * (process + 1)] for name, value in batch.items()}
        packed = compactor.pack(mine, [active[0], True, False, False])
        task_ids.append(packed["encoder_task_ids"][:, 0])
    np.testing.assert_array_equal(np.concatenate(task_ids), np.repeat([0, 1, 2, 3], 8))
    two = RowCompactor(RUNS, shards=2, local_shards=2)  # a and b on one shard, c and d on the other
    halved = two.pack(batch, active)
    np.testing.assert_array_equal(halved["encoder_task_ids"][:, 0], np.repeat([0, 3], 8))
    alone = two.pack(batch, [True, False, False, False])
    np.testing.assert_array_equal(alone["encoder_task_ids"][:, 0], np.repeat([0, 2], 8))
    assert not alone["decoder_loss_weights"][8:].any()


def test_row_compactor_rows_out_of_order_error():
    batch = tiny.batch([0, 1, 2, 3, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="Row 1 .* from run 'b', but .* must be from run 'a'"):
        RowCompactor(RUNS).pack(batch, [True, False, True, True])
    with pytest.raises(ValueError, match="6 rows cannot be divided evenly among 4 runs"):
        RowCompactor(RUNS).pack(tiny.batch([0] * 6), [True, False, True, True])

"""Collation, packing and length buckets, compared with the data pipeline and the model."""

import functools
import re

import jax
import numpy as np
import pytest

from mpt_jax.batching import bucketing, collate, packing
from mpt_jax.batching.collate import Example
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.training.train_step import gradients
from tests.fixtures import tiny
from tests.fixtures.converter_examples import RUNS, assert_same, drawn, examples, rows_of

NAMES = RUNS.run_names


@pytest.mark.parametrize("prompt_length", [0, 2])
def test_unpacked_same_examples_equals_converter(prompt_length):
    made = drawn(7)
    dataset = examples(*((NAMES[e.row], e.inputs, e.targets) for e in made))
    expected = rows_of(
        PromptFeatureConverter(prompt_length, RUNS)(dataset, {"inputs": 9, "targets": 4})
    )
    assert_same(collate.unpacked(made, prompt_length, 9, 4), expected)


def test_unpacked_text_too_long_error():
    with pytest.raises(
        ValueError, match="has 3 tokens in inputs, but the limit is 2. .* text_length"
    ):
        collate.unpacked([Example([4, 4, 1], [1])], 2, 2, 1)


@pytest.mark.parametrize("example", [([4, 0, 1], [5]), ([4], [0]), ([4], []), ([], [5])])
def test_packed_empty_text_or_id_zero_error(example):
    with pytest.raises(ValueError, match="are empty or contain id 0"):
        collate.packed([Example(*example)], 0, {"inputs": 8, "targets": 8})


def test_best_fit_small_cases_match_hand_solution():
    # 6 and 5 open rows; 4 fills the row of 6; 3 and 2 go into the row of 5.
    lengths = np.array([[2, 1], [5, 1], [3, 1], [6, 1], [4, 1]])
    assert packing.best_fit(lengths, (10, 3)).tolist() == [0, 0, 0, 1, 1]
    assert packing.best_fit(lengths, (10, 2)).tolist() == [0, 1, 1, 2, 2]
    # Targets are limits as well: no row has room for two of these.
    assert packing.best_fit(np.array([[2, 2], [2, 2]]), (10, 3)).tolist() == [0, 1]


def best_fit_reference(lengths, capacity):
    """One example at a time, as the docstring of `best_fit` says."""
    left, rows = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i][0], i)):
        need = lengths[index]
        fits = [row for row, room in enumerate(left) if room[0] >= need[0] and room[1] >= need[1]]
        row = min(fits, key=lambda row: left[row][0], default=len(left))
        if row == len(left):
            left.append(list(capacity))
            rows.append([])
        rows[row].append(index)
        left[row] = [room - n for room, n in zip(left[row], need, strict=True)]
    return sorted(map(sorted, rows))


@pytest.mark.parametrize("capacity", [(64, 32), (40, 8), (40000, 40)])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_best_fit_of_windows_equals_reference(count, capacity):
    rng = np.random.default_rng(count)
    lengths = np.stack([rng.integers(1, 40, (5, count)), rng.integers(1, 9, (5, count))], axis=-1)
    for window, rows in zip(lengths, packing.best_fit(lengths, capacity), strict=True):
        found = [np.flatnonzero(rows == row).tolist() for row in range(rows.max() + 1)]
        assert found == best_fit_reference(window.tolist(), capacity)


def test_best_fit_example_longer_than_row_error():
    with pytest.raises(ValueError, match="needs 9 encoder and 1 target positions, .* has 8 and 4"):
        packing.best_fit(np.array([[3, 1], [9, 1]]), (8, 4))


# --- Same sums and gradients ---------------------------------------------------------------------


@functools.cache
def compiled():
    model = tiny.model(tiny.RUNS, objective=Objective(distillation=Distillation()))
    return jax.jit(functools.partial(gradients, model)), tiny.state(model, tiny.params(model))


def sums_and_gradients(batch):
    differentiate, state = compiled()
    found, metrics = differentiate(state.trainable, state.frozen, batch, None)
    return found, {k: m for k, m in metrics.items() if not k.startswith("batch/")}


@pytest.mark.parametrize("lengths", [(24, 8), pytest.param((40, 16), marks=pytest.mark.slow)])
def test_packed_batch_same_gradients_as_unpacked(lengths):
    made = drawn(9, seed=3)
    grads, metrics = sums_and_gradients(collate.unpacked(made, tiny.PROMPT, 9, 4))
    row = {"inputs": lengths[0], "targets": lengths[1]}
    packed = collate.packed(made, tiny.PROMPT, row)
    assert len(packed["encoder_input_tokens"]) < len(made)
    packed_grads, packed_metrics = sums_and_gradients(packed)
    tiny.close(packed_grads, grads, 1e-5)
    tiny.close(packed_metrics, metrics, 1e-5)


def test_length_buckets_trimmed_batch_same_gradients_as_full():
    made = [Example(e.inputs[:5], e.targets[:2], e.row) for e in drawn(6)]
    whole = collate.unpacked(made, tiny.PROMPT, 20, 12)
    buckets = bucketing.of_settings(
        {"inputs": [3, 5, 8], "targets": [2]}, tiny.PROMPT, {"inputs": 20, "targets": 12}
    )
    cut = buckets.trim(whole)
    assert cut["encoder_input_tokens"].shape == (6, tiny.PROMPT + 5)
    assert cut["decoder_target_tokens"].shape == (6, 2)
    assert buckets.trim(whole, targets=False)["decoder_target_tokens"].shape == (6, 12)
    expected, found = sums_and_gradients(whole), sums_and_gradients(cut)
    tiny.close(found[0], expected[0], 1e-6)
    tiny.close(found[1], expected[1], 1e-6)


def test_length_buckets_cut_empty_and_full_batch_bucket_lengths():
    buckets = bucketing.of_settings({"inputs": [4]}, tiny.PROMPT, {"inputs": 9, "targets": 4})
    nothing = {name: 0 * x for name, x in collate.unpacked(drawn(2), tiny.PROMPT, 9, 4).items()}
    assert buckets.trim(nothing)["encoder_input_tokens"].shape[1] == tiny.PROMPT + 4
    full = collate.unpacked([Example([5] * 9, [1])], tiny.PROMPT, 9, 4)
    assert buckets.trim(full)["encoder_input_tokens"].shape[1] == tiny.PROMPT + 9


@pytest.mark.parametrize("lengths", [(), (0, 4), (4, 4), (8, 4)])
def test_length_buckets_without_increasing_lengths_error_shows_them(lengths):
    for side in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=f"^The {side} lengths .*{re.escape(f'{lengths}')}"):
            bucketing.LengthBuckets(**{"encoder": (4,), "decoder": (4,), side: lengths})


def test_sorted_batches_windows_sorted_and_complete():
    lengths = np.array([5, 1, 4, 2, 9, 8, 7, 6, 3])
    found = [rows.tolist() for rows in bucketing.sorted_batches(lengths, 2, window=2)]
    assert found == [[1, 3], [2, 0], [7, 6], [5, 4], [8]]

"""Tests of prompts of several lengths in one batch, in the converter and in the model."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mpt_jax.batching import bucketing, collate
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.training.state import param_shapes
from tests.fixtures import tiny, training_runs
from tests.fixtures.converter_examples import RUNS, assert_same, drawn, examples, rows_of

OWN = (3, 7, 4)  # length of each row's prompt
LONGEST = max(OWN)
PRIVATE = dict(zip(RUNS.run_names, (1, 5, 2), strict=True))
MADE = drawn(7, seed=5)
TEXT, TARGETS = 9, 4


def dataset():
    return examples(*((RUNS.run_names[e.row], e.inputs, e.targets) for e in MADE))


def converter(**settings):
    return PromptFeatureConverter(LONGEST, RUNS, prompt_lengths=OWN, **settings)


def method(private=PRIVATE, **settings) -> CrossPT:
    return CrossPT(2, tiny.SOURCES, "private_cat", "softmax", private_length=private, **settings)


@pytest.fixture(scope="module")
def mixed():
    """A model whose rows have prompts of 3, 7 and 4 positions, and its parameters."""
    model = tiny.model(RUNS, method())
    assert model.prompt.prompt_lengths(RUNS) == OWN
    return model, tiny.params(model)


@pytest.fixture(scope="module")
def alone(mixed):
    """Logits of each example in a batch of one."""
    return [logits_alone(mixed[1], example) for example in MADE]


# --- Feature converter ---------------------------------------------------------------------------


def test_feature_converter_text_follows_prompt_of_own_length():
    found = rows_of(
        converter()(
            examples(("ft_gamma", [7, 8, 1], [5, 1]), ("ft_alpha", [9, 1], [1])),
            {"inputs": 3, "targets": 2},
        )  # fmt: skip
    )
    assert found[0]["encoder_input_tokens"] == [0, 0, 0, 0, 7, 8, 1, 0, 0, 0]
    assert found[0]["encoder_prompt_slots"] == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    assert found[0]["encoder_task_ids"] == [2] * 7 + [0] * 3
    assert found[1]["encoder_input_tokens"] == [0, 0, 0, 9, 1] + [0] * 5
    assert found[1]["encoder_prompt_slots"] == [1, 2, 3] + [0] * 7


def test_collate_variable_lengths_matches_feature_converter():
    lengths, row = {"inputs": TEXT, "targets": TARGETS}, {"inputs": 34, "targets": 12}
    assert_same(
        collate.unpacked(MADE, OWN, TEXT, TARGETS), rows_of(converter()(dataset(), lengths))
    )
    packed = converter(pack=True, pack_lengths=row)
    found = collate.packed(MADE, OWN, row)
    assert_same(found, rows_of(packed(dataset(), lengths)))
    used = sum(OWN[e.row] + len(e.inputs) for e in MADE)
    assert (found["encoder_segment_ids"] > 0).sum() == used, (
        "no slots beyond the example's own prompt"
    )


@pytest.mark.parametrize("lengths", [(3, 7), (3, 8, 4)])
def test_feature_converter_invalid_prompt_lengths_raise(lengths):
    with pytest.raises(ValueError, match="each of the 3 runs, and none above prompt_length = 7"):
        PromptFeatureConverter(LONGEST, RUNS, prompt_lengths=lengths)


# --- Model ---------------------------------------------------------------------------------------


@functools.cache
def program_alone(name: str):
    """Returns a model of a single run with exactly its prompt length, and its logits."""
    alone = tiny.model(Runs([name]), method(PRIVATE[name]))
    return alone, jax.jit(alone.logits)


def logits_alone(params, example) -> np.ndarray:
    """Returns the logits of one example from a model and converter of its run only."""
    name = RUNS.run_names[example.row]
    alone, logits = program_alone(name)
    prompt = {
        "sources": params["prompt"]["sources"],
        "router": params["prompt"]["router"][example.row][None],
        "private": params["prompt"]["private"][example.row][None, : PRIVATE[name]],
    }
    dataset = examples((name, example.inputs, example.targets))
    convert = PromptFeatureConverter(alone.prompt.prompt_length, alone.runs)
    (row,) = rows_of(convert(dataset, {"inputs": TEXT, "targets": TARGETS}))
    batch = {name: np.asarray([value], np.int32) for name, value in row.items()}
    found = logits(params | {"prompt": prompt}, tiny.arrays(batch))[0]
    return np.asarray(found)[: len(example.targets)]


@pytest.mark.parametrize("packed", [False, True])
def test_forward_variable_lengths_logits_equal_alone(packed, mixed, alone):
    model, params = mixed
    if packed:
        batch = collate.packed(MADE, OWN, {"inputs": 34, "targets": 12})
        assert len(batch["encoder_input_tokens"]) < len(MADE)
    else:
        batch = collate.unpacked(MADE, OWN, TEXT, TARGETS)
    found = np.asarray(jax.jit(model.logits)(params, tiny.arrays(batch)))
    segments = batch.get("decoder_segment_ids", batch["decoder_loss_weights"])
    unseen: list[np.ndarray | None] = list(alone)
    for row, numbers in enumerate(segments):
        for number in range(1, numbers.max() + 1):
            here = numbers == number
            first = [tuple(batch["decoder_target_tokens"][row, here]), found[row, here]]
            matching = [
                i for i, e in enumerate(MADE)
                if tuple(e.targets) == first[0]
                and e.row == batch["decoder_task_ids"][row, here][0]
                and unseen[i] is not None
                and np.allclose(unseen[i], first[1], 1e-5, 1e-5)
            ]  # fmt: skip
            assert matching, f"row {row}, example {number}"
            unseen[matching[0]] = None
    assert unseen == [None] * len(MADE)


def test_length_buckets_trimmed_batches_same_loss(mixed):
    model, params = mixed
    limits = {"inputs": TEXT, "targets": TARGETS}
    buckets = bucketing.of_settings({"inputs": [1, 4], "targets": [2]}, LONGEST, limits)
    cut_to = set()
    loss = jax.jit(model.eval_fn)
    for rows in ([0, 2], [1]):
        made = [e._replace(targets=e.targets[:2]) for e in MADE if e.row in rows][:2]
        whole = collate.unpacked(made, OWN, TEXT, TARGETS)
        cut = buckets.trim(whole)
        used = max(OWN[e.row] + len(e.inputs) for e in made)
        length = cut["encoder_input_tokens"].shape[1]
        assert length == min(n for n in buckets.encoder if n >= used)
        cut_to.add(length)
        np.testing.assert_allclose(loss(params, cut)[0], loss(params, whole)[0], rtol=1e-5)
    assert len(cut_to) > 1, "examples with different prompt lengths use different buckets"


def test_train_iterator_variable_lengths_reserves_each_length():
    training_runs.register_all()
    runs = Runs(training_runs.TASKS)
    private = dict(zip(runs.run_names, (2, 1, 4), strict=True))
    model = training_runs.build(method(private), runs, reserved=6)
    lengths = model.prompt.prompt_lengths(runs)
    assert lengths == (4, 3, 6)
    for changes in ({}, {"pack": True}):
        config = training_runs.dataset(runs, EqualQuotas(training_runs.BATCH, 1), **changes)
        batch = next(datasets.train_iterator(config, model.FEATURE_CONVERTER_CLS))
        slots, rows = batch["encoder_prompt_slots"], batch["encoder_task_ids"]
        is_text = batch["encoder_input_tokens"] > 0
        ends = slots[:, :-1] > slots[:, 1:]
        assert (is_text[:, 1:] == (is_text[:, 1:] | ends)).all(), (
            "the text follows the prompt directly"
        )
        assert set(zip(rows[:, :-1][ends], slots[:, :-1][ends], strict=True)) == set(
            enumerate(lengths)
        )
        found = param_shapes(model)[0]["prompt"]["private"].shape
        assert found == (3, 4, tiny.WIDTH)

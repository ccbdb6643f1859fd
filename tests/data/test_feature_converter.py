"""The batch contract, as literal arrays."""

import functools

import pytest
import seqio
import tensorflow as tf

from mpt_jax.data import feature_converter, preprocessors
from mpt_jax.data.feature_converter import PromptFeatureConverter
from tests.fixtures import memory_tasks
from tests.fixtures.converter_examples import RUNS, examples, rows_of

LENGTHS = {"inputs": 4, "targets": 3}


def test_feature_converter_unpacked_rows_match_contract():
    dataset = examples(("ft_gamma", [7, 8, 1], [5, 1]), ("ft_alpha", [9, 4, 3, 1], [6, 2, 1]))
    first, second = rows_of(PromptFeatureConverter(2, RUNS)(dataset, LENGTHS))
    assert first == {
        "encoder_input_tokens": [0, 0, 7, 8, 1, 0],
        "encoder_prompt_slots": [1, 2, 0, 0, 0, 0],
        "encoder_task_ids": [2, 2, 2, 2, 2, 0],
        "decoder_input_tokens": [0, 5, 1],
        "decoder_target_tokens": [5, 1, 0],
        "decoder_loss_weights": [1, 1, 0],
        "decoder_task_ids": [2, 2, 0],
    }
    assert second["encoder_input_tokens"] == [0, 0, 9, 4, 3, 1]
    assert second["encoder_task_ids"] == [0] * 6
    assert second["decoder_input_tokens"] == [0, 6, 2]


def test_feature_converter_no_prompt_reserves_no_slots():
    dataset = examples(("ft_beta", [7, 1], [5, 1]))
    (row,) = rows_of(PromptFeatureConverter(0, RUNS)(dataset, LENGTHS))
    assert row["encoder_input_tokens"] == [7, 1, 0, 0]
    assert row["encoder_prompt_slots"] == [0, 0, 0, 0]
    assert row["encoder_task_ids"] == [1, 1, 0, 0]


def test_feature_converter_packed_rows_match_contract():
    dataset = examples(
        ("ft_beta", [7, 1], [5, 1]), ("ft_gamma", [9, 4, 1], [1]), ("ft_alpha", [8], [6, 1])
    )
    converter = PromptFeatureConverter(
        2, RUNS, pack=True, pack_lengths={"inputs": 10, "targets": 4}
    )
    first, second = rows_of(converter(dataset, LENGTHS))
    assert first == {
        "encoder_input_tokens": [0, 0, 7, 1, 0, 0, 9, 4, 1, 0],
        "encoder_prompt_slots": [1, 2, 0, 0, 1, 2, 0, 0, 0, 0],
        "encoder_task_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
        "decoder_input_tokens": [0, 5, 0, 0],
        "decoder_target_tokens": [5, 1, 1, 0],
        "decoder_loss_weights": [1, 1, 1, 0],
        "decoder_task_ids": [1, 1, 2, 0],
        "decoder_segment_ids": [1, 1, 2, 0],
        "decoder_positions": [0, 1, 0, 0],
    }
    assert second["encoder_prompt_slots"] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert second["encoder_input_tokens"] == [0, 0, 8, 0, 0, 0, 0, 0, 0, 0]
    assert second["decoder_segment_ids"] == [1, 1, 0, 0]


def test_feature_converter_packed_without_prompt_has_no_slots():
    dataset = examples(("ft_beta", [7, 1], [5]), ("ft_gamma", [9, 1], [6]))
    (row,) = rows_of(PromptFeatureConverter(0, RUNS, pack=True)(dataset, LENGTHS))
    assert row["encoder_input_tokens"] == [7, 1, 9, 1, 0, 0, 0, 0]  # twice LENGTHS
    assert row["encoder_prompt_slots"] == [0] * 8
    assert row["encoder_task_ids"] == [1, 1, 2, 2, 0, 0, 0, 0]


def test_model_feature_lengths_packed_match_output_shapes():
    converter = PromptFeatureConverter(
        2, RUNS, pack=True, pack_lengths={"inputs": 12, "targets": 5}
    )
    found = converter(examples(("ft_beta", [7, 1], [5])), LENGTHS).element_spec
    expected = converter.get_model_feature_lengths(LENGTHS)
    assert {name: spec.shape[0] for name, spec in found.items()} == expected
    assert set(PromptFeatureConverter(2, RUNS).get_model_feature_lengths(LENGTHS).values()) == {
        6,
        3,
    }


def test_feature_converter_called_like_t5x_works():
    cls = functools.partial(PromptFeatureConverter, prompt_length=1, runs=RUNS)
    assert not cls(pack=False).pack
    assert cls(pack=True, use_custom_packing_ops=False).pack
    lengths = {**LENGTHS, "task_ids": 1}
    assert rows_of(cls(pack=False)(examples(("ft_beta", [7], [5])), lengths))


def test_feature_converter_unknown_run_names_it():
    preprocessors.task_id("ft_stranger")
    dataset = PromptFeatureConverter(1, RUNS)(examples(("ft_stranger", [7], [5])), LENGTHS)
    message = (
        "The task ft_stranger has no run in this job, whose runs are ft_alpha, ft_beta, ft_gamma."
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        rows_of(dataset)
    dataset = PromptFeatureConverter(1, RUNS)(examples(("", [7], [5]), task_ids=[1234567]), LENGTHS)
    with pytest.raises(tf.errors.InvalidArgumentError, match="unregistered id 1234567 has no run"):
        rows_of(dataset)


def test_feature_converter_dataset_without_task_ids_raises():
    dataset = examples(("ft_beta", [7], [5])).map(
        lambda x: {k: x[k] for k in ("inputs", "targets")}
    )
    with pytest.raises(ValueError, match=r"no feature 'task_ids' \(it has inputs, targets\)"):
        PromptFeatureConverter(1, RUNS)(dataset, LENGTHS)


@pytest.mark.parametrize(
    "inputs, targets, prompt, message",
    [
        ([7, 0, 1], [5], 2, "example of ft_beta, because its inputs contain id 0"),
        ([7, 1], [5, 0, 1], 2, "example of ft_beta, because its targets contain id 0"),
        ([7, 1], [], 2, "example of ft_beta, because its targets are empty."),
        ([], [5], 0, "example of ft_beta, because its inputs are empty."),
    ],
)
def test_feature_converter_unpackable_example_raises(inputs, targets, prompt, message):
    dataset = examples(("ft_beta", inputs, targets))
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        rows_of(PromptFeatureConverter(prompt, RUNS, pack=True)(dataset, LENGTHS))


def test_feature_converter_empty_input_with_prompt_packs():
    dataset = examples(("ft_beta", [], [5]), ("ft_gamma", [7], [6]))
    (row,) = rows_of(PromptFeatureConverter(2, RUNS, pack=True)(dataset, LENGTHS))
    assert row["encoder_prompt_slots"] == [1, 2, 1, 2] + [0] * 8
    assert row["encoder_task_ids"] == [1, 1, 2, 2, 2] + [0] * 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt_length": -1}, "prompt_length must be 0 or more, got -1"),
        ({"on_overlong": "cut"}, "on_overlong must be 'error' or 'truncate', got 'cut'"),
        ({"pack_lengths": {"inputs": 9}}, r"the keys 'inputs' and 'targets', got 'inputs'"),
        ({"pack_window": 0}, "pack_window must be 1 or more, got 0"),
        ({"use_custom_packing_ops": True}, "use_custom_packing_ops = True would have no effect"),
    ],
)
def test_feature_converter_invalid_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptFeatureConverter(**{"prompt_length": 2, "runs": RUNS, "pack": True, **arguments})


def test_pack_lengths_shorter_than_one_example_raise():
    converter = PromptFeatureConverter(
        20, RUNS, pack=True, pack_lengths={"inputs": 16, "targets": 8}
    )
    with pytest.raises(
        ValueError, match=r"pack_lengths\['inputs'\] is 16, .* may need 24 positions"
    ):
        converter.get_model_feature_lengths(LENGTHS)


def test_task_id_colliding_names_raise(monkeypatch):
    # "plumless" and "buckeroo" are a textbook CRC-32 collision.
    preprocessors.task_id("plumless")
    with pytest.raises(ValueError, match="'plumless' and 'buckeroo' have the same id"):
        preprocessors.task_id("buckeroo")


def test_renamed_preprocessors_replace_only_the_task_id():
    before = preprocessors.finish("ft_alpha")
    after = preprocessors.renamed(before, "ft_alpha_s1")
    assert [a is b for a, b in zip(after, before, strict=True)] == [True, True, False, True]
    assert after[2].id == preprocessors.task_id("ft_alpha_s1")
    with pytest.raises(ValueError, match="Cannot derive the task 'x', because no prep"):
        preprocessors.renamed([seqio.preprocessors.tokenize], "x")


def task(name, texts):
    """A registered task over (inputs, targets) texts with a byte vocabulary."""
    return memory_tasks.register(name, memory_tasks.listed(texts))


def test_finish_adds_eos_limits_and_task_id():
    found = list(
        task("ft_alpha", [("ab", "c"), ("abcd", "c")])
        .get_dataset({"inputs": 4, "targets": 3}, shuffle=False)
        .as_numpy_iterator()
    )
    # A byte is its value + 3, and 1 is EOS.
    assert [row["inputs"].tolist() for row in found] == [[100, 101, 1], [100, 101, 102, 1]]
    assert [row["targets"].tolist() for row in found] == [[102, 1], [102, 1]]
    identity = preprocessors.task_id("ft_alpha")
    assert [row["task_ids"].tolist() for row in found] == [[identity], [~identity]]


def test_on_overlong_error_raises_truncate_converts():
    dataset = task("ft_beta", [("abcd", "c")]).get_dataset(LENGTHS, shuffle=False)
    message = r"ft_beta is longer than task_feature_lengths allows \(inputs: 4, targets: 3\)"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        rows_of(PromptFeatureConverter(1, RUNS)(dataset, LENGTHS))
    (row,) = rows_of(PromptFeatureConverter(1, RUNS, on_overlong="truncate")(dataset, LENGTHS))
    assert row["encoder_input_tokens"] == [0, 100, 101, 102, 1]
    assert row["encoder_task_ids"] == [1] * 5


def test_end_and_limit_without_limits_keeps_text():
    (row,) = task("ft_beta", [("abcdef", "c")]).get_dataset(None, shuffle=False).as_numpy_iterator()
    assert row["inputs"].size == 7
    assert row["task_ids"].tolist() == [preprocessors.task_id("ft_beta")]


def test_on_overlong_task_without_limits_raises():
    dataset = examples(("ft_beta", [7] * 5, [5]))
    for policy in feature_converter.OVERLONG_POLICIES:
        converter = PromptFeatureConverter(1, RUNS, on_overlong=policy)
        with pytest.raises(tf.errors.InvalidArgumentError, match="ft_beta is longer than task_fe"):
            rows_of(converter(dataset, LENGTHS))

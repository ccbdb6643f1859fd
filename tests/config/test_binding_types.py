"""Types of bound values, through the shipped gin files."""

from __future__ import annotations

import pytest

from mpt_jax.config import gin_utils
from tests.fixtures import gin_files

TINY = [gin_files.SOURCE, "gin/tiny.gin"]


def error(binding: str, files=tuple(TINY), entry: str = "train") -> str:
    with pytest.raises(gin_utils.ConfigError) as caught:
        gin_files.parse(files, [binding], entry)
    return str(caught.value)


@pytest.mark.parametrize(
    "binding, message",
    [
        (
            "TASK_FEATURE_LENGTHS = 48",
            "TASK_FEATURE_LENGTHS must be a table {a string: a whole number} or None, got 48",
        ),
        (
            "PROMPT_LENGTH = '20'",
            "PROMPT_LENGTH must be a whole number, got '20', which is a string",
        ),
        ("TRAIN_STEPS = '5'", "Write TRAIN_STEPS = 5."),
        ("TRAIN_STEPS = 5e2", "Write TRAIN_STEPS = 500."),
        ("LEARNING_RATE = 'x'", "LEARNING_RATE must be a number or a list of numbers, got 'x'"),
        (
            "SOURCE_TASKS = 'toy_sst2'",
            "SOURCE_TASKS must be a list of strings, got 'toy_sst2', which is a string",
        ),
        ("TASK_MODULES = 'my_tasks'", "Write TASK_MODULES = ['my_tasks']."),
        ("BATCH_SIZE = True", "BATCH_SIZE must be a whole number, got True"),
        ("USE_CACHED_TASKS = 'yes'", "USE_CACHED_TASKS must be True or False, got 'yes'"),
        ("SAMPLER = 'random'", "SAMPLER must be an object of Sampler (@...) or None, got 'random'"),
        ("EVALUATOR_NUM_EXAMPLES = 'all'", "EVALUATOR_NUM_EXAMPLES must be a whole number or None"),
        (
            "losses.Distillation.weight = 'much'",
            "Distillation.weight must be a number, got 'much', which is a string. Correct Distill",
        ),
        (
            "utils.SaveCheckpointConfig.keep = [2]",
            "SaveCheckpointConfig.keep must be a whole number or None, got [2], which is a list",
        ),
    ],
)
def test_parse_wrong_type_raises_with_macro_value_and_type(own_trainer, binding, message):
    found = error(binding)
    assert message in found and "\n" not in found


def test_parse_macro_that_only_unused_code_reads_raises(own_trainer):
    found = error("T5_NAME = 't5_1_1_base'")  # tiny.gin has a T5_CONFIG without it
    assert (
        "The macro T5_NAME is read only by t5_config.name, which this configuration does" in found
    )
    gin_files.parse([gin_files.SOURCE], ["T5_NAME = 't5_1_1_base'"])


def test_parse_wrong_type_of_inference_raises(own_trainer):
    files = ["gin/eval.gin", "gin/methods/mpt.gin", "gin/tiny.gin"]
    assert "EVAL_BATCH_SIZE must be a whole number" in error("EVAL_BATCH_SIZE = '8'", files, "eval")


def test_parse_numbers_and_objects_of_right_type_are_accepted(own_trainer):
    bindings = ["LEARNING_RATE = 1", "CLIP_NORM = None", "SAVE_PERIOD = None", "EVAL_STEPS = 0"]
    bindings += ["TEACHERS = 'a/folder'", "INITIAL_ARTIFACT = ['a', 'b']", "START_FROM = 'same'"]
    gin_files.parse(TINY, bindings)

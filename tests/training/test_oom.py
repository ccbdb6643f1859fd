"""Out-of-memory errors: sizes and the settings that reduce them."""

from __future__ import annotations

import jax
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.oom import OutOfMemory, describe, explain_oom, larger_batch
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.trainer import Trainer
from tests.fixtures import tiny, tiny_clip


def make(num_microbatches=2) -> Trainer:
    runs = Runs(["alpha", "beta"], groups="independent")
    optimizer = PromptOptimizer({"task": Schedule(0.1, 9)})
    model = tiny.model(runs, PromptTuning(tiny.PROMPT), optimizer_def=optimizer)
    state = tiny.state(model, tiny.params(model))
    return Trainer(model, state, PjitPartitioner(), jax.random.PRNGKey(0), num_microbatches)


def exhausted(*_):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nat frame 7"
    )


def test_oom_message_lists_sizes_and_settings():
    made, batch = make(), tiny.batch([0] * 4 + [1] * 4)
    made._train_step = exhausted
    with pytest.raises(OutOfMemory) as caught, explain_oom(made, batch):
        made.train(batch)
    message = str(caught.value)
    assert (
        "(RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.)" in message
        and "frame" not in message
    )
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(made.state.frozen))
    assert f"{backbone / 1024:.1f} KiB of backbone" in message
    # Two prompts with two moments each, and per run a step count and one of Adam's.
    trainable = 3 * 2 * tiny.PROMPT * tiny.WIDTH * 4 + 2 * 2 * 4
    assert f"{trainable / 1024:.1f} KiB of trainable parameters" in message
    config, text = made.model.module.config, tiny.PROMPT + tiny.TEXT
    layers = text * config.num_encoder_layers + tiny.TARGET * config.num_decoder_layers
    inputs = 4 * layers * tiny.WIDTH * 4  # rows at a time, float32
    assert f"of 4 rows at a time, with {text} encoder and {tiny.TARGET} decoder" in message
    assert f"The layer inputs alone take {inputs / 1024:.1f} KiB" in message
    assert f"num_microbatches = 4 processes 2 rows at a time ({inputs / 2048:.1f} KiB of" in message
    split = f"({backbone / 2048:.1f} KiB each)"
    assert f"num_partitions = 2 splits the backbone over twice as many devices {split}" in message
    assert "remat = 'full'" in message and "Halving BATCH_SIZE leaves 4 rows" in message
    assert "2 groups of runs share this step" in message


@pytest.mark.parametrize(
    ("rows", "parts", "has", "lacks"),
    [
        ([0, 1], 2, "1 rows at a time", ["num_microbatches", "BATCH_SIZE"]),
        ([0], 1, "1 rows at a time", ["num_microbatches", "BATCH_SIZE", "Two jobs", " 0 rows"]),
        ([0, 0, 0, 1, 1, 1], 2, "num_microbatches = 6 processes 1 rows", ["num_microbatches = 4"]),
    ],
)
def test_oom_message_omits_inapplicable_advice(rows, parts, has, lacks):
    message = describe(make(parts), tiny.batch(rows), "RESOURCE_EXHAUSTED")
    assert has in message and not [word for word in lacks if word in message], message
    assert "num_partitions" in message and "TASK_FEATURE_LENGTHS" in message


def test_larger_batch_returns_batch_with_more_positions():
    short, long = tiny.batch([0, 1], text=3), tiny.batch([0, 1], text=9)
    assert (
        larger_batch({}, short) is short
        and larger_batch(short, long) is larger_batch(long, short) is long
    )


def test_explain_oom_other_errors_unchanged():
    made = make()

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    made._train_step = broken
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        with explain_oom(made, tiny.batch([0, 1])):
            made.train(tiny.batch([0, 1]))


def test_oom_message_of_images_names_their_settings():
    method = tiny_clip.prompts(image=False)
    model = tiny_clip.model(method, Runs(["pets", "shapes"], groups="independent"))
    state = tiny.state(model, tiny_clip.params(model))
    made = Trainer(model, state, PjitPartitioner(), jax.random.PRNGKey(0))
    message = describe(made, tiny_clip.batch([0, 0, 1, 1], [0, 1, 0, 1]), "no memory")
    tokens = model.module.config.image.num_tokens
    assert f"with {tokens} tokens per image, and of the texts of 5 classes" in message
    assert "published.clip_config.remat = 'full'" in message
    assert "TEXT_CHUNK = 2 encodes that many of the 5 class texts at a time" in message
    assert "TASK_FEATURE_LENGTHS" not in message
    frozen = tiny_clip.model(tiny_clip.prompts(text=False))
    row = frozen.row_cost(tiny_clip.batch([0], [0]))
    assert row.exact_remedy is None and "classes" not in row.description

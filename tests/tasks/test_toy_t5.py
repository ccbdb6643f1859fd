"""The tiny T5: its initial values, its pretraining data, and its skills."""

import functools
import pathlib
import random

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.convert import load_backbone
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.data import datasets, feature_converter
from mpt_jax.runtime import paths
from mpt_jax.tasks import toy, toy_init, toy_vocabulary

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def shipped():
    (checkpoint,) = pathlib.Path(paths.shipped(name="tiny_t5")).glob("checkpoint_*")
    return load_backbone(checkpoint)


# --- initial values --------------------------------------------------------------------------


def test_initial_params_matching_heads_share_query_key_projection():
    config = toy_init.TINY_T5
    params, again = toy_init.initial_params(), toy_init.initial_params()
    jax.tree.map(np.testing.assert_array_equal, params, again)
    columns = config.num_heads * config.head_dim // 2
    attentions = [params["encoder"][f"layers_{i}"]["attention"] for i in range(3)]
    attentions += [params["decoder"][f"layers_{i}"]["encoder_decoder_attention"] for i in range(2)]
    for attention in attentions:
        query, key = attention["query"]["kernel"], attention["key"]["kernel"]
        np.testing.assert_allclose(query[:, :columns] * 4 / 1.5, key[:, :columns], rtol=1e-6)
        correlation = np.corrcoef(query[:, columns:].ravel(), key[:, columns:].ravel())[0, 1]
        assert abs(correlation) < 0.05
    biases = params["encoder"]["relpos_bias"]["rel_embedding"]
    assert (biases[:4, 0] == -8).all() and (biases[:4, 1:] == 0).all()
    assert 1 < np.abs(biases[4:]).max() < 5


def test_initial_params_equal_words_attend_to_each_other():
    """In a matching head, a repeated word attends most to its other position."""
    params = toy_init.initial_params()
    tokens = np.array(random.Random(0).sample(range(3, 360), 12))
    tokens[9] = tokens[2]
    x = params["token_embedder"]["embedding"][tokens]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    attention = params["encoder"]["layers_0"]["attention"]
    heads = [(x @ attention[name]["kernel"]).reshape(12, 8, 16) for name in ("query", "key")]
    scores = np.einsum("qnd,knd->nqk", *heads)
    scores[:, np.arange(12), np.arange(12)] += toy_init.SELF_BIAS
    assert (scores[:4, 2].argmax(-1) == 9).sum() >= 3
    assert (scores[:4, 9].argmax(-1) == 2).sum() >= 3


# --- pretraining data ------------------------------------------------------------------------


def test_toy_pretrain_iterator_resumes_at_position():
    converter = functools.partial(
        feature_converter.PromptFeatureConverter, prompt_length=0, runs=Runs(["toy_pretrain"])
    )
    lengths = {"inputs": 40, "targets": 12}
    config = datasets.DatasetConfig("toy_pretrain", lengths, "train", 300, False, 1)
    make = functools.partial(datasets.train_iterator, config, converter, num_hosts=1, host_index=0)
    iterator = make()
    for _ in range(4):  # beyond the first chunk
        next(iterator)
    position, expected = iterator.state(), next(iterator)
    restored = make()
    restored.restore(position)
    found = next(restored)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert (next(restored)["encoder_input_tokens"] != expected["encoder_input_tokens"]).any()


# --- shipped files ---------------------------------------------------------------------------


def test_shipped_t5_matches_tiny_gin_config(shipped):
    assert _tiny_gin_config() == toy_init.TINY_T5
    tokens = jnp.ones((1, 2), jnp.int32)
    init = functools.partial(Transformer(toy_init.TINY_T5).init, jax.random.key(0))
    shapes = jax.eval_shape(init, tokens, tokens > 0, tokens)["params"]
    expected = {name: leaf.shape for name, leaf in flatten(shapes).items()}
    assert {name: leaf.shape for name, leaf in flatten(shipped).items()} == expected
    assert sum(leaf.size for leaf in flatten(shipped).values()) <= 3_000_000
    folder = pathlib.Path(paths.shipped(name="tiny_t5"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 12 * MEGABYTE


def _tiny_gin_config():
    """Returns the T5Config that gin/tiny.gin binds."""
    from mpt_jax.config import gin_utils

    gin_folder = pathlib.Path(gin_utils.__file__).parents[2]
    text = (gin_folder / "gin" / "tiny.gin").read_text()
    block = text.partition("config.T5Config:\n")[2].splitlines()
    lines = [line.split("=") for line in block if line.startswith("  ") and "%" not in line]
    fields = {name.strip(): gin.config.parse_value(value.strip()) for name, value in lines}
    return type(toy_init.TINY_T5)(**fields)


@pytest.mark.parametrize("task", toy.SOURCE_TASKS, ids=lambda task: task.name)
def test_shipped_t5_solves_prefixed_source_tasks(shipped, task):
    """On held-out rows, every token of the target, including EOS, must be the most likely."""
    ids = toy_vocabulary.word_ids()
    inputs, targets = np.zeros((200, 40), np.int32), np.zeros((200, 3), np.int32)
    for i, (text, target) in enumerate(toy.rows(task.name, "validation")):
        words = f"{task.name.removeprefix('toy_')} : {text}".split()
        inputs[i, : len(words) + 1] = [ids[word] for word in words] + [1]
        targets[i, :2] = ids[target], 1
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    network = Transformer(toy_init.TINY_T5)
    logits = jax.jit(network.apply)({"params": shipped}, inputs, inputs > 0, shifted)
    right = (np.asarray(logits).argmax(-1) == targets) | (targets == 0)
    assert right.all(-1).mean() >= 0.85  # the log's lowest is qnli, 0.905; chance is 0.5

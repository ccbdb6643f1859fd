"""A bank of adapters predicts and scores as the model of each run, and must fit the backbone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.serving.predict import backbone
from mpt_jax.serving.predict.compiled import Functions
from mpt_jax.serving.prompt_bank import Bank
from tests.fixtures import tiny
from tests.fixtures.adapted_models import METHODS, batch, model, params_of

ROWS = [2, 0, 1, 2]


def bank_of(folder, tree, method):
    """A bank of two artifacts: one with two runs, one with the third."""
    parts = {"pair": [0, 1], "third": [2]}
    found = []
    for name, rows in parts.items():
        own = jax.tree.map(lambda leaf: leaf[np.asarray(rows)], tree["prompt"])  # noqa: B023
        runs = Runs([tiny.RUNS.run_names[row] for row in rows])
        found.append(tiny.read_back(folder / name, method, own, runs))
    return Bank(found)


@pytest.mark.parametrize("name", METHODS)
def test_functions_of_adapters_equal_the_model(name, tmp_path):
    adapted, made = model(METHODS[name]), batch(ROWS)
    tree = params_of(adapted)
    bank = bank_of(tmp_path, tree, METHODS[name])
    assert bank.names == tiny.RUNS.run_names
    weights = {part: leaf for part, leaf in tree.items() if part != "prompt"}
    functions = Functions(adapted.module.config, bank.method, tiny.TARGET, None)
    given = weights, bank.arrays, made["encoder_input_tokens"]
    ids, scores = jax.jit(functions.predict)(*given, jnp.asarray(ROWS))
    expected, aux = jax.jit(adapted.predict_batch_with_aux)(tree, made)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, aux["scores"], 1e-5, 1e-5)
    found = jax.jit(functions.score)(*given, made["decoder_target_tokens"], jnp.asarray(ROWS))
    np.testing.assert_allclose(found, jax.jit(adapted.score_batch)(tree, made), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 4}, "of another shape: .*query/b"),
        ({"num_decoder_layers": 3}, "of another shape: decoder/"),
        ({"mlp_activations": ("gelu", "linear")}, "no module 'wi'"),
    ],
)
def test_adapters_of_another_backbone_raise(shape, message, tmp_path):
    adapted = model(METHODS["lora"])
    bank = bank_of(tmp_path, params_of(adapted), METHODS["lora"])
    backbone._check_adapter(bank, params_of(adapted))
    with pytest.raises(ValueError, match=message):
        backbone._check_adapter(bank, params_of(model(METHODS["lora"], **shape)))


def test_adapter_of_another_rank_than_its_settings_raises(tmp_path):
    tree = params_of(model(METHODS["lora"]))
    settings = dataclasses.replace(METHODS["lora"], rank=2)
    with pytest.raises(ValueError, match="has rank 3, but the settings give 2"):
        tiny.read_back(tmp_path / "changed", settings, tree["prompt"], tiny.RUNS)

"""Low-rank adapters against the frozen network with the merged weights of each run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.config import t5_config
from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.models import decoding
from mpt_jax.prompts.adapters import base, lora
from mpt_jax.prompts.adapters.lora import DoRA, LoRA
from mpt_jax.training.state import param_shapes
from mpt_jax.training.train_step import gradients
from tests.fixtures import tiny
from tests.fixtures.adapted_models import (
    ALL_OF_T5,
    METHODS,
    batch,
    model,
    numpy,
    optimizer,
    params_of,
)  # fmt: skip
from tests.fixtures.processes import run_python

ROWS = [1, 0, 2, 1, 0]
# Programs are compiled as in users' jobs, not as in tests.
USERS_FLAGS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def scale_of(method):
    divisor = np.sqrt(method.rank) if method.rank_stabilized else method.rank
    return method.alpha / divisor


def merged(method, tree, row):
    """The backbone of one run with merged weights, computed by NumPy in float64 from the papers'
    formulas."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(tree).items()}
    found = {name: leaf for name, leaf in leaves.items() if not name.startswith("prompt/")}
    for name in list(found):
        parts = name.split("/")
        if len(parts) < 4 or not parts[1].startswith("layers_") or parts[-1] != "kernel":
            continue
        prefix = "prompt/" + "/".join([parts[0], *parts[2:-1]])
        if f"{prefix}/a" not in leaves:
            continue
        number = int(parts[1].removeprefix("layers_"))
        a, b = (leaves[f"{prefix}/{x}"][row, number] for x in "ab")
        weights = found[name] + scale_of(method) * a @ b
        if f"{prefix}/m" in leaves:
            norms = np.linalg.norm(weights, axis=0)
            weights = leaves[f"{prefix}/m"][row, number] / norms * weights
        found[name] = weights
    return unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in found.items()})


def logits_of_merged(adapted, tree, examples, row):
    network = Transformer(dataclasses.replace(adapted.module.config, scan_layers=False))
    tokens = jnp.asarray(examples["encoder_input_tokens"])
    return network.apply(
        {"params": merged(adapted.prompt, tree, row)},
        tokens,
        tokens > 0,
        jnp.asarray(examples["decoder_input_tokens"]),
    )


@pytest.mark.parametrize("name", METHODS)
def test_layer_updates_equal_the_merged_weights_of_each_run(name):
    adapted, made = model(METHODS[name]), batch(ROWS)
    tree = params_of(adapted)
    found = jax.jit(adapted.logits)(tree, made)
    for i, row in enumerate(ROWS):
        expected = logits_of_merged(adapted, tree, tiny.pick(numpy(made), [i]), row)
        np.testing.assert_allclose(found[i : i + 1], expected, 2e-5, 2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_layer_updates_packed_and_unpacked_logits_are_equal(name):
    adapted, made = model(METHODS[name]), batch(ROWS)
    tree, segments = params_of(adapted), [[0, 3, 2], [1, 4]]
    packed = tiny.arrays(tiny.pack(numpy(made), segments))
    expected, found = (jax.jit(adapted.logits)(tree, x) for x in (made, packed))
    for r, examples in enumerate(segments):
        for number, i in enumerate(examples):
            own = packed["decoder_segment_ids"][r] == number + 1
            np.testing.assert_allclose(found[r][own], expected[i][: own.sum()], 2e-5, 2e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_layer_updates_scanned_layers_give_the_same_logits(name):
    from mpt_jax.backbones.t5.scanned_params import stack_layers

    plain, made = model(METHODS[name]), batch(ROWS)
    scanned = model(METHODS[name], scan_layers=True)
    tree = params_of(plain)
    stacked = stack_layers({k: v for k, v in tree.items() if k != "prompt"})
    packed = tiny.arrays(tiny.pack(numpy(made), [[0, 3, 2], [1, 4]]))
    for given in (made, packed):
        expected = jax.jit(plain.logits)(tree, given)
        found = jax.jit(scanned.logits)({**stacked, "prompt": tree["prompt"]}, given)
        np.testing.assert_allclose(found, expected, 2e-5, 2e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("decode_fn", [decoding.greedy, decoding.beam_search])
def test_layer_updates_decoded_scores_equal_those_of_whole_sequences(scan, decode_fn):
    adapted, made = model(METHODS["dora"], scan_layers=scan), batch(ROWS, targets=6)
    settings = {} if decode_fn is decoding.greedy else {"alpha": 0.0, "num_decodes": 3}
    adapted.decode_fn = functools.partial(decode_fn, **settings)
    tree = tiny.params(adapted)
    ids, aux = jax.jit(adapted.predict_batch_with_aux)(tree, made)
    ends = (ids == tiny.EOS).any(1)
    lengths = jnp.where(ends, (ids == tiny.EOS).argmax(1) + 1, ids.shape[1])
    given = made | {
        "decoder_target_tokens": ids,
        "decoder_input_tokens": jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (jnp.arange(6)[None] < lengths[:, None]).astype(jnp.float32),
        "decoder_task_ids": jnp.repeat(jnp.asarray(ROWS, jnp.int32)[:, None], 6, 1),
    }
    scores = jax.jit(adapted.score_batch)(tree, given)
    np.testing.assert_allclose(aux["scores"], scores, 1e-4, 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_init_layer_starts_at_the_frozen_network(name):
    adapted, made = model(METHODS[name]), batch(ROWS)
    tree = dict(adapted.get_initial_variables(jax.random.key(1))["params"])
    tokens = made["encoder_input_tokens"]
    backbone = {k: v for k, v in tree.items() if k != "prompt"}
    expected = adapted.module.apply(
        {"params": backbone}, tokens, tokens > 0, made["decoder_input_tokens"]
    )
    np.testing.assert_allclose(jax.jit(adapted.logits)(tree, made), expected, 1e-6, 1e-6)
    for leaf_name, leaf in flatten(tree["prompt"]).items():
        if leaf_name.endswith("/a"):
            limit = leaf.shape[2] ** -0.5
            assert abs(leaf).max() <= limit and leaf.std() == pytest.approx(limit / 3**0.5, rel=0.2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_absent_runs_are_zero(name, packed):
    adapted, made = model(METHODS[name]), batch([2, 0, 2])
    tree = params_of(adapted)
    made = tiny.arrays(tiny.pack(numpy(made), [[0, 1], [2]])) if packed else made
    backbone = {k: v for k, v in tree.items() if k != "prompt"}
    step = jax.jit(lambda prompt: gradients(adapted, {"prompt": prompt}, backbone, made, None)[0])
    for leaf in jax.tree.leaves(step(tree["prompt"])):
        assert abs(leaf[1]).max() == 0 and abs(leaf[0]).max() > 0 and abs(leaf[2]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_fleet_of_adapters_equals_solo_runs_bit_for_bit(name):
    ended = run_python("-m", "tests.fixtures.adapted_models", name, fresh=True, **USERS_FLAGS)
    assert float(ended.stdout) == 0.0


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (LoRA(rank=4), 442_368),
        (LoRA(), 884_736),
        (LoRA(rank=16), 1_769_472),
        (LoRA(("q", "k", "v", "o")), 1_769_472),
        (LoRA(ALL_OF_T5), 3_244_032),
        (DoRA(), 940_032),
    ],
    ids=str,
)
def test_sizes_at_t5_base_are_those_of_peft(method, count):
    adapted = tiny.model(Runs(["one"]), method, t5_config("t5_1_0_base"), optimizer_def=optimizer())
    shapes = flatten(param_shapes(adapted)[0]["prompt"])
    assert sum(np.prod(x.shape) for x in shapes.values()) == count
    assert shapes.keys() == method.axes.keys()
    for name, leaf in shapes.items():
        assert len(method.axes[name]) == len(leaf.shape), name


@pytest.mark.parametrize(("rank", "runs"), [(8, 64), (27, 19)])
def test_packed_columns_up_to_the_limit_are_computed(rank, runs):
    method = LoRA(rank=rank)
    rows = jnp.zeros((2, 3), jnp.int32)
    params = {"a": jnp.ones((runs, 1, 32, rank)), "b": jnp.ones((runs, 1, rank, 32))}
    assert runs * rank in (512, 513) and lora.MAX_COLUMNS == 512
    assert method.update_layer(params, rows, packed=False).a.shape == (1, 2, 32, rank)
    if runs * rank <= 512:
        assert method.update_layer(params, rows, packed=True).a.shape == (1, runs, 32, rank)
        return
    with pytest.raises(ValueError, match="19 runs with factors of rank 27 .* 513 columns; at most"):
        method.update_layer(params, rows, packed=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "q"}, "TARGET_MODULES must be a non-empty list of distinct names"),
        ({"target_modules": ["q", "q"]}, "TARGET_MODULES must be a non-empty list of distinct"),
        ({"target_modules": []}, "TARGET_MODULES must be a non-empty list of distinct names"),
        ({"target_modules": ["query"]}, "'query'.*wi_1"),
        ({"rank": 0}, "The rank of 'lora' is 0"),
        ({"alpha": 0.0}, "its alpha 0.0"),
        ({"alpha": float("nan")}, "its alpha nan"),
        ({"alpha": float("inf")}, "its alpha inf"),
    ],
)
def test_lora_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (LoRA(("wi_0",)), {}, "no module 'wi_0' for the method 'lora'.*q, k, v, o, wi, wo"),
        (LoRA(("wi",)), {"mlp_activations": ("gelu", "linear")}, "no module 'wi'.*wi_0, wi_1, wo"),
        (LoRA(rank=13), {}, "The rank of 'lora' is 13, but .* 16 x 12. Set LORA_RANK to at most"),
    ],
)
def test_init_that_does_not_fit_the_backbone_raises(method, config, message):
    with pytest.raises(ValueError, match=message):
        model(method, **config).get_initial_variables(jax.random.key(0))


def test_targets_cover_every_kernel_of_the_layers_of_t5():
    for activations in (("relu",), ("gelu", "linear")):
        adapted = model(LoRA(), mlp_activations=activations)
        names = flatten(param_shapes(adapted)[0])
        kernels = {
            "/".join([parts[0], *parts[2:-1]])
            for parts in (name.split("/") for name in names)
            if parts[-1] == "kernel" and parts[1].startswith("layers_")
        }
        assert kernels <= {layer for layers in base.TARGETS.values() for layer in layers}

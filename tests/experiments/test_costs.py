"""Operations of training, compared with the compiler's program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.experiments import costs
from mpt_jax.plan import hlo

B, T, L = 2, 24, 16
CONFIGS = {
    "1.0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "1.1": {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False},
}


def network(of: str) -> tuple[T5Config, Transformer]:
    config = T5Config(
        vocab_size=96,
        emb_dim=32,
        num_heads=3,
        head_dim=8,
        mlp_dim=48,
        num_encoder_layers=3,
        num_decoder_layers=2,
        **CONFIGS[of],
    )
    return config, Transformer(config)


def counted(function, *arguments) -> float:
    """Operations of matrix products in the compiled program, for one example."""
    return hlo.cost(jax.jit(function).lower(*arguments).compile().as_text()).flops / B


@pytest.mark.parametrize("of", CONFIGS)
def test_operations_equal_those_of_compiled_program(of):
    config, module = network(of)
    embedded, mask = jnp.ones((B, T, config.emb_dim)), jnp.ones((B, T), bool)
    targets = jnp.ones((B, L), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), embedded, mask, targets)["params"]
    forward = lambda p, x: module.apply({"params": p}, x, mask, targets).var()  # noqa: E731
    weights, attention = costs.forward_products(backbone_config(config), T, L)
    assert counted(forward, params, embedded) == pytest.approx(2 * (weights + attention), rel=0.01)
    record = {
        "backbone_config": backbone_config(config),
        "task_feature_lengths": {"inputs": T - 5, "targets": L},
        "prompt_length": 5,
        "batch_size": 7,
        "total_steps": 11,
        "parameters": 1_000,
        "trainable_parameters": 10,  # a prompt, or BitFit's biases
    }
    # The first decoder layer's self-attention needs no gradient of its input, hence 5%.
    of_prompt = counted(jax.grad(forward, 1), params, embedded)
    assert costs.training_operations(record) == pytest.approx(77 * of_prompt, rel=0.05)
    of_all = counted(jax.grad(forward, (0, 1)), params, embedded)
    trained = {**record, "trainable_parameters": 1_000}
    assert costs.training_operations(trained) == pytest.approx(77 * of_all, rel=0.05)
    assert of_all > 1.2 * of_prompt


def test_operations_of_record_without_lengths_are_unknown():
    assert costs.training_operations({"backbone_config": {}, "batch_size": 1}) == 0

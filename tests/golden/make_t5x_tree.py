"""Writes t5x_tree.json: names, shapes and logical axes of real T5X's tiny T5 1.0 and 1.1.

Needs T5X's source on the path: `PYTHONPATH=<t5x clone> python tests/golden/make_t5x_tree.py`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from t5x.examples.t5 import network

SHAPE = {
    "vocab_size": 40,
    "emb_dim": 8,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "head_dim": 3,
    "mlp_dim": 16,
}
VERSIONS = {
    "t5_1_0": {"mlp_activations": ["relu"], "logits_via_embedding": True},
    "t5_1_1": {"mlp_activations": ["gelu", "linear"], "logits_via_embedding": False},
}


def tree(fields: dict) -> dict:
    model = network.Transformer(network.T5Config(**fields, dropout_rate=0.0))
    tokens = jnp.ones((1, 3), jnp.int32)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False)
    )
    axes = flatten_dict(variables["params_axes"], sep="/")
    return {
        name: [list(leaf.shape), list(axes[f"{name}_axes"].names)]
        for name, leaf in flatten_dict(variables["params"], sep="/").items()
    }


lines = []
for version, fields in VERSIONS.items():
    config = {**SHAPE, **fields}
    lines.append(f'"{version}": {{"config": {json.dumps(config)},\n "parameters": {{')
    rows = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in tree(config).items()]
    lines.append(",\n".join(rows) + "}}" + ("," if version != list(VERSIONS)[-1] else ""))
path = Path(__file__).with_name("t5x_tree.json")
path.write_text("{" + "\n".join(lines) + "}\n")

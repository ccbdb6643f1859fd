"""Tiny models and hand-made batches of the batch contract, for the tests of the core.

The encoder has two layers and the decoder one, so that whoever takes one number for the other is
found out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import artefacts, models, train_state
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.optimizers import PromptOptimizer, Schedule
from mpt_jax.partitioning import PjitPartitioner
from mpt_jax.prompts import get_method
from mpt_jax.prompts.mpt import MPT
from mpt_jax.runs import Runs
from mpt_jax.tree import flatten, unflatten

VOCABULARY, WIDTH = 40, 16
PROMPT, TEXT, TARGET = 3, 5, 4  # P, positions of text, L
EOS = 1
RUNS = Runs(["alpha", "beta", "gamma"])
SOURCES = ("first", "second")


def config(**overrides: Any) -> T5Config:
    """T5 1.0 (tied head) unless overridden; float32."""
    shape = {
        "vocab_size": VOCABULARY,
        "emb_dim": WIDTH,
        "num_heads": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "head_dim": 6,
        "mlp_dim": 24,
        "logits_via_embedding": True,
    }
    return T5Config(**{**shape, **overrides})


def optimizer(rate: float = 0.3, **overrides: Any) -> PromptOptimizer:
    """One constant learning rate for every label there is."""
    schedule = Schedule(rate, decay="constant")
    labels = ("shared", "task", "source", "private", "router", "backbone")
    rates = {label: schedule for label in labels}
    return PromptOptimizer(**{"learning_rates": rates, **overrides})


def model(
    runs: Runs = RUNS, prompt: Any = None, config: T5Config | None = None, **overrides: Any
) -> models.PromptedEncoderDecoder:
    """An MPT model of `RUNS` unless overridden."""
    overrides.setdefault("optimizer_def", optimizer())
    module = Transformer(config or globals()["config"]())
    return models.PromptedEncoderDecoder(module, prompt or MPT(PROMPT), runs, **overrides)


def method(name: str, prompt_length: int = PROMPT) -> Any:
    """A registered prompt method of a length, or as it is where it has none; of two sources where
    it has sources."""
    cls = get_method(name)
    settings = {"prompt_length": prompt_length, "length": prompt_length, "sources": SOURCES}
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in settings.items() if name in fields})


def params(model: models.PromptedEncoderDecoder, seed: int = 0) -> dict[str, Any]:
    """Random parameters of sensible scales, also where T5 starts from ones, zeros or nothing."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        values = rng.normal(size=shape)
        if name.endswith("kernel"):
            values /= shape[0] ** 0.5
        elif name.endswith("scale") or "/task_" in name:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values *= 0.1
        return jnp.asarray(values, jnp.float32)

    expected, _ = train_state.shapes(model)
    return unflatten({name: draw(name, leaf.shape) for name, leaf in flatten(expected).items()})


def read_back(folder: Any, method: Any, params: Any, runs: Runs) -> artefacts.Artefact:
    """An artefact of some prompts, of no backbone, written and read again."""
    artefacts.save_artefact(
        folder,
        method,
        params,
        runs,
        embedding_sha256="",
        vocabulary_sha256=None,
        backbone="tiny",
        step=3,
    )
    return artefacts.load_artefact(folder)


def state(model: models.PromptedEncoderDecoder, tree: Mapping[str, Any]) -> train_state.TrainState:
    """The state of step 0."""
    # Steps donate their state, so it must not share arrays with the caller's tree.
    copied = jax.tree.map(jnp.array, dict(tree))
    return train_state.create(model, copied, PjitPartitioner())


def batch(
    rows: Sequence[int | None],
    seed: int = 0,
    prompt_length: int = PROMPT,
    text: int = TEXT,
    targets: int = TARGET,
) -> dict[str, np.ndarray]:
    """One unpacked example for each bank row named; None makes a row of padding.

    Texts and targets are random and of random lengths; a target ends in the end-of-sequence id.
    """
    rng = np.random.default_rng(seed)
    size, encoder = len(rows), prompt_length + text
    made = {
        name: np.zeros((size, encoder), np.int32)
        for name in ("encoder_input_tokens", "encoder_prompt_slots", "encoder_task_ids")
    }
    for name in ("input_tokens", "target_tokens", "loss_weights", "task_ids"):
        dtype = np.float32 if name == "loss_weights" else np.int32
        made[f"decoder_{name}"] = np.zeros((size, targets), dtype)
    for i, row in enumerate(rows):
        words = rng.integers(2, VOCABULARY, text)[: rng.integers(2, text + 1)]
        answer = rng.integers(2, VOCABULARY, targets)[: rng.integers(2, targets + 1)]
        answer[-1] = EOS
        if row is None:
            continue
        end = prompt_length + len(words)
        made["encoder_input_tokens"][i, prompt_length:end] = words
        made["encoder_prompt_slots"][i, :prompt_length] = np.arange(prompt_length) + 1
        made["encoder_task_ids"][i, :end] = row
        made["decoder_target_tokens"][i, : len(answer)] = answer
        made["decoder_input_tokens"][i, 1 : len(answer)] = answer[:-1]
        made["decoder_loss_weights"][i, : len(answer)] = 1
        made["decoder_task_ids"][i, : len(answer)] = row
    return made


def arrays(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The batch as JAX arrays, for functions that are called without `jit`."""
    return {name: jnp.asarray(value) for name, value in batch.items()}


def pick(batch: Mapping[str, np.ndarray], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Some rows of a batch."""
    return {name: value[list(rows)] for name, value in batch.items()}


def pack(
    batch: Mapping[str, np.ndarray], segments: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """The same examples side by side: row i of the result holds the examples `segments[i]`, each
    without its padding, and gets segment ids (from 1) and positions."""
    packed: dict[str, np.ndarray] = {}
    for side, real in (
        ("encoder", (batch["encoder_input_tokens"] > 0) | (batch["encoder_prompt_slots"] > 0)),
        ("decoder", batch["decoder_loss_weights"] > 0),
    ):
        lengths = real.sum(1)
        total = max(sum(lengths[i] for i in row) for row in segments) + 1  # leaves some padding
        names = [name for name in batch if name.startswith(side)]
        added = [f"{side}_segment_ids", f"{side}_positions"]
        for name in (*names, *added):
            dtype = batch[name].dtype if name in batch else np.int32
            packed[name] = np.zeros((len(segments), total), dtype)
        for r, row in enumerate(segments):
            at = 0
            for number, i in enumerate(row):
                here = slice(at, at + lengths[i])
                for name in names:
                    packed[name][r, here] = batch[name][i, : lengths[i]]
                packed[added[0]][r, here] = number + 1
                packed[added[1]][r, here] = np.arange(lengths[i])
                at += lengths[i]
    return packed


def close(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Both trees have the same leaves, and no number is further off than tolerance (absolute for
    numbers below one, relative above)."""
    flat_found, flat_expected = flatten(found), flatten(expected)
    assert sorted(flat_found) == sorted(flat_expected)
    for name, value in flat_expected.items():
        np.testing.assert_allclose(
            np.asarray(flat_found[name]),
            np.asarray(value),
            tolerance,
            tolerance,
            err_msg=what + name,
        )

"""Adapters: methods that change layers of the frozen backbone, by parameters of each bank row.

An adapter is a prompt method without prompt positions. Its parameters have the bank's rows first
and the layers of a stack second, for example `encoder/attention/query/a` [K, layers, in, R], so
runs, groups, artifacts and banks treat them as they treat prompts. `layer_updates` selects those of
the examples of a batch, and the backbone applies them (`backbones.layer_updates`).

Target modules have the names that Hugging Face's T5 and PEFT use:

    q  k  v  o        the projections of self-attention and cross-attention
    wi  wi_0  wi_1    into the feed-forward width: wi in T5 1.0, wi_0 and wi_1 in T5 1.1
    wo                out of the feed-forward width
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Float, Int, Key, Params
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.prompts.base import NO_CONTEXT, BatchRows, PromptMethod, name_key
from mpt_jax.prompts.row_ops import gather_rows
from mpt_jax.prompts.warm_start import StartFrom, source_weights, weighted_mean

ATTENTIONS = ("encoder/attention", "decoder/self_attention", "decoder/encoder_decoder_attention")
MLPS = ("encoder/mlp", "decoder/mlp")
# The layers of each target module, by path without layer numbers.
TARGETS: dict[str, tuple[str, ...]] = {
    **{
        target: tuple(f"{attention}/{name}" for attention in ATTENTIONS)
        for target, name in {"q": "query", "k": "key", "v": "value", "o": "out"}.items()
    },
    **{target: tuple(f"{mlp}/{target}" for mlp in MLPS) for target in ("wi", "wi_0", "wi_1", "wo")},
}
# The logical axes of the weights of each layer, by the last part of its path.
KERNEL_AXES = {
    **dict.fromkeys(("query", "key", "value"), ("embed", "joined_kv")),
    "out": ("joined_kv", "embed"),
    **dict.fromkeys(("wi", "wi_0", "wi_1"), ("embed", "mlp")),
    "wo": ("mlp", "embed"),
}
# Layers of the decoder whose input is the encoder's output.
OVER_ENCODER = tuple(f"decoder/encoder_decoder_attention/{name}" for name in ("key", "value"))


def input_rows(layer: str, rows: BatchRows) -> Int[Array, "B positions"]:
    """Returns the bank row of every input position of a layer."""
    reads_encoder = layer.startswith("encoder/") or layer in OVER_ENCODER
    return rows.encoder if reads_encoder else rows.decoder


def of_examples(leaf: Float[Array, "K layers ..."], rows: Int[Array, "B positions"]) -> Array:
    """Returns the parameters [layers, B, ...] of the examples of an unpacked batch."""
    return jnp.moveaxis(gather_rows(leaf, rows[:, 0]), 1, 0)


@dataclasses.dataclass(frozen=True)
class Adapter(PromptMethod):
    """Base class of adapters.

    Attributes:
        target_modules: the names of the changed layers, keys of `TARGETS`.
        start_from: the run of the initial artifact that each run starts from, a setting of
            `warm_start`. Parameters are not averaged over runs: a mean of factors is not the
            factors of a mean.

    Raises:
        ValueError: `target_modules` is empty, is a string instead of a list, repeats a name, or has
            an unknown name.
    """

    target_modules: Sequence[str]
    start_from: StartFrom = "same"

    prompt_length = 0
    adapts = True
    labels = ((r".*", "adapter"),)

    def __post_init__(self):
        names = self.target_modules
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"TARGET_MODULES must be a non-empty list of distinct names, got {names!r}. Set it "
                f"to some of {', '.join(TARGETS)}, for example ['q', 'v']."
            )
        for name in names:
            if name not in TARGETS:
                raise ValueError(unknown_name("TARGET_MODULES", name, tuple(TARGETS)))

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the changed layers, without layer numbers."""
        return tuple(layer for name in self.target_modules for layer in TARGETS[name])

    @staticmethod
    def kernel_axes(layer: str) -> tuple[str, str]:
        """Returns the logical axes of a layer's inputs and outputs."""
        return KERNEL_AXES[layer.rsplit("/", 1)[1]]

    # --- Defined by each adapter -----------------------------------------------------------------

    @abc.abstractmethod
    def init_layer(self, key: Key, kernels: Sequence[Any]) -> dict[str, Float[Array, "layers ..."]]:
        """Returns the initial parameters of a run for one kind of layer.

        Args:
            key: the random key of the run and the kind of layer.
            kernels: the frozen weights of each layer of the stack.
        """

    @abc.abstractmethod
    def update_layer(self, params: Params, rows: Int[Array, "B positions"], packed: bool) -> Any:
        """Returns the update of one kind of layer, with the layers on axis 0 of every array.

        Args:
            params: the parameters of all bank rows [K, layers, ...].
            rows: the bank row of every input position.
            packed: whether positions of a row may differ in their bank row.
        """

    # --- Of the protocol -------------------------------------------------------------------------

    def init(self, key, runs, context):
        for name in self.target_modules:
            if TARGETS[name][0] not in context.kernels:
                known = [x for x, layers in TARGETS.items() if layers[0] in context.kernels]
                raise ValueError(
                    f"The backbone has no module {name!r} for the method {self.name!r}. "
                    + (f"Set TARGET_MODULES to some of {', '.join(known)}." if known else
                       "Adapters need a T5: choose another method for this model.")
                )  # fmt: skip
        found: dict[str, Array] = {}
        for number, layer in enumerate(self.layers):
            of_runs = [
                self.init_layer(
                    jax.random.fold_in(name_key(key, run), number), context.kernels[layer]
                )
                for run in runs.run_names
            ]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_runs)
            found |= {f"{layer}/{name}": leaf for name, leaf in stacked.items()}
        return unflatten(found)

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        return jnp.zeros((*task_ids.shape, 0, 0), jnp.float32)

    def layer_updates(self, params: Params, rows: BatchRows) -> dict[str, Any]:
        return {
            layer: self.update_layer(_at(params, layer), input_rows(layer, rows), rows.packed)
            for layer in self.layers
        }

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts each run from the parameters of one run of an artifact of the same method."""
        if source_method.config() != self.config() or source_method.name != self.name:
            raise ValueError(
                f"The initial artifact has the method {source_method.name!r} with the settings "
                f"{source_method.config()}, but the job has {self.name!r} with {self.config()}. "
                "Use the same settings in both, or set INITIAL_ARTIFACT to None."
            )
        weights = source_weights(self.start_from, source_runs, runs)
        for run, row in zip(runs.run_names, weights, strict=True):
            if np.count_nonzero(row) > 1:
                raise ValueError(
                    f"The run {run!r} would start from {np.count_nonzero(row)} runs of the initial "
                    f"artifact, but the parameters of {self.name!r} cannot be averaged. Set "
                    f"START_FROM to one of {', '.join(source_runs.run_names)}, or to 'same'."
                )
        means = {name: weighted_mean(weights, leaf) for name, leaf in flatten(source).items()}
        return unflatten(means)


def _at(params: Params, path: str) -> Params:
    """Returns the subtree at a path."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), params)

"""Functions that a server compiles: pure functions of weights, a prompt bank and token ids.

Weights, prompts and the bank rows of a batch are arguments, so one program serves all tasks of a
bank. `mpt-jax export` writes the same functions to files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from mpt_jax.backbones.t5 import T5Config, Transformer
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Int, Params
from mpt_jax.models import prompt_insertion
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.prompts.base import BatchRows, PromptMethod
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.serving import prompt_bank

ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True)
class Functions:
    """Functions that predict and score texts. Texts are token ids, padded with 0.

    Attributes:
        config: the backbone's configuration.
        method: the bank's method.
        target_length: L, the maximum number of tokens that `predict` decodes.
        vocabulary: the vocabulary, whose `eos_id` ends decoding.
        lengths_differ: whether the bank's prompts differ in length.
    """

    config: T5Config
    method: PromptMethod
    target_length: int
    vocabulary: Any
    lengths_differ: bool = False

    def predict(
        self, backbone: Params, arrays: Params, tokens: Int[Array, "B text"], rows: Int[Array, " B"]
    ) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
        """Returns greedy continuations, with 0 after the end of sequence, and their log
        probabilities in nats.

        Args:
            backbone: the backbone's parameters.
            arrays: the bank's arrays.
            tokens: the token ids of the texts, each ending with the end-of-sequence id.
            rows: the bank row of each text.
        """
        targets = jnp.zeros((tokens.shape[0], self.target_length), jnp.int32)
        params = self._params(backbone, arrays, tokens, rows)
        batch = self._batch(arrays, tokens, targets, rows)
        decoded, aux = self._model().predict_batch_with_aux(params, batch)
        return decoded, aux["scores"]

    def score(
        self,
        backbone: Params,
        arrays: Params,
        tokens: Int[Array, "B text"],
        targets: Int[Array, "B L"],
        rows: Int[Array, " B"],
    ) -> Float[Array, " B"]:
        """Returns the log probability of one target per text, in nats. The other arguments are as
        in `predict`."""
        params = self._params(backbone, arrays, tokens, rows)
        return self._model().score_batch(params, self._batch(arrays, tokens, targets, rows))

    def _model(self) -> PromptedEncoderDecoder:
        """Returns a model whose bank holds the prompts of one batch: bank row i is the composed
        prompt of example i."""
        return PromptedEncoderDecoder(
            Transformer(self.config),
            _Composed(
                self.method.prompt_length, lengths_differ=self.lengths_differ, method=self.method
            ),
            Runs(["served"]),
            output_vocabulary=self.vocabulary,
        )

    def _params(
        self, backbone: Params, arrays: Params, tokens: Array, rows: Array
    ) -> dict[str, Any]:
        pooled = None
        if self.method.reads_text:
            embedded: Any = Transformer(self.config).apply(
                {"params": backbone}, tokens, method="embed"
            )
            pooled = prompt_insertion.max_pool_text(
                embedded, tokens > 0, jnp.zeros_like(tokens), 1
            )[:, 0]
        table = prompt_bank.compose(self.method, arrays, rows, pooled)
        own = prompt_bank.params_of_rows(arrays, rows) if self.method.adapts else {}
        return {**backbone, "prompt": {"table": table, ADAPTER: own}}

    def _batch(
        self, arrays: Params, tokens: Array, targets: Array, rows: Array
    ) -> dict[str, Array]:
        """Builds the model's batch from token ids, inside the compiled program.

        `batching.collate.unpacked` (NumPy) and `PromptFeatureConverter._place` (TensorFlow) build
        the same batch. This function must be traceable, since bank rows and prompt lengths are
        known only on the device.
        """
        longest, (batch, text) = self.method.prompt_length, tokens.shape
        number = jnp.arange(batch, dtype=jnp.int32)[:, None]
        position = jnp.arange(longest + text, dtype=jnp.int32)
        position = jnp.broadcast_to(position, (batch, longest + text))
        padded = jnp.pad(tokens, ((0, 0), (longest, 0)))
        length = jnp.full((batch, 1), longest, jnp.int32)
        if self.lengths_differ:
            # Each text directly follows its prompt.
            length = arrays[prompt_bank.LENGTHS][rows][:, None]
            shift = (position + longest - length) % (longest + text)
            padded = jnp.take_along_axis(padded, shift, axis=1)
        return {
            "encoder_input_tokens": padded,
            "encoder_prompt_slots": jnp.where(position < length, position + 1, 0),
            "encoder_task_ids": jnp.broadcast_to(number, position.shape),
            "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(jnp.int32),
            "decoder_task_ids": jnp.broadcast_to(number, targets.shape),
        }


@dataclasses.dataclass(frozen=True)
class _Composed(PromptTuning):
    """Prompts that are already composed, and parameters of adapters that are already selected: one
    bank row for each example of a batch."""

    lengths_differ: bool = False
    method: PromptMethod | None = None

    def has_variable_lengths(self, runs: Runs) -> bool:
        return self.lengths_differ

    def layer_updates(self, params: Params, rows: BatchRows) -> dict[str, Any]:
        assert self.method is not None
        return self.method.layer_updates(params[ADAPTER], rows)

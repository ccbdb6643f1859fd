"""Model methods that T5X calls by name: feature converter, losses, scoring and decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.core.batch import encoder_mask, is_packed, num_rows
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Int, Key, Params
from mpt_jax.models import decoding, losses
from mpt_jax.models.token_losses import token_values
from mpt_jax.prompts.base import PromptMethod


class T5XInterface:
    """Mixin that gives `PromptedEncoderDecoder` the model methods of T5X.

    `PromptedEncoderDecoder` defines the attributes and methods that the mixin requires. Our trainer
    and `mpt_jax.eval` also use its feature converter, scoring and decoding.
    """

    module: Transformer
    prompt: PromptMethod
    runs: Runs
    objective: losses.Objective
    output_vocabulary: Any
    feature_converter_cls: Callable[..., Any] | None
    decode_fn: Callable[..., Any]

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:  # noqa: N802 - T5X's name
        """The function with which T5X and our trainer build the feature converter.

        It raises ValueError if the converter does not reserve the method's prompt length, because
        prompt rows would then be treated as padding, or text as part of the prompt.

        Raises:
            ValueError: `feature_converter_cls` is None.
        """
        if self.feature_converter_cls is None:
            raise ValueError(
                "This model has no feature converter. Bind PromptedEncoderDecoder."
                "feature_converter_cls, as gin/models/prompted_t5.gin does."
            )
        return self._converter

    def _converter(self, **settings: Any) -> Any:
        assert self.feature_converter_cls is not None
        if self.prompt.has_variable_lengths(self.runs):
            settings = {"prompt_lengths": self.prompt.prompt_lengths(self.runs), **settings}
        converter = self.feature_converter_cls(**settings)
        reserved, length = getattr(converter, "prompt_length", None), self.prompt.prompt_length
        if reserved is not None and reserved != length:
            raise ValueError(
                f"The feature converter reserves {reserved} positions for a prompt, but the "
                f"method {self.prompt.name!r} has prompts of {length}. Set "
                f"PromptFeatureConverter.prompt_length to {length}, or leave it as the files in "
                "gin/methods bind it."
            )
        return converter

    # --- Inference -------------------------------------------------------------------------------

    def score_batch(
        self, params: Params, batch: Batch, return_intermediates: bool = False
    ) -> Float[Array, " B"]:
        """Returns the log probability of each example's target, summed over tokens, in nats.

        Raises:
            ValueError: the batch is packed, or intermediates are requested.
        """
        if return_intermediates:
            raise ValueError(
                "score_batch cannot return intermediates. Set return_intermediates to False."
            )
        if is_packed(batch):
            raise ValueError("Packed batches cannot be scored. Set DatasetConfig.pack = False.")
        states = self.forward(params, batch).states
        tokens = token_values(losses.Objective(), batch, self.head(params), states)
        return -jnp.sum(tokens["loss"] * batch["decoder_loss_weights"], axis=-1)

    def predict_batch(
        self, params: Params, batch: Batch, rng: Key | None = None, num_decodes: int | None = None
    ) -> Int[Array, "B L"]:
        """Returns the ids of each example's best sequence, with 0 after the end-of-sequence id."""
        return self.predict_batch_with_aux(params, batch, rng, num_decodes=num_decodes)[0]

    def predict_batch_with_aux(
        self,
        params: Params,
        batch: Batch,
        rng: Key | None = None,
        decoder_params: Mapping[str, Any] | None = None,
        num_decodes: int | None = None,
        return_all_decodes: bool = False,
    ) -> tuple[Int[Array, "..."], dict[str, Array]]:
        """Decodes at most as many tokens as the batch's targets have positions.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features, unpacked; target ids are not used.
            rng: the random key of a `decode_fn` that samples.
            decoder_params: additional keyword arguments of `decode_fn`.
            num_decodes: the number of sequences per example, for a `decode_fn` that supports it;
                None uses that function's default or gin binding.
            return_all_decodes: whether to return all sequences, worst first as in T5X, instead of
                only the best.

        Returns:
            Ids [B, L] and `{'scores': [B]}`. With `return_all_decodes`, the shapes are [B, n, L]
            and [B, n].

        Raises:
            ValueError: the batch is packed, or `decode_fn` returns only one sequence and
                `num_decodes` is greater.
        """
        if is_packed(batch):
            raise ValueError("Packed batches cannot be decoded. Set DatasetConfig.pack = False.")
        parameters = inspect.signature(self.decode_fn).parameters
        extra: dict[str, Any] = dict(decoder_params or {})
        if num_decodes is not None and "num_decodes" in parameters:
            extra.setdefault("num_decodes", num_decodes)
        elif num_decodes not in (None, 1):
            name = getattr(self.decode_fn, "__name__", type(self.decode_fn).__name__)
            raise ValueError(
                f"num_decodes is {num_decodes}, but the decoding function {name} returns only one "
                "sequence per example. Leave num_decodes unset, or bind "
                "PromptedEncoderDecoder.decode_fn to @decoding.temperature_sample or "
                "@decoding.beam_search."
            )
        if "rng" in parameters:
            extra["rng"] = jax.random.PRNGKey(0) if rng is None else rng
        if "cache_batch_axis" in parameters:
            # Scanned layers share one cache, with the layers on its first axis.
            extra["cache_batch_axis"] = 1 if self.module.config.scan_layers else 0
        length = batch["decoder_input_tokens"].shape[1]
        step, cache = self._decoder(params, batch, length)
        start = jnp.zeros(num_rows(batch), jnp.int32)
        eos_id = getattr(self.output_vocabulary, "eos_id", 1)
        tokens, scores = self.decode_fn(
            step, cache, start, max_length=length, eos_id=eos_id, **extra
        )
        if return_all_decodes:
            return tokens[:, ::-1], {"scores": scores[:, ::-1]}
        return tokens[:, 0], {"scores": scores[:, 0]}

    def _decoder(
        self, params: Params, batch: Batch, length: int
    ) -> tuple[decoding.TokensToLogits, Any]:
        """Runs the encoder, and returns the cached decoder's step function and cache [B, ...].

        The step function accepts any number of hypotheses per example.
        """
        backbone, updates = self._backbone(params), self._updates(params, batch)
        embeddings = self._embed(params, batch).embeddings
        mask = encoder_mask(batch)
        encoded = self.module.apply(
            {"params": backbone, **updates}, embeddings, mask, method="encode"
        )
        layers_first = int(self.module.config.scan_layers)

        def run(tokens: Array, cache: Any) -> tuple[Array, Any]:
            hypotheses = tokens.shape[0] // mask.shape[0]
            memory, attended = decoding.repeat_for_decodes((encoded, mask), hypotheses)
            own = decoding.repeat_for_decodes(updates, hypotheses, batch_axis=layers_first)
            logits, variables = self.module.apply(
                {"params": backbone, **own, **cache},
                memory,
                attended,
                tokens,
                decode=True,
                max_decode_length=length,
                mutable=["cache"],
                method="decode",
            )
            return logits[:, -1], flax.core.unfreeze(variables)

        empty = jnp.zeros((encoded.shape[0], 1), jnp.int32)
        return run, run(empty, {})[1]

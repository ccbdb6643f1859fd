"""The model a trainer runs: a backbone, a prompt method and an objective.

This file has the parameters, the forward pass and the loss terms. t5x_interface.py has the methods
that T5X calls by name: losses, scoring and decoding. Our trainer does not call T5X's losses but
`loss_sums` and `loss_normalizers`, and divides once per step. Parameters are one nested dict,

    {token_embedder, encoder, decoder}   the backbone, with T5X's names
    prompt                               the method's parameters
    teacher                              frozen prompts [K, P, H] to distill from, if any

An ordered table of labels determines which parameters are trainable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.layer_updates import COLLECTION, by_layer
from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.backbones.t5.scanned_params import layer_kernels
from mpt_jax.core.batch import encoder_mask, is_packed
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Key, Params
from mpt_jax.core.tree import Rules
from mpt_jax.models import decoding, losses, metrics, prompt_insertion
from mpt_jax.models.model import FROZEN, Model, RowCost, axes_of
from mpt_jax.models.t5x_interface import T5XInterface
from mpt_jax.models.token_losses import Head, token_values
from mpt_jax.prompts.base import NO_KERNELS, BatchRows, InitContext, Kernels, PromptMethod, row_axes
from mpt_jax.prompts.prompt_tuning import PromptTuning

BACKBONE = r"(token_embedder|encoder|decoder)/.*"
# Label tables that make backbone parameters trainable, with or without a prompt. The first match
# wins, so these rules precede the one that freezes the backbone.
PROMPT_ONLY: Rules = ()
FULL_FINETUNING: Rules = ((BACKBONE, "backbone"),)
LAYER_NORMS: Rules = ((r"(encoder|decoder)/(.*/)?\w*norm/scale", "backbone"),)
BITFIT: Rules = ((r"(encoder|decoder)/.*/bias", "backbone"),)


class PromptedEncoderDecoder(T5XInterface, Model):
    """An encoder-decoder that reads `[prompt ; input]`.

    Args:
        module: the backbone, which takes embeddings and masks and does not handle prompts.
        prompt: the prompt method.
        runs: the bank's rows.
        optimizer_def: a `PromptOptimizer`, to which the model passes the label table, the runs and
            the row axes of the parameters; None if the model is not trained.
        input_vocabulary: SeqIO vocabulary of `encoder_input_tokens`; needed only by initializers
            that encode text.
        output_vocabulary: SeqIO vocabulary of the targets. Its `eos_id` ends decoding; if None, the
            id is 1.
        objective: the loss; token cross entropy by default.
        labels: label rules that take precedence over the method's rules and over the rule that
            freezes the backbone.
        feature_converter_cls: the class that turns SeqIO examples into the features of the batch
            contract; bound in gin.
        decode_fn: a decoding function of `mpt_jax.models.decoding`.

    Raises:
        ValueError: the objective distills from teachers, but the method has no prompt or has
            prompts of different lengths.
    """

    def __init__(  # noqa: PLR0913 - gin binds each of them
        self,
        module: Transformer,
        prompt: PromptMethod,
        runs: Runs,
        optimizer_def: Any = None,
        input_vocabulary: Any = None,
        output_vocabulary: Any = None,
        objective: losses.Objective | None = None,
        labels: Rules = PROMPT_ONLY,
        feature_converter_cls: Callable[..., Any] | None = None,
        decode_fn: Callable[..., Any] = decoding.greedy,
    ):
        self.module = module
        self.prompt = prompt
        self.runs = runs
        self.input_vocabulary = input_vocabulary
        self.output_vocabulary = output_vocabulary
        self.objective = objective or losses.Objective()
        if self.has_teacher and not prompt.prompt_length:
            raise ValueError(
                f"Objective.distillation is set, but the method {prompt.name!r} has no prompt to "
                "train. Leave Objective.distillation unset, or choose a method with a prompt "
                "(gin/methods)."
            )
        if self.has_teacher and prompt.has_variable_lengths(runs):
            lengths = dict(zip(prompt.prompt_lengths(runs), runs.run_names, strict=True))
            raise ValueError(
                "Distillation needs all prompts to be as long as the teachers' "
                f"({prompt.prompt_length} positions), but the prompt of {lengths[min(lengths)]!r} "
                f"has {min(lengths)} positions. Set PRIVATE_LENGTH to one number, or leave "
                "Objective.distillation unset."
            )
        self.labels = (
            *labels,
            *((f"prompt/{pattern}", label) for pattern, label in prompt.labels),
            (r"teacher/.*", FROZEN),
            (BACKBONE, FROZEN),
        )
        self.feature_converter_cls = feature_converter_cls
        self.decode_fn = decode_fn
        self.rows = row_axes(prompt)
        self.optimizer_def = optimizer_def and optimizer_def.bind(
            self.labels, runs, self.rows, prompt.schedule_steps
        )

    # --- Backbone --------------------------------------------------------------------------------

    backbone_pattern = BACKBONE
    # T5 checkpoints have no biases; those that BitFit adds start from zero.
    optional_pattern = r"(token_embedder|encoder|decoder)/.*/bias"
    config_setting = "Set T5_NAME to the checkpoint's model, or T5_CONFIG if it has no name."

    @property
    def dropout_rate(self) -> float:
        """The dropout rate in training."""
        return self.module.config.dropout_rate

    def embedding(self, params: Params) -> Any:
        """Returns the token embeddings [V, H]."""
        return params["token_embedder"]["embedding"]

    # --- Parameters ------------------------------------------------------------------------------

    def kernels(self, params: Params) -> Kernels:
        """Returns the weights of all layers, by path without layer numbers."""
        return layer_kernels(params)

    def init_prompt(
        self, key: Key, embedding: Float[Array, "V H"], kernels: Kernels = NO_KERNELS
    ) -> dict[str, Any]:
        """Returns the method's initial parameters; see `Model`."""
        context = InitContext(embedding, self.input_vocabulary, kernels=kernels)
        return self.prompt.init(key, self.runs, context)

    def init_backbone(self, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns random backbone parameters and their logical axes, in T5X's format."""
        tokens = jnp.ones((1, 2), jnp.int32)
        variables = flax.core.unfreeze(
            self.module.init(key, tokens, jnp.ones((1, 2), bool), tokens)
        )
        return variables["params"], variables["params_axes"]

    def get_initial_variables(
        self,
        rng: Key,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        input_types: Mapping[str, Any] | None = None,
    ) -> Params:
        """Returns the whole parameter tree, randomly initialized, and its logical axes; see
        `Model`."""
        params, axes = self.initial_params(rng)
        if self.has_teacher:
            width = self.embedding(params).shape[1]
            shape = (self.runs.num_rows, self.prompt.prompt_length, width)
            params["teacher"] = {"table": jnp.zeros(shape, jnp.float32)}
            axes["teacher"] = {"table_axes": axes_of(("tasks", "prompt", "embed"))}
        return flax.core.freeze({"params": params, "params_axes": axes})

    # --- Forward ---------------------------------------------------------------------------------

    def forward(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Key | None = None,
        *,
        prompt_rng: Key | None = None,
        teacher: bool = False,
        hidden: bool = False,
    ) -> losses.ModelOutputs:
        """Returns teacher-forced decoder states and, on request, hidden states for distillation.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features.
            dropout_rng: the random key of dropout; None turns dropout off.
            prompt_rng: the random key of methods that compose prompts with random draws; defaults
                to `dropout_rng`.
            teacher: whether to use the teachers' prompts instead of the student's.
            hidden: whether to return hidden states.
        """
        updates = {} if teacher else self._updates(params, batch)  # teachers are prompts
        variables = {"params": self._backbone(params), **updates}
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        key = dropout_rng if prompt_rng is None else prompt_rng
        key = None if key is None else jax.random.fold_in(key, 2)
        prompted = self._embed(params, batch, key, teacher)
        mask = encoder_mask(batch)
        encoded: Any = self.module.apply(
            variables,
            prompted.embeddings,
            mask,
            batch.get("encoder_segment_ids"),
            deterministic=dropout_rng is None,
            return_hidden=hidden,
            rngs=_fold(rngs, 0),
            method="encode",
        )
        encoded, encoder_hidden = encoded if hidden else (encoded, ())
        decoded: Any = self.module.apply(
            variables,
            encoded,
            mask,
            batch["decoder_input_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            deterministic=dropout_rng is None,
            return_hidden=hidden,
            rngs=_fold(rngs, 1),
            method="decode_states",
        )
        states, decoder_hidden = decoded if hidden else (decoded, ())
        return losses.ModelOutputs(
            states,
            self._select_layers(encoder_hidden),
            self._select_layers(decoder_hidden),
            prompted.prompts,
            prompted.mixed,
        )

    def head(self, params: Params) -> Head:
        """Returns the function that computes logits from final decoder states."""
        variables = {"params": self._backbone(params)}
        return functools.partial(self.module.apply, variables, method="logits")

    def logits(self, params: Params, batch: Batch) -> Float[Array, "B L V"]:
        """Returns teacher-forced logits of all target positions, float32, without dropout."""
        return self.head(params)(self.forward(params, batch).states)

    def _embed(
        self, params: Params, batch: Batch, key: Key | None = None, teacher: bool = False
    ) -> prompt_insertion.PromptedEmbeddings:
        """Returns token embeddings with every example's prompt in its reserved positions."""
        backbone = {"params": self._backbone(params)}
        embedded: Any = self.module.apply(backbone, batch["encoder_input_tokens"], method="embed")
        prompt = params.get("teacher" if teacher else "prompt", {})
        method = PromptTuning(self.prompt.prompt_length) if teacher else self.prompt
        return prompt_insertion.insert_prompts(method, prompt, self.runs, batch, embedded, key)

    def _updates(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns the collection with the updates of the backbone's layers for a batch; {} for a
        method without any."""
        rows = BatchRows(batch["encoder_task_ids"], batch["decoder_task_ids"], is_packed(batch))
        found = self.prompt.layer_updates(params.get("prompt", {}), rows)
        config = self.module.config
        depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
        return {COLLECTION: by_layer(found, depths, config.scan_layers)} if found else {}

    def _backbone(self, params: Params) -> Params:
        return {name: params[name] for name in params if name not in ("prompt", "teacher")}

    def _select_layers(self, hidden: tuple[Array, ...]) -> tuple[Array, ...]:
        distillation = self.objective.distillation
        if not hidden or distillation is None or distillation.hidden_layers == "all":
            return hidden
        is_last = distillation.hidden_layers == "last"
        layers = (-1,) if is_last else tuple(distillation.hidden_layers)
        try:
            return tuple(hidden[int(layer)] for layer in layers)
        except IndexError:
            raise ValueError(
                f"Distillation.hidden_layers is {list(layers)}, but the encoder or decoder has "
                f"only {len(hidden)} hidden states (embeddings, layer 1, ..., output). Use indices "
                f"from 0 to {len(hidden) - 1}."
            ) from None

    # --- Batches ---------------------------------------------------------------------------------

    def number_examples(self, batch: Batch) -> Batch:
        """Returns `prompt_insertion.number_examples`."""
        return prompt_insertion.number_examples(self.prompt, self.runs, batch)

    def max_examples(self, batch: Batch) -> int | None:
        """Returns the largest number of examples that a batch can hold; None if prompts depend on
        run names, so that a step needs the whole bank."""
        if self.prompt.depends_on_run_names:
            return None
        count, positions = batch["encoder_input_tokens"].shape
        if is_packed(batch):  # an example has at least its prompt's positions
            count *= max(positions // max(self.prompt.prompt_length, 1), 1)
        return count

    def row_cost(self, batch: Mapping[str, Any]) -> RowCost:
        """Returns the memory that one row of a batch takes in a step."""
        config = self.backbone_config
        encoder, decoder = (
            np.shape(batch[f"{side}_tokens"])[1] for side in ("encoder_input", "decoder_target")
        )
        inputs = encoder * config.num_encoder_layers + decoder * config.num_decoder_layers
        return RowCost(
            inputs * config.emb_dim * np.dtype(config.dtype).itemsize,
            f"with {encoder} encoder and {decoder} decoder positions per row",
            None if config.remat == "full" else "config.t5_config.remat",
            other_remedy="Lower limits in TASK_FEATURE_LENGTHS shorten rows, but change training "
            "on longer texts.",
        )

    # --- Loss ------------------------------------------------------------------------------------

    def groups(self, batch: Batch) -> losses.GroupIds:
        """Returns the group of every position of a batch."""
        table = jnp.asarray(self.runs.group_of_row, jnp.int32)
        return losses.GroupIds(
            self.runs.num_groups,
            table[batch["encoder_task_ids"]],
            table[batch["decoder_task_ids"]],
        )

    def loss_sums(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Key | None = None,
        prompt_rng: Key | None = None,
    ) -> tuple[losses.Sums, metrics.StepMetrics]:
        """Returns the sum [G] of every loss term, and the metrics of each run and of the batch.

        Runs the teachers unless the batch holds their outputs (`losses.teacher_features`).
        """
        distillation = self.objective.distillation
        hidden = distillation is not None and distillation.hidden
        student = self.forward(params, batch, dropout_rng, prompt_rng=prompt_rng, hidden=hidden)
        teacher = losses.teacher_outputs_from_batch(batch)
        if distillation is not None and teacher is None:
            frozen = jax.tree.map(jax.lax.stop_gradient, params)
            teacher = self.forward(frozen, batch, None, teacher=True, hidden=hidden)
        taught = None if teacher is None else teacher.states
        assert student.states is not None
        tokens = token_values(self.objective, batch, self.head(params), student.states, taught)
        sums = losses.term_sums(self.objective, batch, self.groups(batch), tokens, student, teacher)
        step_metrics = metrics.task_metrics(
            batch, tokens, batch["decoder_task_ids"], self.runs.num_rows
        )
        if student.mixed is not None:
            names, rows = self.prompt.candidates, self.runs.num_rows
            step_metrics |= metrics.mixture_metrics(student.mixed, names, rows)
        return sums, {**step_metrics, **metrics.batch_metrics(batch)}

    def loss_normalizers(self, batch: Batch) -> losses.Sums:
        """Returns the normalizer [G] of every loss term, which depends only on the batch."""
        width, states = self.module.config.emb_dim, self.states_compared
        return losses.normalizers(self.objective, batch, self.groups(batch), width, states)

    @property
    def states_compared(self) -> tuple[int, int]:
        """Numbers of encoder and decoder hidden states that distillation compares."""
        config, distillation = self.module.config, self.objective.distillation
        if distillation is None or distillation.hidden_layers == "all":
            return config.num_encoder_layers + 1, config.num_decoder_layers + 1
        count = 1 if distillation.hidden_layers == "last" else len(distillation.hidden_layers)
        return count, count


def _fold(rngs: Mapping[str, Key], index: int) -> dict[str, Key]:
    """Folds `index` into the keys, so that encoder and decoder draw different dropout masks."""
    return {name: jax.random.fold_in(key, index) for name, key in rngs.items()}

"""A backbone, a prompt method and an objective: what a trainer drives.

This file has parameters, forward pass and loss terms; t5x_interface.py has what T5X calls by name:
its losses, scoring and decoding. Our own trainer calls `loss_sums` and `loss_normalizers` instead,
and divides once per step. Parameters are one nested dict,

    {token_embedder, encoder, decoder}   the backbone, T5X's names
    prompt                               the method's parameters
    teacher                              frozen prompts [K, P, H] to distil from, if any

and one ordered table of labels says what learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from mpt_jax.backbones.t5.network import Transformer
from mpt_jax.core.batch import encoder_mask
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Key, Params
from mpt_jax.core.tree import Rules, label_tree
from mpt_jax.models import decoding, losses, metrics, prompt_insertion
from mpt_jax.models.t5x_interface import T5XInterface
from mpt_jax.prompts.base import InitContext, PromptMethod, row_axes
from mpt_jax.prompts.prompt_tuning import PromptTuning

FROZEN = "frozen"
BACKBONE = r"(token_embedder|encoder|decoder)/.*"
# Label tables for what else may learn, beside or instead of a prompt. First match wins, so these
# go in front of the rule that freezes the backbone.
PROMPT_ONLY: Rules = ()
FULL_FINETUNING: Rules = ((BACKBONE, "backbone"),)
LAYER_NORMS: Rules = ((r"(encoder|decoder)/(.*/)?\w*norm/scale", "backbone"),)
BITFIT: Rules = ((r"(encoder|decoder)/.*/bias", "backbone"),)


class PromptedEncoderDecoder(T5XInterface):
    """An encoder-decoder that reads `[prompt ; input]`.

    Args:
        module: the backbone; it takes embeddings and masks and never hears of prompts.
        prompt: the prompt method.
        runs: the bank's rows.
        optimizer_def: a `PromptOptimizer`; it learns the label table, the runs and what the rows
            of parameters count from here.
        input_vocabulary: of `encoder_input_tokens`; SeqIO's.
        output_vocabulary: of the targets; SeqIO's. Its `eos_id` ends decoding.
        objective: the loss; default token cross entropy alone.
        labels: rules that go in front of the method's own and of "the backbone is frozen".
        feature_converter_cls: turns SeqIO examples into the batch contract; given by gin.
        decode_fn: one of `mpt_jax.models.decoding`'s.
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
                f"Objective.distillation is set and the method {prompt.name!r} has no prompt: "
                "teachers are prompts, so a student must be one too. Leave distillation unset, or "
                "choose a prompt method."
            )
        if self.has_teacher and prompt.has_variable_lengths(runs):
            raise ValueError(
                f"Objective.distillation is set, and prompts have {prompt.prompt_lengths(runs)} "
                f"positions: a student has as many as its teacher, here {prompt.prompt_length}. "
                "Give all runs one private_length, or leave distillation unset."
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

    # --- Parameters ------------------------------------------------------------------------------

    @property
    def has_teacher(self) -> bool:
        """Whether parameters include the teachers' prompts."""
        return self.objective.distillation is not None

    def init_prompt(self, key: Key, embedding: Float[Array, "V H"]) -> dict[str, Array]:
        """The method's initial parameters, given the backbone's own embeddings."""
        return self.prompt.init(key, self.runs, InitContext(embedding, self.input_vocabulary))

    def init_backbone(self, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
        """Random backbone parameters and their logical axes, T5X's tree."""
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
        """The whole parameter tree and its logical axes, at random: for shapes, and for scratch.

        Parameters do not depend on the batch, so the two input arguments, T5X's, are not read.
        """
        backbone_key, prompt_key = jax.random.split(rng)
        params, axes = self.init_backbone(backbone_key)
        embedding = params["token_embedder"]["embedding"]
        # A method without parameters has no branch at all.
        if prompt := self.init_prompt(prompt_key, embedding):
            params["prompt"] = prompt
            axes["prompt"] = {f"{name}_axes": _axes(self.prompt.axes[name]) for name in prompt}
        if self.has_teacher:
            shape = (self.runs.num_rows, self.prompt.prompt_length, embedding.shape[1])
            params["teacher"] = {"table": jnp.zeros(shape, jnp.float32)}
            axes["teacher"] = {"table_axes": _axes(("tasks", "prompt", "embed"))}
        return flax.core.freeze({"params": params, "params_axes": axes})

    def label_tree(self, params: Params) -> Any:
        """The label of every parameter."""
        return label_tree(params, self.labels)

    def stop_frozen_gradients(self, params: Params) -> Params:
        """The same values; no gradient reaches a frozen one."""
        stop = lambda x, label: jax.lax.stop_gradient(x) if label == FROZEN else x  # noqa: E731
        return jax.tree.map(stop, params, self.label_tree(params))

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
        """Teacher-forced logits and, on request, the hidden states the objective compares.

        Args:
            params: the whole parameter tree.
            batch: the batch contract's features.
            dropout_rng: None switches dropout off.
            prompt_rng: of prompts that are composed at random; default `dropout_rng`.
            teacher: reads the teachers' prompts in place of the student's.
            hidden: whether to return hidden states.
        """
        backbone = self._backbone(params)
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        key = dropout_rng if prompt_rng is None else prompt_rng
        key = None if key is None else jax.random.fold_in(key, 2)
        prompted = self._embed(params, batch, key, teacher)
        mask = encoder_mask(batch)
        encoded: Any = self.module.apply(
            {"params": backbone},
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
            {"params": backbone},
            encoded,
            mask,
            batch["decoder_input_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            deterministic=dropout_rng is None,
            return_hidden=hidden,
            rngs=_fold(rngs, 1),
            method="decode",
        )
        logits, decoder_hidden = decoded if hidden else (decoded, ())
        return losses.ModelOutputs(
            logits,
            self._choose(encoder_hidden),
            self._choose(decoder_hidden),
            prompted.prompts,
            prompted.mixed,
        )

    def _embed(
        self, params: Params, batch: Batch, key: Key | None = None, teacher: bool = False
    ) -> prompt_insertion.PromptedEmbeddings:
        """Token embeddings with every example's prompt in its reserved positions."""
        backbone = {"params": self._backbone(params)}
        embedded: Any = self.module.apply(backbone, batch["encoder_input_tokens"], method="embed")
        prompt = params.get("teacher" if teacher else "prompt", {})
        method = PromptTuning(self.prompt.prompt_length) if teacher else self.prompt
        return prompt_insertion.insert_prompts(method, prompt, self.runs, batch, embedded, key)

    def _backbone(self, params: Params) -> Params:
        return {name: params[name] for name in params if name not in ("prompt", "teacher")}

    def _choose(self, hidden: tuple[Array, ...]) -> tuple[Array, ...]:
        distil = self.objective.distillation
        if not hidden or distil is None or distil.hidden_layers == "all":
            return hidden
        chosen = (-1,) if distil.hidden_layers == "last" else tuple(distil.hidden_layers)
        try:
            return tuple(hidden[int(layer)] for layer in chosen)
        except IndexError:
            raise ValueError(
                f"hidden_layers {chosen} reach outside the {len(hidden)} states of a stack "
                "(embeddings, each layer, output)."
            ) from None

    # --- Loss ------------------------------------------------------------------------------------

    def groups(self, batch: Batch) -> losses.GroupIds:
        """The group of every position of a batch."""
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
        """The sum [G] of every loss term, and the metrics of each run.

        Teachers run unless the batch holds what they say (`losses.teacher_features`).
        """
        distil = self.objective.distillation
        hidden = distil is not None and distil.hidden
        student = self.forward(params, batch, dropout_rng, prompt_rng=prompt_rng, hidden=hidden)
        teacher = losses.teacher_outputs_from_batch(batch)
        if distil is not None and teacher is None:
            frozen = jax.tree.map(jax.lax.stop_gradient, params)
            teacher = self.forward(frozen, batch, None, teacher=True, hidden=hidden)
        sums = losses.term_sums(self.objective, batch, self.groups(batch), student, teacher)
        found = metrics.task_metrics(
            batch, student.logits, batch["decoder_task_ids"], self.runs.num_rows
        )
        if student.mixed is not None:
            names, rows = self.prompt.candidates, self.runs.num_rows
            found |= metrics.mixture_metrics(student.mixed, names, rows)
        return sums, {**found, **metrics.batch_metrics(batch)}

    def loss_normalizers(self, batch: Batch) -> losses.Sums:
        """The weight [G] of every loss term: a function of the batch alone."""
        width, states = self.module.config.emb_dim, self.states_compared
        return losses.normalizers(self.objective, batch, self.groups(batch), width, states)

    @property
    def states_compared(self) -> tuple[int, int]:
        """How many encoder and decoder states the hidden term compares."""
        config, distil = self.module.config, self.objective.distillation
        if distil is None or distil.hidden_layers == "all":
            return config.num_encoder_layers + 1, config.num_decoder_layers + 1
        count = 1 if distil.hidden_layers == "last" else len(distil.hidden_layers)
        return count, count


def _axes(names: tuple[str, ...]) -> nn.partitioning.AxisMetadata:
    return nn.partitioning.AxisMetadata(names=jax.sharding.PartitionSpec(*names))


def _fold(rngs: Mapping[str, Key], index: int) -> dict[str, Key]:
    """Separate dropout keys for the encoder and the decoder."""
    return {name: jax.random.fold_in(key, index) for name, key in rngs.items()}

"""Base class of models: all that trainers, artifacts and T5X use of one.

A model is a frozen backbone with a prompt method and an objective. Trainers do not know what the
inputs are: they pass batches on, and add up what `loss_sums` and `loss_normalizers` return.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from mpt_jax.core.batch import num_rows
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Int, Key, Params
from mpt_jax.core.tree import Rules, flatten, label_tree, unflatten
from mpt_jax.models import losses, metrics
from mpt_jax.models.objective import Objective
from mpt_jax.prompts.base import NO_KERNELS, Kernels, PromptMethod

FROZEN = "frozen"


class RowCost(NamedTuple):
    """Memory that one row of a batch takes in a step.

    Attributes:
        num_bytes: the size of the inputs of all layers, in bytes.
        description: the sizes of a row, for an error: "with ... per row".
        remat_setting: the gin setting that stores fewer of these inputs; None if it is in use.
        exact_remedy: a sentence about a setting of this model that needs less memory for the same
            results; None if there is none.
        other_remedy: the same for a setting that changes results.
    """

    num_bytes: int
    description: str
    remat_setting: str | None
    exact_remedy: str | None = None
    other_remedy: str | None = None


def axes_of(names: tuple[str, ...]) -> nn.partitioning.AxisMetadata:
    """Returns the logical axes of a parameter, in T5X's format."""
    return nn.partitioning.AxisMetadata(names=jax.sharding.PartitionSpec(*names))


class Model(abc.ABC):
    """A model that a trainer can train and an evaluator can evaluate.

    Attributes:
        module: the backbone's Flax module.
        prompt: the prompt method.
        runs: the bank's rows.
        rows: which parameters have one entry per group or per bank row (`prompts.base.row_axes`).
        objective: the loss.
        labels: (regular expression, label) rules that give every parameter one label.
        optimizer_def: the optimizer, bound to the labels, runs and rows; None without training.
        input_vocabulary, output_vocabulary: the vocabularies; None if unknown.
        decode_fn: the decoding function; None if a model predicts classes.
        expected_rows: the number of rows in T5X's batch, set by the T5X adapter.
        backbone_pattern: the regular expression of the backbone's parameters.
        optional_pattern: the regular expression of the backbone's parameters that start from zero
            if a checkpoint lacks them.
        config_setting: how to set the backbone's configuration, for errors: "Set ... to ...".
    """

    module: Any
    prompt: PromptMethod
    runs: Runs
    rows: dict[str, str]
    objective: Objective
    labels: Rules
    optimizer_def: Any
    input_vocabulary: Any
    output_vocabulary: Any
    decode_fn: Callable[..., Any] | None = None
    expected_rows: int | None = None
    backbone_pattern: str
    optional_pattern: str
    config_setting: str

    # --- Backbone --------------------------------------------------------------------------------

    @property
    def backbone_config(self) -> Any:
        """The configuration of the backbone, which has the compute dtype `dtype` and
        `scan_layers`."""
        return self.module.config

    @property
    @abc.abstractmethod
    def dropout_rate(self) -> float:
        """The dropout rate in training."""

    @property
    def input_settings(self) -> dict[str, Any] | None:
        """How images and class texts are made, as JSON values, which artifacts record as `images`;
        None for texts."""
        return None

    @property
    def training_settings(self) -> dict[str, Any]:
        """Settings that training examples depend on, as JSON values, for the fingerprint."""
        return {}

    @property
    def input_digests(self) -> Mapping[str, str]:
        """Digests of what predictions depend on besides backbone, vocabulary and prompts, by the
        name of their field in artifacts (`<name>_sha256`)."""
        return {}

    def input_digests_of(self, tasks: Collection[str]) -> Mapping[str, str]:
        """Returns the `input_digests` without those of other tasks than these."""
        del tasks
        return self.input_digests

    def comparable_digests(self, runs: Runs) -> Mapping[str, str]:
        """Returns the `input_digests` that an artifact of `runs` must match for training to start
        from it; by default all of them."""
        del runs
        return self.input_digests

    @property
    def changeable_digests(self) -> Collection[str]:
        """The names of the `input_digests` that training may change when it starts from an
        artifact."""
        return ()

    def check_evaluates(self, runs: Runs) -> None:
        """Raises ValueError if an artifact of `runs` lacks parameters of this model's runs, which
        no prompt of another run can replace."""
        del runs

    @abc.abstractmethod
    def embedding(self, params: Params) -> Any:
        """Returns the token embeddings [V, H], which initializers read and whose digest is
        recorded."""

    def kernels(self, params: Params) -> Kernels:
        """Returns the weights of the backbone's layers that adapters can change; see
        `InitContext.kernels`."""
        del params
        return NO_KERNELS

    # --- Parameters ------------------------------------------------------------------------------

    @property
    def has_teacher(self) -> bool:
        """Whether parameters include those of teachers."""
        return self.objective.distillation is not None

    @property
    def reads_teachers(self) -> bool:
        """Whether teachers are the prompts of artifacts."""
        return self.has_teacher

    def check_teacher(self, method: PromptMethod) -> None:
        """Raises ValueError if prompts of a method cannot be those of this model's teachers."""
        if "" not in method.parts:
            raise ValueError(
                f"An artifact of TEACHERS has prompts for {' and '.join(method.parts)}, which are "
                "inputs of a model of images. Set TEACHERS to artifacts of jobs on texts."
            )

    def teacher_params(self, params: Params, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the teachers, given parameters with the backbone's, and the
        teachers' plain prompts [K, P, H] of all bank rows by part of the method."""
        del params
        return {"table": prompts[""]}

    @property
    def is_random(self) -> bool:
        """Whether a training step draws random values."""
        return self.dropout_rate > 0 or self.prompt.is_random

    @abc.abstractmethod
    def init_backbone(self, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns random backbone parameters and their logical axes, in T5X's format."""

    @abc.abstractmethod
    def init_prompt(
        self, key: Key, embedding: Float[Array, "V H"], kernels: Kernels = NO_KERNELS
    ) -> dict[str, Any]:
        """Returns the method's initial parameters, given the backbone's token embeddings and the
        `kernels` of the backbone, which only adapters read."""

    def initial_params(self, rng: Key) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns a random backbone with the method's initial parameters, and their logical axes,
        in T5X's format. A method without parameters has no `prompt` branch."""
        backbone_key, prompt_key = jax.random.split(rng)
        params, axes = self.init_backbone(backbone_key)
        if prompt := self.init_prompt(prompt_key, self.embedding(params), self.kernels(params)):
            params["prompt"] = prompt
            names = {f"{name}_axes": axes_of(self.prompt.axes[name]) for name in flatten(prompt)}
            axes["prompt"] = unflatten(names)
        return params, axes

    @abc.abstractmethod
    def get_initial_variables(
        self,
        rng: Key,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        input_types: Mapping[str, Any] | None = None,
    ) -> Params:
        """Returns the whole parameter tree, randomly initialized, and its logical axes.

        Only training from scratch uses the values; otherwise only the shapes are used. Parameters
        do not depend on the batch, so `input_shapes` and `input_types`, which T5X passes, are
        ignored.
        """

    @property
    def precomputes(self) -> bool:
        """Whether `precompute` replaces parameters."""
        return False

    def precompute(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns parameters in which networks whose outputs never change are replaced by these
        outputs, as in `get_initial_variables`."""
        return params

    def params_for_evaluation(self, params: Params) -> Params:
        """Returns parameters with what every batch of an evaluation would compute again, so that it
        is computed once; by default they are unchanged."""
        return params

    def label_tree(self, params: Params) -> Any:
        """Returns the label of every parameter."""
        return label_tree(params, self.labels)

    def stop_frozen_gradients(self, params: Params) -> Params:
        """Returns the same values with gradients stopped at frozen parameters."""
        stop = lambda x, label: jax.lax.stop_gradient(x) if label == FROZEN else x  # noqa: E731
        return jax.tree.map(stop, params, self.label_tree(params))

    def for_inference(self) -> Model:
        """Returns a model whose prompt method has no settings that only training needs, such as the
        MLPs that artifacts leave out."""
        model = copy.copy(self)
        model.prompt = self.prompt.inference_method
        return model

    # --- Step ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def number_examples(self, batch: Batch) -> Batch:
        """Returns a whole batch from whose microbatches the method draws the same prompts as from
        the batch."""

    @abc.abstractmethod
    def max_examples(self, batch: Batch) -> int | None:
        """Returns the largest number of examples that a batch can hold; None if a step needs the
        whole bank, whatever its examples."""

    @abc.abstractmethod
    def row_cost(self, batch: Mapping[str, Any]) -> RowCost:
        """Returns the memory that one row of a batch takes in a step."""

    @abc.abstractmethod
    def loss_sums(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: Key | None = None,
        prompt_rng: Key | None = None,
    ) -> tuple[losses.Sums, metrics.StepMetrics]:
        """Returns the sum [G] of every loss term, and the metrics of each run and of the batch.

        Args:
            params: the whole parameter tree.
            batch: a batch or a microbatch.
            dropout_rng: the random key of dropout; None turns dropout off.
            prompt_rng: the random key of prompts; defaults to `dropout_rng`.
        """

    @abc.abstractmethod
    def loss_normalizers(self, batch: Batch) -> losses.Sums:
        """Returns the normalizer [G] of every loss term, which depends only on the batch."""

    # --- T5X's losses ----------------------------------------------------------------------------

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Key | None, flax_mutables: Any = None
    ) -> tuple[Array, Any]:
        """Returns T5X's training loss, the objective over one whole batch, and the metrics.

        Gradients stop at frozen parameters, so the compiler removes their computation.

        Raises:
            ValueError: the batch is a microbatch. T5X adds the gradients of microbatches without
                dividing, so the gradient of a mean would grow with their number.
        """
        rows = num_rows(batch)
        if self.expected_rows is not None and rows != self.expected_rows:
            raise ValueError(
                f"T5X passed a microbatch ({rows} rows of a batch of {self.expected_rows}), but "
                "T5X's microbatches are not supported. Set Trainer.num_microbatches = None, or run "
                "`python -m mpt_jax.train`, which has exact microbatches."
            )
        params = self.stop_frozen_gradients(params)
        total, step_metrics = self._loss(params, batch, dropout_rng)
        return total, step_metrics if flax_mutables is None else (step_metrics, flax_mutables)

    def eval_fn(self, params: Params, batch: Batch, flax_mutables: Any = None) -> tuple[Array, Any]:
        """Returns T5X's evaluation loss and metrics, as `loss_fn` but without dropout."""
        return self._loss(params, batch, None)

    def _loss(
        self, params: Params, batch: Batch, dropout_rng: Key | None
    ) -> tuple[Array, dict[str, Any]]:
        sums, step_metrics = self.loss_sums(params, batch, dropout_rng)
        normalizers = self.loss_normalizers(batch)
        total, _ = losses.total_loss(self.objective, sums, normalizers)
        step_metrics = {**step_metrics, **metrics.term_metrics(sums, normalizers)}
        return total, metrics.to_clu(step_metrics, self.runs)

    # --- Data and inference ----------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:  # noqa: N802 - T5X's name
        """The function with which T5X and our trainer build the feature converter."""

    @abc.abstractmethod
    def predict_batch(
        self, params: Params, batch: Batch, rng: Key | None = None, num_decodes: int | None = None
    ) -> Int[Array, "B _"]:
        """Returns the ids of each example's prediction."""

    @abc.abstractmethod
    def predict_batch_with_aux(
        self, params: Params, batch: Batch, rng: Key | None = None, **settings: Any
    ) -> tuple[Int[Array, "..."], dict[str, Array]]:
        """Returns the ids of each example's prediction, and `{'scores': [B]}`."""

    @abc.abstractmethod
    def score_batch(
        self, params: Params, batch: Batch, return_intermediates: bool = False
    ) -> Float[Array, "B ..."]:
        """Returns the log probability of each example's target [B], or of each of its classes
        [B, C], in nats."""

"""Cost of a gin file's steps, compiled ahead of time for a slice that need not exist."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.data import datasets
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.plan import chips, hlo
from mpt_jax.plan.chips import Chip
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import abstract_train_state
from mpt_jax.training.trainer import Trainer

STEPS = ("train", "eval", "predict")


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of a gin file's `train()` that its steps depend on.

    Attributes:
        model: the model to train.
        train: training data; only the shapes are used.
        infer: data to decode, if any.
        trainer_cls: `Trainer`, with its gin fields bound.
        rules: mapping from logical axes to mesh axes.
        model_axis: size of the model axis in the gin file.
        ici_mesh_shape, dcn_mesh_shape: (replica, data, model) inside a slice and across slices, if
            the gin file sets them.
        rows_by_run: whether batches hold the runs one after the other (`Trainer`).
    """

    model: PromptedEncoderDecoder
    train: datasets.DatasetConfig
    infer: datasets.DatasetConfig | None
    trainer_cls: Callable[..., Trainer]
    rules: Any
    model_axis: int = 1
    ici_mesh_shape: Sequence[int] | None = None
    dcn_mesh_shape: Sequence[int] | None = None
    rows_by_run: bool = False

    @property
    def slices(self) -> int:
        """Number of slices that it is laid out for."""
        return math.prod(self.dcn_mesh_shape or (1,))

    def batch(self, cfg: datasets.DatasetConfig, partitioner: PjitPartitioner) -> dict[str, Any]:
        """Returns the shapes of a global batch on a mesh."""
        converter = cfg.converter(self.model.FEATURE_CONVERTER_CLS, cfg.pack)
        lengths = converter.get_model_feature_lengths(cfg.task_feature_lengths)
        return {
            name: jax.ShapeDtypeStruct(
                (cfg.batch_size, length), jnp.int32, sharding=partitioner.batch
            )
            for name, length in lengths.items()
        }


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Layout of a job on slices.

    Attributes:
        topology: the slice.
        model_axis: number of chips that share one copy of the model.
        num_microbatches: number of microbatches; None for the gin file's.
        slices: number of slices.
    """

    topology: str
    model_axis: int = 1
    num_microbatches: int | None = None
    slices: int = 1

    @property
    def name(self) -> str:
        """Name of the slice, or of several."""
        return self.topology if self.slices == 1 else f"{self.slices} of {self.topology}"

    @property
    def chip(self) -> Chip:
        """The slice's kind of chip."""
        return chips.CHIPS[self.topology.partition(":")[0]]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one step on each chip.

    Attributes:
        step: `train`, `eval` or `predict`.
        choice: the layout.
        num_chips: number of chips, of all slices.
        rows: examples on each copy of the model.
        arguments, temporaries, peak: bytes of HBM.
        cost: operations, traffic and communication.
        compiler: the compiler's counts of `flops` and `bytes accessed`, with a loop's body counted
            once.
        seconds_to_compile: compile time on this machine.
    """

    step: str
    choice: MeshLayout
    num_chips: int
    rows: float
    arguments: int
    temporaries: int
    peak: int
    cost: hlo.Cost
    compiler: Mapping[str, float]
    seconds_to_compile: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.peak <= self.choice.chip.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """Lower bound of the time for matrix products: operations over the chip's peak."""
        return self.cost.flops / self.choice.chip.flops

    @property
    def accessed_bytes(self) -> float:
        """Bytes read and written in all memories, by the compiler's count. Programs with loops use
        our count, because the compiler counts a loop's body once."""
        return self.cost.accessed_bytes if self.cost.loops else self.compiler["bytes accessed"]

    @property
    def accessed_seconds(self) -> float:
        """All traffic, including VMEM, over the bandwidth of HBM: an upper bound for memory."""
        return self.accessed_bytes / self.choice.chip.hbm_bandwidth

    @property
    def hbm_seconds(self) -> float:
        """Lower bound of the time for memory traffic."""
        return self.cost.hbm_bytes / self.choice.chip.hbm_bandwidth

    @property
    def ici_seconds(self) -> float:
        """Bytes communicated inside a slice over the bandwidth of all links. Traffic between slices
        is not included."""
        kinds = self.cost.collectives.items()
        moved = sum(size for kind, (_, size) in kinds if kind != hlo.ACROSS_SLICES)
        return moved / self.choice.chip.ici_bandwidth

    @property
    def bound_by(self) -> str:
        """The resource that takes longest."""
        return max(
            (self.compute_seconds, "compute"),
            (self.accessed_seconds, "memory"),
            (self.ici_seconds, "network"),
        )[1]

    @property
    def fraction_of_ideal(self) -> float:
        """Compute time over the larger of compute and memory time, with all traffic."""
        return self.compute_seconds / max(self.compute_seconds, self.accessed_seconds)

    @property
    def estimate(self) -> float:
        """Seconds for ranking layouts: the larger of compute and memory, plus communication."""
        return max(self.compute_seconds, self.accessed_seconds) + self.ici_seconds


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A step that the compiler rejected for lack of memory, with its message."""

    step: str
    choice: MeshLayout
    num_chips: int
    message: str

    fits = False


def compile_steps(
    job: Job, choice: MeshLayout, steps: Sequence[str] = STEPS
) -> list[StepCost | DoesNotFit]:
    """Compiles the steps of a job for a slice.

    Raises:
        ValueError: the batch is not divisible by the copies of the model, or the mesh does not fit.
    """
    devices = chips.devices(choice.topology, choice.slices)
    partitioner = PjitPartitioner(
        num_partitions=choice.model_axis,
        logical_axis_rules=job.rules,
        ici_mesh_shape=job.ici_mesh_shape,
        dcn_mesh_shape=job.dcn_mesh_shape,
        devices=devices,
    )
    copies = len(devices) // choice.model_axis
    parts = {} if choice.num_microbatches is None else {"num_microbatches": choice.num_microbatches}
    state = abstract_train_state(job.model, partitioner, job.rows_by_run)
    trainer = job.trainer_cls(
        model=job.model,
        # The trainer reads the step number; everything else is only shapes.
        state=state.replace(step=np.zeros((), np.int32)),
        partitioner=partitioner,
        rng=jax.random.PRNGKey(0),
        rows_by_run=job.rows_by_run,
        **parts,
    )
    costs: list[StepCost | DoesNotFit] = []
    for step in steps:
        cfg = job.infer if step == "predict" else job.train
        if cfg is None:
            continue
        if cfg.batch_size % copies:
            raise ValueError(
                f"A batch of {cfg.batch_size} rows ({step}) is not divisible by {copies}, the "
                f"copies of the model on {choice.name}. Change BATCH_SIZE (EVAL_BATCH_SIZE for "
                "predict)."
            )
        batch = job.batch(cfg, partitioner)
        if step == "predict":
            with partitioner.activate():
                lowered = jax.jit(job.model.predict_batch).lower(trainer.state.params, batch)
        else:
            lowered = trainer.lower(batch)[step]
        # Decoding ends when every example has ended, at the latest after this many tokens.
        longest = batch["decoder_input_tokens"].shape[1]
        rows = cfg.batch_size / copies
        costs.append(_compile(step, choice, len(devices), rows, lowered, longest))
    return costs


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Disables writing to the compilation cache. A machine without these chips cannot use the
    compiled programs, and fails to read them back."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _compile(
    step: str, choice: MeshLayout, num_chips: int, rows: float, lowered: Any, longest: int
) -> StepCost | DoesNotFit:
    started = time.monotonic()
    try:
        with _without_compilation_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error).partition("\n\n")[0].replace("\n", " ")
        return DoesNotFit(step, choice, num_chips, message)
    seconds = time.monotonic() - started
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return StepCost(
        step=step,
        choice=choice,
        num_chips=num_chips,
        rows=rows,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        cost=hlo.cost(compiled.as_text(), unknown_trips=longest),
        compiler={name: counted[name] for name in ("flops", "bytes accessed")},
        seconds_to_compile=seconds,
    )

"""A gin file's steps, compiled for a slice that is not here, and what they need."""

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
    """What `train()` of a gin file was given, as far as its steps depend on it.

    Attributes:
        model: what trains.
        train: its training data; only its shapes are read.
        infer: the data it decodes, if any.
        trainer_cls: `Trainer`, with its gin fields bound.
        rules: from logical axes to the mesh.
        model_axis: of the mesh that the gin file asks for.
        ici_mesh_shape, dcn_mesh_shape: (replica, data, model) inside a slice and across slices,
            where the gin file says so.
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
        """How many slices it is laid out for."""
        return math.prod(self.dcn_mesh_shape or (1,))

    def batch(self, cfg: datasets.DatasetConfig, partitioner: PjitPartitioner) -> dict[str, Any]:
        """The shapes of a global batch on a mesh."""
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
    """How to lay a job out.

    Attributes:
        topology: the slice.
        model_axis: chips that share one copy of the model.
        num_microbatches: parts of a batch; None leaves it to gin.
        slices: how many of them.
    """

    topology: str
    model_axis: int = 1
    num_microbatches: int | None = None
    slices: int = 1

    @property
    def name(self) -> str:
        """The slice, or slices."""
        return self.topology if self.slices == 1 else f"{self.slices} of {self.topology}"

    @property
    def chip(self) -> Chip:
        """One of the slice's chips."""
        return chips.CHIPS[self.topology.partition(":")[0]]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step needs on each chip.

    Attributes:
        step: `train`, `eval` or `predict`.
        choice: how it was laid out.
        num_chips: of the slice.
        rows: examples on each copy of the model.
        arguments, temporaries, peak: bytes of HBM.
        cost: operations, traffic and communication.
        compiler: the compiler's own count of `flops` and `bytes accessed`; a loop's body once.
        seconds_to_compile: here.
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
        """Whether a chip has as much memory."""
        return self.peak <= self.choice.chip.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """The least that the products take: operations over the chip's peak."""
        return self.cost.flops / self.choice.chip.flops

    @property
    def accessed_bytes(self) -> float:
        """Read and written in all memories: the compiler's own count, or where there are loops,
        of which it counts the body once, ours."""
        return self.cost.accessed_bytes if self.cost.loops else self.compiler["bytes accessed"]

    @property
    def accessed_seconds(self) -> float:
        """All traffic, of VMEM too, over the bandwidth of HBM: more than memory can take."""
        return self.accessed_bytes / self.choice.chip.hbm_bandwidth

    @property
    def hbm_seconds(self) -> float:
        """The least that memory takes."""
        return self.cost.hbm_bytes / self.choice.chip.hbm_bandwidth

    @property
    def ici_seconds(self) -> float:
        """Communication's bytes inside a slice over the bandwidth of all links; what crosses
        slices is counted and takes no time here."""
        kinds = self.cost.collectives.items()
        moved = sum(size for kind, (_, size) in kinds if kind != hlo.ACROSS_SLICES)
        return moved / self.choice.chip.ici_bandwidth

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        return max(
            (self.compute_seconds, "compute"),
            (self.accessed_seconds, "memory"),
            (self.ici_seconds, "network"),
        )[1]

    @property
    def fraction_of_ideal(self) -> float:
        """Compute over the larger of compute and memory, by all traffic."""
        return self.compute_seconds / max(self.compute_seconds, self.accessed_seconds)

    @property
    def estimate(self) -> float:
        """For ranking choices: the larger of compute and memory, and communication after it."""
        return max(self.compute_seconds, self.accessed_seconds) + self.ici_seconds


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A step that the compiler refused for lack of memory, and what it said."""

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
        ValueError: the batch does not divide over the slice, or the mesh does not fit.
    """
    slice_ = chips.devices(choice.topology, choice.slices)
    partitioner = PjitPartitioner(
        num_partitions=choice.model_axis,
        logical_axis_rules=job.rules,
        ici_mesh_shape=job.ici_mesh_shape,
        dcn_mesh_shape=job.dcn_mesh_shape,
        devices=slice_,
    )
    copies = len(slice_) // choice.model_axis
    parts = {} if choice.num_microbatches is None else {"num_microbatches": choice.num_microbatches}
    state = abstract_train_state(job.model, partitioner, job.rows_by_run)
    trainer = job.trainer_cls(
        model=job.model,
        # The number of steps taken is asked for; all else is shapes.
        state=state.replace(step=np.zeros((), np.int32)),
        partitioner=partitioner,
        rng=jax.random.PRNGKey(0),
        rows_by_run=job.rows_by_run,
        **parts,
    )
    found: list[StepCost | DoesNotFit] = []
    for step in steps:
        cfg = job.infer if step == "predict" else job.train
        if cfg is None:
            continue
        if cfg.batch_size % copies:
            raise ValueError(
                f"A batch of {cfg.batch_size} rows ({step}) does not divide over {copies} copies "
                f"of the model on {choice.name}; set BATCH_SIZE (EVAL_BATCH_SIZE for predict)."
            )
        batch = job.batch(cfg, partitioner)
        if step == "predict":
            with partitioner.activate():
                lowered = jax.jit(job.model.predict_batch).lower(trainer.state.params, batch)
        else:
            lowered = trainer.lower(batch)[step]
        # Decoding ends when every example has; at the latest after as many tokens.
        longest = batch["decoder_input_tokens"].shape[1]
        rows = cfg.batch_size / copies
        found.append(_compile(step, choice, len(slice_), rows, lowered, longest))
    return found


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Keeps what is compiled out of the compilation cache: it is of no use to a machine without
    such chips, and reading it back there fails."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _compile(
    step: str, choice: MeshLayout, num_chips: int, rows: float, lowered: Any, longest: int
) -> StepCost | DoesNotFit:
    before = time.monotonic()
    try:
        with _not_kept():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).partition("\n\n")[0].replace("\n", " ")
        return DoesNotFit(step, choice, num_chips, said)
    seconds = time.monotonic() - before
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

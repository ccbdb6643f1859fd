"""Cost of a gin file's steps, compiled ahead of time for a slice that need not be available."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpt_jax.core.batch import FILES
from mpt_jax.data import datasets
from mpt_jax.models.model import Model
from mpt_jax.plan import chips, hlo
from mpt_jax.plan.chips import Chip
from mpt_jax.training import image_cache
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import abstract_train_state
from mpt_jax.training.trainer import Trainer

STEPS = ("train", "eval", "predict")


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of a gin file's `train()` that its steps depend on.

    Attributes:
        model: The model to train.
        train: The training data, of which only the shapes are used.
        infer: The data to decode, if any.
        trainer_cls: `Trainer`, with its gin bindings.
        rules: The mapping from logical axes to mesh axes.
        model_axis: The size of the model axis in the gin file.
        ici_mesh_shape, dcn_mesh_shape: The mesh (replica, data, model) inside a slice and across
            slices; None if the gin file does not set it.
        rows_by_run: Whether the examples of a batch are sorted by run, as in `Trainer`.
        total_steps: The step to train to.
    """

    model: Model
    train: datasets.DatasetConfig
    infer: datasets.DatasetConfig | None
    trainer_cls: Callable[..., Trainer]
    rules: Any
    model_axis: int = 1
    ici_mesh_shape: Sequence[int] | None = None
    dcn_mesh_shape: Sequence[int] | None = None
    rows_by_run: bool = False
    total_steps: int = 0

    @property
    def slices(self) -> int:
        """The number of slices in the mesh."""
        return math.prod(self.dcn_mesh_shape or (1,))

    def batch(self, cfg: datasets.DatasetConfig, partitioner: PjitPartitioner) -> dict[str, Any]:
        """Returns name -> shape and sharding of the arrays of a global batch."""
        converter = cfg.converter(self.model.FEATURE_CONVERTER_CLS, cfg.pack)
        shapes = dict(converter.feature_shapes(cfg.task_feature_lengths))
        if FILES in shapes:  # they stay on the host
            size = self.model.backbone_config.image.image_size
            shapes = {name: x for name, x in shapes.items() if name not in image_cache.IMAGES}
            shapes["image"] = ((size, size, 3), "uint8")
        return {
            name: jax.ShapeDtypeStruct(
                (cfg.batch_size, *shape), dtype, sharding=partitioner.batch_sharding
            )
            for name, (shape, dtype) in shapes.items()
        }


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Layout of a job on one or more slices.

    Attributes:
        topology: The slice, such as `v5e:4x4`.
        model_axis: The number of chips that share one copy of the model.
        num_microbatches: The number of microbatches; None uses the value from the gin file.
        slices: The number of slices.
    """

    topology: str
    model_axis: int = 1
    num_microbatches: int | None = None
    slices: int = 1

    @property
    def name(self) -> str:
        """The name of the slice, preceded by the number of slices if there are several."""
        return self.topology if self.slices == 1 else f"{self.slices} of {self.topology}"

    @property
    def chip(self) -> Chip:
        """The chip that the slice consists of."""
        return chips.CHIPS[self.topology.partition(":")[0]]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one step on each chip.

    Attributes:
        step: The name of the step: `train`, `eval` or `predict`.
        choice: The layout.
        num_chips: The number of chips in all slices.
        rows: The number of rows of the batch for each copy of the model.
        arguments, temporaries, peak: The bytes of HBM for arguments and temporary arrays, and the
            peak.
        cost: The operations, memory traffic and communication.
        compiler: The compiler's counts of `flops` and `bytes accessed`, which count a loop's body
            once.
        seconds_to_compile: The compile time on this machine.
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
        """Whether the step fits into the HBM of a chip."""
        return self.peak <= self.choice.chip.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """Lower bound of the time for matrix products: their operations over the chip's peak."""
        return self.cost.flops / self.choice.chip.flops

    @property
    def accessed_bytes(self) -> float:
        """Bytes read and written in all memories: the compiler's count, or our count for programs
        with loops, because the compiler counts a loop's body once."""
        return self.cost.accessed_bytes if self.cost.loops else self.compiler["bytes accessed"]

    @property
    def accessed_seconds(self) -> float:
        """Upper bound of the time for memory traffic: the traffic of all memories, including VMEM,
        over the bandwidth of HBM."""
        return self.accessed_bytes / self.choice.chip.hbm_bandwidth

    @property
    def hbm_seconds(self) -> float:
        """Lower bound of the time for memory traffic: HBM traffic over HBM bandwidth."""
        return self.cost.hbm_bytes / self.choice.chip.hbm_bandwidth

    @property
    def ici_seconds(self) -> float:
        """Time for communication inside a slice: bytes over the bandwidth of all links. Traffic
        between slices is not included."""
        kinds = self.cost.collectives.items()
        moved = sum(size for kind, (_, size) in kinds if kind != hlo.ACROSS_SLICES)
        return moved / self.choice.chip.ici_bandwidth

    @property
    def bound_by(self) -> str:
        """The resource with the longest time: compute, memory or network."""
        return max(
            (self.compute_seconds, "compute"),
            (self.accessed_seconds, "memory"),
            (self.ici_seconds, "network"),
        )[1]

    @property
    def fraction_of_ideal(self) -> float:
        """Compute time over the larger of compute time and memory time (`accessed_seconds`)."""
        return self.compute_seconds / max(self.compute_seconds, self.accessed_seconds)

    @property
    def estimate(self) -> float:
        """Seconds per step, to rank layouts: the larger of compute and memory, plus network."""
        return max(self.compute_seconds, self.accessed_seconds) + self.ici_seconds

    def chip_hours(self, steps: int) -> float:
        """Estimated chip hours of a number of steps, each as long as the larger of compute time and
        memory time. Nothing else that a job does is included."""
        seconds = max(self.compute_seconds, self.accessed_seconds)
        return self.num_chips * seconds * steps / 3600


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
    """Returns the costs of a job's steps, compiled for a layout. The predict step is omitted if the
    job has no data to decode.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: the batch size is not divisible by the number of copies of the model, the mesh
            does not fit the slice, or libtpu cannot compile for the slice.
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
            axis = "PjitPartitioner.ici_mesh_shape" if job.ici_mesh_shape else "--num_partitions"
            raise ValueError(
                f"The batch size of the {step} step, {cfg.batch_size}, is not divisible by "
                f"{copies}, the number of copies of the model on {choice.name}. Change "
                f"{'EVAL_BATCH_SIZE' if step == 'predict' else 'BATCH_SIZE'}, or the size of the "
                f"model axis ({axis})."
            )
        batch = job.batch(cfg, partitioner)
        if step == "predict":
            with partitioner.activate():
                params = trainer.shapes_for_evaluation()
                lowered = jax.jit(job.model.predict_batch).lower(params, batch)
        else:
            lowered = trainer.lower(batch)[step]
        # Decoding ends when every example has ended, at the latest after this many tokens.
        longest = batch["decoder_input_tokens"].shape[1] if job.model.decode_fn else 1
        rows = cfg.batch_size / copies
        costs.append(_compile(step, choice, len(devices), rows, lowered, longest))
    return costs


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Returns a context that does not write to the compilation cache, because a machine without the
    chips fails to read the compiled programs back."""
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

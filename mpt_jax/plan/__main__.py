"""`mpt-jax plan`: cost of a gin file's steps on TPUs, compiled ahead of time but not run.

mpt-jax plan --gin_file=gin/mpt_source.gin --topology=v5e:4x4 --gin.BATCH_SIZE=512
mpt-jax plan --gin_file=gin/mpt_source.gin --topology=v6e          the smallest slice that fits
... --num_partitions=1,4 --num_microbatches=1,2                    compares layouts
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import gin
import jax
from absl import app, flags, logging

from mpt_jax import train as train_module
from mpt_jax.config import gin_utils, trainer_choice
from mpt_jax.data import sampling
from mpt_jax.plan import chips, format, stand_ins, steps
from mpt_jax.plan.steps import DoesNotFit, Job, MeshLayout, StepCost
from mpt_jax.training.partitioning import PjitPartitioner

PARTITIONER = "partitioning.PjitPartitioner"
MOST_PARTITIONS = 64  # largest model axis, a power of two

flags.DEFINE_multi_string("topology", [], "v5e:4x4, or v5e for all its slices from small to large.")
flags.DEFINE_list("num_partitions", [], "Sizes of the model axis to try; default from gin.")
flags.DEFINE_list("num_microbatches", [], "Numbers of microbatches to try; default from gin.")
flags.DEFINE_list("steps", list(steps.STEPS), "Which steps to compile.")
flags.DEFINE_string("json", None, "Also write all figures to this file.")
flags.register_validator(
    "steps",
    lambda names: set(names) <= set(steps.STEPS),
    f"must be a list of steps out of {', '.join(steps.STEPS)}, separated by commas.",
)
for _name in ("num_partitions", "num_microbatches"):
    flags.register_validator(
        _name,
        lambda sizes: all(size.isdecimal() and int(size) > 0 for size in sizes),
        "must be a list of positive numbers, separated by commas.",
    )


@functools.wraps(train_module.train)
def train(**given: Any) -> Job:
    """Replaces the `train()` that gin files configure. Returns the arguments that steps need."""
    partitioner: PjitPartitioner = given["partitioner"]
    return Job(
        given["model"],
        given["train_dataset_cfg"],
        given.get("infer_eval_dataset_cfg"),
        given.get("trainer_cls", train_module.Trainer),
        partitioner.logical_axis_rules,
        partitioner.num_partitions,
        rows_by_run=given["model"].runs.num_groups > 1
        and sampling.has_equal_shares(given["train_dataset_cfg"]),
        total_steps=given["total_steps"],
    )  # `read_job` adds the shapes of a mesh over slices


def main(argv: list[str]) -> None:
    """Compiles the steps of the job that the gin files configure, and prints their cost."""
    gin_utils.log_progress()
    chips.share_libtpu()
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(
                f"Unexpected arguments: {' '.join(argv[1:])}. Pass options as --name=value."
            )
        if not values.topology:
            raise ValueError(
                "--topology is missing. Set it to a slice, such as v5e:4x4, or to a chip: "
                f"{', '.join(chips.CHIPS)}."
            )
        job = read_job(values.gin_file, values.gin_bindings, values.gin_search_paths)
        costs = plan(job, values)
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", gin_utils.message(error))
        sys.exit(2)
    parts = [
        format.NOTE,
        stand_ins.note(job.model),
        format.table(costs),
        format.details(costs),
        format.verdicts(costs),
        format.job_costs(costs, job),
    ]
    print(*filter(None, parts), sep="\n\n")
    if values.json:
        Path(values.json).write_text(json.dumps(format.as_json(costs, job), indent=1) + "\n")


def read_job(gin_files: list[str], bindings: list[str], search_paths: list[str]) -> Job:
    """Returns the job that the gin files and bindings of a training stage configure."""
    with gin_utils.as_main(sys.modules[__name__]):
        gin_utils.parse(gin_files, bindings, search_paths)
        stand_ins.bind()
        shapes = _take_mesh_shapes()
        return dataclasses.replace(gin_utils.configured(train)(), **shapes)


def _take_mesh_shapes() -> dict[str, Any]:
    """Removes the mesh shapes of `PjitPartitioner` from the gin configuration, and returns them.
    Otherwise, gin would build the mesh from this machine's devices instead of the TPUs."""
    bound = gin.get_bindings(PARTITIONER)
    shapes = {name: bound.get(name) for name in ("ici_mesh_shape", "dcn_mesh_shape")}
    if any(shape is not None for shape in shapes.values()):
        with gin.unlock_config():
            for name in shapes:
                gin.bind_parameter(f"{PARTITIONER}.{name}", None)
    return shapes


def _model_axes(job: Job, asked: list[str]) -> list[int]:
    """Returns the sizes of the model axis to compile for.

    Raises:
        ValueError: `asked` has sizes, but gin's `ici_mesh_shape` already determines the size.
    """
    if not job.ici_mesh_shape:
        return [int(n) for n in asked] or [job.model_axis]
    if asked:
        raise ValueError(
            f"--num_partitions={','.join(asked)} would have no effect, because the model axis is "
            f"the last number of PjitPartitioner.ici_mesh_shape = {tuple(job.ici_mesh_shape)}. "
            "Drop --num_partitions, or set PjitPartitioner.ici_mesh_shape = None."
        )
    return [job.ici_mesh_shape[-1] if job.model_axis == 1 else job.model_axis]


def _topologies(job: Job, name: str) -> list[str]:
    """Returns the slices for a value of --topology. For a chip, returns all its slices, or only
    those of the size of gin's `ici_mesh_shape` if it is set.

    Raises:
        ValueError: the chip is unknown, or none of its slices has the size of `ici_mesh_shape`.
    """
    known = chips.topologies(name)
    if known == [name] or not job.ici_mesh_shape:
        return known
    size = math.prod(job.ici_mesh_shape)
    if fitting := [topology for topology in known if chips.count(topology) == size]:
        return fitting
    raise ValueError(
        f"PjitPartitioner.ici_mesh_shape = {tuple(job.ici_mesh_shape)} needs slices of {size} "
        f"chips, but slices of {name} have "
        f"{', '.join(str(chips.count(topology)) for topology in known)}. Change "
        "PjitPartitioner.ici_mesh_shape or --topology."
    )


def plan(job: Job, values: Any) -> list[StepCost | DoesNotFit]:
    """Returns the costs of the steps for every layout that the flags describe.

    If --topology names a chip, its slices are compiled from small to large, up to the first one on
    which all layouts fit. An invalid layout ends the search; the costs before it are returned.

    Raises:
        ValueError: the first layout, or a flag, is invalid.
        ImportError: libtpu is not installed.
    """
    parts = [int(n) for n in values.num_microbatches] or [None]
    layouts = list(itertools.product(_model_axes(job, values.num_partitions), parts))
    costs: list[StepCost | DoesNotFit] = []
    for name in values.topology:
        for topology in _topologies(job, name):
            of_topology = []
            for model_axis, number in layouts:
                choice = MeshLayout(topology, model_axis, number, job.slices)
                logging.info("Compiling for %s.", choice)
                try:
                    of_topology += steps.compile_steps(job, choice, values.steps)
                except ValueError as error:
                    if not costs and not of_topology:
                        raise
                    logging.error("%s", error)  # still shows what was compiled
                    return [*costs, *of_topology]
            costs += of_topology
            if topology != name and all(cost.fits for cost in of_topology):
                break  # the slices that follow are larger
    return costs


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, even if there is one
    # gin makes the file's mesh before the slice is known. These devices stand in for its chips.
    jax.config.update("jax_num_cpu_devices", MOST_PARTITIONS)
    trainer_choice.install_fallback()
    gin_utils.define_flags()
    app.run(main, flags_parser=gin_utils.parse_flags)

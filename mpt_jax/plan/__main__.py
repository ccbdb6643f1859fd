"""`mpt-jax plan`: what a gin file's steps need on TPUs, compiled here and run nowhere.

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
from mpt_jax.plan import chips, format, steps
from mpt_jax.plan.steps import DoesNotFit, Job, MeshLayout, StepCost
from mpt_jax.runtime import paths
from mpt_jax.training.partitioning import PjitPartitioner

# No vocabulary is read: no shape depends on its words.
_VOCABULARY = "toy.model"

PARTITIONER = "partitioning.PjitPartitioner"
MOST_PARTITIONS = 64  # of the model axis, a power of two

flags.DEFINE_multi_string("topology", [], "v5e:4x4; or v5e, its slices from small to large.")
flags.DEFINE_list("num_partitions", [], "Sizes of the model axis to try; default gin's.")
flags.DEFINE_list("num_microbatches", [], "Numbers of microbatches to try; default gin's.")
flags.DEFINE_list("steps", list(steps.STEPS), "Which steps to compile.")
flags.DEFINE_string("json", None, "Also write every figure to this file.")


@functools.wraps(train_module.train)
def train(**given: Any) -> Job:
    """Stands in for `train()`, which gin files configure; keeps what its steps depend on."""
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
    )  # `read_job` adds the shapes of a mesh over slices


def main(argv: list[str]) -> None:
    """Compiles, counts and prints."""
    gin_utils.log_progress()
    chips.share_libtpu()
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"Unexpected arguments: {argv[1:]}")
        if not values.topology:
            raise ValueError(f"Say for which TPU: --topology=v5e:4x4, or one of {[*chips.CHIPS]}.")
        job = read_job(values.gin_file, values.gin_bindings, values.gin_search_paths)
        found = plan(job, values)
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", gin_utils.message(error))
        sys.exit(2)
    print(
        format.NOTE, format.table(found), format.details(found), format.verdicts(found), sep="\n\n"
    )
    if values.json:
        Path(values.json).write_text(json.dumps(format.as_json(found), indent=1) + "\n")


def read_job(gin_files: list[str], bindings: list[str], search_paths: list[str]) -> Job:
    """What the gin files and bindings of a training stage describe."""
    stand_in = f"VOCABULARY = {str(paths.SHIPPED / _VOCABULARY)!r}"
    with gin_utils.as_main(sys.modules[__name__]):
        gin_utils.parse(gin_files, [stand_in, *bindings], search_paths)
        shapes = _take_mesh_shapes()
        return dataclasses.replace(gin_utils.configured(train)(), **shapes)


def _take_mesh_shapes() -> dict[str, Any]:
    """What gin says of a mesh over several slices, taken out of its configuration: the devices of
    this machine, of which gin makes a mesh, are not those slices."""
    bound = gin.get_bindings(PARTITIONER)
    shapes = {name: bound.get(name) for name in ("ici_mesh_shape", "dcn_mesh_shape")}
    if any(shape is not None for shape in shapes.values()):
        with gin.unlock_config():
            for name in shapes:
                gin.bind_parameter(f"{PARTITIONER}.{name}", None)
    return shapes


def _model_axes(job: Job, asked: list[str]) -> list[int]:
    """The sizes of the model axis to try.

    Raises:
        ValueError: it is in gin's `ici_mesh_shape` already.
    """
    if not job.ici_mesh_shape:
        return [int(n) for n in asked] or [job.model_axis]
    if asked:
        raise ValueError(
            f"--num_partitions={','.join(asked)} would have no effect: the model axis is the last "
            f"of ici_mesh_shape={tuple(job.ici_mesh_shape)}. Change that, or leave the flag out."
        )
    return [job.ici_mesh_shape[-1] if job.model_axis == 1 else job.model_axis]


def _topologies(job: Job, name: str) -> list[str]:
    """The slices a flag names; of all of a kind, those that gin's mesh can lie on.

    Raises:
        ValueError: no such chip, or none of its slices is of that size.
    """
    known = chips.topologies(name)
    if known == [name] or not job.ici_mesh_shape:
        return known
    size = math.prod(job.ici_mesh_shape)
    if fitting := [each for each in known if chips.count(each) == size]:
        return fitting
    raise ValueError(
        f"ici_mesh_shape={tuple(job.ici_mesh_shape)} is for slices of {size} chips; those of "
        f"{name} have {', '.join(str(chips.count(each)) for each in known)}."
    )


def plan(job: Job, values: Any) -> list[StepCost | DoesNotFit]:
    """Every layout that the flags ask for."""
    parts = [int(n) for n in values.num_microbatches] or [None]
    layouts = list(itertools.product(_model_axes(job, values.num_partitions), parts))
    found: list[StepCost | DoesNotFit] = []
    for name in values.topology:
        for topology in _topologies(job, name):
            mine = []
            for model_axis, number in layouts:
                choice = MeshLayout(topology, model_axis, number, job.slices)
                logging.info("Compiling for %s.", choice)
                try:
                    mine += steps.compile_steps(job, choice, values.steps)
                except ValueError as error:
                    if not found and not mine:
                        raise
                    logging.error("%s", error)  # what was compiled is shown all the same
                    return [*found, *mine]
            found += mine
            if topology != name and all(each.fits for each in mine):
                break  # the slices that follow are larger
    return found


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a plan needs no device, also where there are some
    # A gin file's own mesh is made before the slice is known, of devices that do not exist.
    jax.config.update("jax_num_cpu_devices", MOST_PARTITIONS)
    trainer_choice.install_fallback()
    gin_utils.define_flags()
    app.run(
        main, flags_parser=lambda argv: app.parse_flags_with_usage(gin_utils.rewrite_gin_args(argv))
    )

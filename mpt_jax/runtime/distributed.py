"""Distributed start: joins the other processes of a job, configured by environment variables.

    MPT_JAX_DISTRIBUTED=1         join; JAX finds the others itself (Cloud TPU, GKE, Slurm, MPI)
    MPT_JAX_DISTRIBUTED=0         never join
    unset                         join if one of these names other processes:
        JAX_COORDINATOR_ADDRESS   host:port of process 0, with JAX_NUM_PROCESSES and JAX_PROCESS_ID
        TPU_WORKER_HOSTNAMES      the hosts of a TPU slice, as GKE and TPU containers set it
        MEGASCALE_NUM_SLICES      more than one slice

Joining must happen before anything uses a device. On the TPU VMs of a slice with several hosts,
none of these variables is set by default, so the launch script (tpu/queued.sh) sets
MPT_JAX_DISTRIBUTED=1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

VARIABLE = "MPT_JAX_DISTRIBUTED"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def distributed_args(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments for `jax.distributed.initialize`, or None for a single process.

    Raises:
        ValueError: a variable has an invalid value, or is set without the others it needs.
    """
    choice = environment.get(VARIABLE) or None
    if choice not in (None, "0", "1"):
        raise ValueError(
            f"The environment variable {VARIABLE} must be '0', '1' or unset, got {choice!r}. Set "
            "it to 1 in a job of several processes, or unset it."
        )
    address = environment.get(ADDRESS)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    if choice == "0" or not (choice or address or len(hosts) > 1 or slices > 1):
        return None
    numbers = {
        "num_processes": _number(environment, COUNT),
        "process_id": _number(environment, INDEX),
    }
    arguments = {name: number for name, number in numbers.items() if number is not None}
    if arguments and (len(arguments) == 1 or not address):
        unset = [name for name in (ADDRESS, COUNT, INDEX) if not environment.get(name)]
        raise ValueError(
            f"The environment variables {ADDRESS}, {COUNT} and {INDEX} must be set together (not "
            f"set: {', '.join(unset)}). Set all three, or only {ADDRESS} if JAX can find the other "
            "two itself."
        )
    return {**arguments, "coordinator_address": address} if address else arguments


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job's other processes if the environment names any; at most once per process.

    Raises:
        ValueError: see `distributed_args`.
        RuntimeError: raised by JAX if a device was used before, or other processes do not answer.
    """
    import jax  # here, so that `distributed_args` works without JAX

    arguments = distributed_args(environment)
    if arguments is None or jax.distributed.is_initialized():
        return
    jax.distributed.initialize(**arguments)
    logging.info("Joined as process %d of %d.", jax.process_index(), jax.process_count())


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name) or None
    if text is not None and not text.isdecimal():
        raise ValueError(
            f"The environment variable {name} must be a whole number, got {text!r}. Correct it, or "
            "unset it."
        )
    return None if text is None else int(text)

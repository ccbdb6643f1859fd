"""Joining the other processes of a job, by what the environment says of it.

    MPT_JAX_DISTRIBUTED=1         join: JAX finds the others itself (Cloud TPU, GKE, Slurm, MPI)
    MPT_JAX_DISTRIBUTED=0         never
    unset                         join where one of these names others:
        JAX_COORDINATOR_ADDRESS   host:port of process 0, with JAX_NUM_PROCESSES and JAX_PROCESS_ID
        TPU_WORKER_HOSTNAMES      the hosts of a TPU slice, as GKE and TPU containers set it
        MEGASCALE_NUM_SLICES      more than one slice

It must be done before anything touches a device. A plain TPU VM of several hosts sets none of
these: its launch script sets MPT_JAX_DISTRIBUTED=1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

VARIABLE = "MPT_JAX_DISTRIBUTED"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def distributed_args(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that an environment asks for; None for a job
    of one process.

    Raises:
        ValueError: a variable has no value it may have, or is there without the others.
    """
    choice = environment.get(VARIABLE) or None
    if choice not in (None, "0", "1"):
        raise ValueError(f"{VARIABLE} must be '0', '1' or unset, got {choice!r}.")
    address = environment.get(ADDRESS)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    if choice == "0" or not (choice or address or len(hosts) > 1 or slices > 1):
        return None
    found = {
        "num_processes": _number(environment, COUNT),
        "process_id": _number(environment, INDEX),
    }
    given = {name: value for name, value in found.items() if value is not None}
    if given and (len(given) == 1 or not address):
        raise ValueError(
            f"{ADDRESS}, {COUNT} and {INDEX} belong together, got {address!r}, "
            f"{environment.get(COUNT)!r} and {environment.get(INDEX)!r}: set all three, or the "
            "first alone where JAX can find the others itself."
        )
    return {**given, "coordinator_address": address} if address else given


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job's other processes if the environment names any; once per process.

    Raises:
        ValueError: see `wanted`.
        RuntimeError: JAX's own: a device was touched before, or the others do not answer.
    """
    import jax  # here, so that `wanted` can be asked without it

    arguments = distributed_args(environment)
    if arguments is None or jax.distributed.is_initialized():
        return
    jax.distributed.initialize(**arguments)
    logging.info("Process %d of %d.", jax.process_index(), jax.process_count())


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name) or None
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}.")
    return None if text is None else int(text)

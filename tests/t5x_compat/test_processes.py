"""A job's other processes from the environment; test_real_t5x.py starts two under T5X."""

from __future__ import annotations

import jax
import pytest

from mpt_jax.runtime import distributed

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
PLACE = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
EXPLICIT = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"MPT_JAX_DISTRIBUTED": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "1"}, None),
        ({"MPT_JAX_DISTRIBUTED": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, None),
        ({"MPT_JAX_DISTRIBUTED": "0", **ADDRESS, **PLACE}, None),
        ({"MPT_JAX_DISTRIBUTED": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}),
        (ADDRESS, {"coordinator_address": "host:1234"}),
        ({**ADDRESS, **PLACE}, EXPLICIT),
    ],
)
def test_distributed_args_environment_gives_expected(environment, expected):
    assert distributed.distributed_args(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MPT_JAX_DISTRIBUTED": "yes"}, "MPT_JAX_DISTRIBUTED must be '0', '1' or unset.*'yes'"),
        ({"MPT_JAX_DISTRIBUTED": "1", **PLACE}, r"together \(not set: JAX_COORDINATOR_ADDRESS\)"),
        ({**ADDRESS, "JAX_PROCESS_ID": "0"}, r"together \(not set: JAX_NUM_PROCESSES\)"),
        ({**ADDRESS, **PLACE, "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be a whole .*'one'"),
    ],
)
def test_distributed_args_incomplete_address_raises(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed.distributed_args(environment)


def test_distributed_initialize_connects_once(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    distributed.initialize({})
    distributed.initialize({**ADDRESS, **PLACE})
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.initialize({**ADDRESS, **PLACE})
    assert calls == [EXPLICIT]

"""The kernel of the gated feed-forward block, compiled for TPUs, and what it saves in a step."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mpt_jax.backbones.t5 import fused_mlp
from mpt_jax.plan import chips

PLANS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "plan.json"
WIDTH, INNER = 768, 2048  # T5 1.1 base
ROWS, LENGTH = 4, 356


@pytest.fixture(autouse=True, scope="module")
def as_compiled_outside_tests(optimized):
    """Compiles with optimizations, because the compiler's counts are of optimized programs."""


def both_passes(apply, x, matrices, kept):
    y, pull = jax.vjp(lambda x: apply(x, matrices, kept, ("gelu", "linear")), x)
    return pull(y)[0]


@functools.cache
def compiled(apply, topology: str, drops: bool, length: int = LENGTH):
    pytest.importorskip("libtpu", reason="libtpu, the TPUs' compiler, is not installed")
    chip = jax.sharding.SingleDeviceSharding(chips.devices(topology)[0])
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=chip)  # noqa: E731
    matrices = (shape(WIDTH, INNER), shape(WIDTH, INNER), shape(INNER, WIDTH))
    kept = shape(ROWS, 1, INNER, dtype=jnp.float32) if drops else None
    run = jax.jit(functools.partial(both_passes, apply))
    return run.lower(shape(ROWS, length, WIDTH), matrices, kept).compile()


def assert_has_kernels(program):
    text = program.as_text()
    assert "mlp_forward_kernel" in text and "mlp_backward_kernel" in text


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropout"])
def test_gated_mlp_compiles_for_tpus(topology, drops):
    assert_has_kernels(compiled(fused_mlp.gated_mlp, topology, drops))


@pytest.mark.slow
def test_gated_mlp_compiles_for_rows_of_several_blocks():
    length = 3 * fused_mlp.MOST_POSITIONS + 1
    assert_has_kernels(compiled(fused_mlp.gated_mlp, "v5e:2x2", True, length))


@pytest.mark.slow
def test_gated_mlp_accesses_less_memory_than_plain_operations():
    kernel, plain = (
        compiled(apply, "v5e:2x2", False)
        for apply in (fused_mlp.gated_mlp, fused_mlp.reference_gated_mlp)
    )
    accessed = [x.cost_analysis()["bytes accessed"] for x in (kernel, plain)]
    assert accessed[0] < 0.6 * accessed[1]
    # The kernel stores nothing of the feed-forward width.
    temporaries = kernel.memory_analysis().temp_size_in_bytes
    assert temporaries < 2 * ROWS * LENGTH * INNER


def test_plan_of_gated_t5_base_stays_within_bounds():
    """28 GB, and 0.72 of the compute roofline, for 32 examples on a chip of v5e."""
    plans = json.loads(PLANS.read_text()).values()
    (row,) = [x for x in plans if x["t5"] == "t5_1_1_base" and x["topology"] == "v5e:4x4"]
    needs = row["needs"]
    assert row["rows"] == 32
    assert needs["accessed_bytes"] <= 28e9 and needs["fraction_of_ideal"] >= 0.72
    assert {"mlp_forward_kernel", "mlp_backward_kernel"} <= set(needs["cost"]["kernels"])

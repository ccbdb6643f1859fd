"""Estimated chip hours of a job, against values computed by hand."""

from __future__ import annotations

from unittest import mock

import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.models.model import Model
from mpt_jax.plan import format, hlo, steps
from mpt_jax.training.trainer import Trainer

NAMES = [f"run_{i}" for i in range(8)]


def job(total_steps: int, groups="joint") -> steps.Job:
    model = mock.Mock(spec=Model, runs=Runs(NAMES, groups=groups))
    data = DatasetConfig("task", {"inputs": 4, "targets": 2}, "train", 8, shuffle=False, seed=0)
    return steps.Job(model, data, None, Trainer, (), total_steps=total_steps)


def cost(compute_ms: float, memory_ms: float, step="train", peak=1, parts=None) -> steps.StepCost:
    """A step on four v5e chips: 197 TFLOP/s and 819 GB/s each."""
    moved = {"all-reduce": (1, 1e12)}  # five seconds, which are left out
    counts = hlo.Cost(compute_ms * 197e9, collectives=moved)
    compiler = {"bytes accessed": memory_ms * 819e6}
    layout = steps.MeshLayout("v5e:2x2", 1, parts)
    return steps.StepCost(step, layout, 4, 2.0, 1, 1, peak, counts, compiler, 0.0)


@pytest.mark.parametrize(("compute", "memory"), [(10.0, 20.0), (20.0, 10.0)])
def test_chip_hours_are_chips_times_the_longer_time_times_steps(compute, memory):
    # 4 chips x 0.02 s x 180,000 steps = 14,400 chip seconds.
    assert cost(compute, memory).chip_hours(180_000) == pytest.approx(4.0)


def test_job_costs_line_and_json_of_joint_runs_have_no_share():
    found = [cost(10.0, 20.0), cost(1.0, 1.0, "eval")]
    first, *lines = format.job_costs(found, job(180_000)).splitlines()
    assert first == (
        "Estimated cost of the job, in chip hours. A step takes the larger of ms compute and ms "
        "memory. Left out: data loading, evaluation, compilation, checkpoints, communication."
    )
    assert lines == ["* v5e:2x2, 4 x 1: 4 chips x 20.0 ms x 180,000 steps = 4 chip hours"]
    train, evaluated = format.as_json(found, job(180_000))
    assert train["estimated_chip_hours"] == pytest.approx(4.0)
    assert "estimated_chip_hours_per_run" not in train
    assert "estimated_chip_hours" not in evaluated


def test_job_costs_independent_runs_share_the_cost():
    found, fleet = [cost(10.0, 20.0, parts=2)], job(180_000, "independent")
    (line,) = format.job_costs(found, fleet).splitlines()[1:]
    assert line == (
        "* v5e:2x2, 4 x 1, 2 microbatches: 4 chips x 20.0 ms x 180,000 steps = 4 chip hours, 0.5 "
        "for each of 8 independent runs"
    )
    assert format.as_json(found, fleet)[0]["estimated_chip_hours_per_run"] == pytest.approx(0.5)


def test_job_costs_groups_of_several_runs_have_no_share():
    grouped = job(180_000, [0, 0, 0, 0, 1, 1, 1, 1])
    assert "each of" not in format.job_costs([cost(10.0, 20.0)], grouped)


def test_job_costs_without_a_train_step_that_fits_are_empty():
    rejected = steps.DoesNotFit("train", steps.MeshLayout("v5e:2x2"), 4, "no memory")
    too_large = cost(10.0, 20.0, peak=17 << 30)
    assert not format.job_costs([rejected, too_large, cost(1.0, 1.0, "predict")], job(100))
    assert not format.job_costs([cost(10.0, 20.0)], job(0))


def test_job_costs_large_numbers_have_no_exponent():
    (line,) = format.job_costs([cost(10.0, 20.0)], job(180_000_000)).splitlines()[1:]
    assert line.endswith("= 4,000 chip hours")

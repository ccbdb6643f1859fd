"""CoOp's schedule against numbers of its released logs, and its SGD against NumPy and torch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.schedules import EpochCosine, Schedule

RATE = 0.002


def by_hand(epoch, epochs, peak=RATE, first=1e-5):
    return first if epoch == 0 else peak * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


@pytest.mark.parametrize(("epochs", "length"), [(50, 1), (50, 7), (200, 1369), (10, 3), (1, 4)])
def test_epoch_cosine_changes_at_epochs_only(epochs, length):
    schedule = EpochCosine(RATE, epochs * length, length)
    for epoch in {0, 1, 2, epochs // 2, epochs - 1} & set(range(epochs)):
        steps = jnp.array([epoch * length, epoch * length + length // 2, (epoch + 1) * length - 1])
        found = np.asarray(schedule(steps))
        np.testing.assert_allclose(found, by_hand(epoch, epochs), rtol=2e-5, atol=1e-9)
        assert (found == found[0]).all()


def test_epoch_cosine_released_logs():
    """CoOp's log of 50 epochs ends with 7.885299e-06; 200 epochs start at the full rate."""
    found = EpochCosine(RATE, 50, 1)(jnp.array([0, 1, 49]))
    np.testing.assert_allclose(found, [1e-5, RATE, 7.885299e-06], rtol=2e-5)
    found = EpochCosine(RATE, 200 * 11, 11)(jnp.array([10, 11]))
    np.testing.assert_allclose(found, [1e-5, RATE], rtol=1e-6)


def test_epoch_cosine_incomplete_last_epoch_counts():
    """25 steps of 10 are three epochs."""
    found = EpochCosine(RATE, 25, 10)(jnp.asarray(24))
    np.testing.assert_allclose(found, by_hand(2, 3), rtol=1e-6)


def test_epoch_cosine_all_epoch_starts_are_exact(optimized):
    """No step falls into the epoch before by rounding, also where XLA multiplies by the reciprocal
    of a constant."""
    for length in (3, 7, 41, 47, 55, 342, 1369):
        schedule = jax.jit(EpochCosine(RATE, 200 * length, length))
        starts = jnp.arange(1, 200) * length
        first, before = schedule(starts), schedule(starts - 1)
        expected = np.array([by_hand(epoch, 200) for epoch in range(200)])
        np.testing.assert_allclose(first, expected[1:], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(before, expected[:-1], rtol=1e-4, atol=1e-9)


def test_epoch_cosine_per_group():
    schedule = EpochCosine([0.1, 0.2], [12, 30], [3, 5], [1e-3, 1e-4])
    for step in (0, 2, 3, 4, 5, 11):
        found = schedule(jnp.full(2, step), jnp.arange(2))
        expected = [
            by_hand(step // 3, 4, 0.1, 1e-3),
            by_hand(step // 5, 6, 0.2, 1e-4),
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [0, -1, [3, 0]])
def test_epoch_cosine_without_steps_in_an_epoch_fails(length):
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1.*STEPS_PER_EPOCH"):
        EpochCosine(RATE, 10, length)


# --- SGD -----------------------------------------------------------------------------------------

STEPS = 50
RNG = np.random.default_rng(0)
# Three rows of a quadratic 0.5 (p - c)' A (p - c).
ROOT = RNG.normal(size=(3, 5, 5))
MATRIX = ROOT @ ROOT.transpose(0, 2, 1) / 5 + 0.1 * np.eye(5)
CENTER, START = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 5))


def gradient(values):
    return np.einsum("kij,kj->ki", MATRIX, np.asarray(values, np.float64) - CENTER)


def trained(schedule, momentum, decay, present=lambda step: [True] * 3):
    """All values after each step of an optimizer of three runs."""
    runs = Runs(["a", "b", "c"], groups="independent")
    optimizer = PromptOptimizer(
        {"task": schedule},
        weight_decay=0.0,
        clip_norm=None,
        absent_tasks="hold",
        rule=functools.partial(sgd, momentum, decay),
    ).bind(((".*", "task"),), runs, {"prompt/table": "tasks"})
    params = {"prompt": {"table": jnp.asarray(START, jnp.float32)}}
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(STEPS):
        values = params["prompt"]["table"]
        grads = gradient(values) * np.array(present(step))[:, None]
        updates, state = update(
            {"prompt": {"table": jnp.asarray(grads, jnp.float32)}}, state, params
        )
        params = jax.tree.map(jnp.add, params, updates)
        found.append(np.asarray(params["prompt"]["table"]))
    return found


def numpy_sgd(rates, momentum, decay, present=lambda step: [True] * 3):
    """Decay is added to the gradient, before a momentum without dampening. A row that is absent
    does not change, and its schedule waits."""
    values, speed, taken, found = START.copy(), np.zeros_like(START), [0] * 3, []
    for step in range(STEPS):
        grads = gradient(values) + decay * values
        for row in range(3):
            if present(step)[row]:
                speed[row] = momentum * speed[row] + grads[row]
                values[row] -= rates(taken[row], row) * speed[row]
                taken[row] += 1
        found.append(values.copy())
    return found


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.05), (0.0, 0.0), (0.9, 0.0), (0.5, 0.3)])
def test_sgd_matches_numpy(momentum, decay):
    found = trained(Schedule(0.05, decay="constant"), momentum, decay)
    expected = numpy_sgd(lambda *_: 0.05, momentum, decay)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_sgd_rows_with_their_schedules_wait_while_absent():
    present = lambda step: [True, step % 3 != 1, step > 20]  # noqa: E731
    lengths, totals = [2, 5, 3], [50, 40, 30]
    found = trained(EpochCosine(0.1, totals, lengths, 0.01), 0.9, 0.05, present)

    def rates(step, row):
        return by_hand(step // lengths[row], totals[row] / lengths[row], 0.1, 0.01)

    expected = numpy_sgd(rates, 0.9, 0.05, present)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parity
def test_sgd_matches_torch():
    import torch

    values = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=1.0, momentum=0.9, weight_decay=5e-4)
    # CoOp's: a constant rate in the first epoch, then torch's cosine, one step per epoch.
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, rates = cosine(base, 25), [0.01]
    for _ in range(24):
        rates.append(base.param_groups[0]["lr"])
        base.step()
        scheduler.step()
    found = trained(EpochCosine(0.1, 50, 2, 0.01), 0.9, 5e-4)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rates[step // 2]
        values.grad = torch.tensor(gradient(values.detach().numpy()))
        optimizer.step()
        np.testing.assert_allclose(found[step], values.detach().numpy(), rtol=1e-6, atol=1e-6)

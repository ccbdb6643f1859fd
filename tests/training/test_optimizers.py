"""Optimizer by rows against a NumPy AdamW of separate rows; schedules; clipping by group."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.base import row_axes
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.optimizers import PromptOptimizer, adafactor
from mpt_jax.training.row_transforms import clip_by_group_norm, gradient_norms, row_groups
from mpt_jax.training.schedules import Schedule

LABELS = ((r"prompt/shared", "shared"), (r"prompt/.*", "task"), (r"backbone/.*", "backbone"))
ROWS = {"prompt/shared": "groups", "prompt/task_left": "tasks", "prompt/task_right": "tasks"}
P, H, R = 3, 4, 2
RUNS = Runs(["a", "b", "c", "d"], groups=[0, 1, 0, 2])
STEPS = 12
DECAY = 0.1  # large, so that its effect on absent rows is visible
# Optax's bias correction 1 - b2^t, in float32, is off by 1.3e-5 relative in the first steps; a
# dozen steps of length 0.4 add that up.
ATOL = 5e-5


def random_tree(seed: int, runs: Runs = RUNS) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {
        "shared": (runs.num_groups, P, H),
        "task_left": (runs.num_rows, P, R),
        "task_right": (runs.num_rows, R, H),
    }
    return {"prompt": {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}}


def gradients(present: list[set[int]], runs: Runs = RUNS) -> list[dict]:
    """Returns one random gradient per step, zero at rows of absent tasks and groups."""
    made = []
    for step, rows in enumerate(present):
        grads = random_tree(100 + step, runs)["prompt"]
        groups = {runs.group_of_row[row] for row in rows}
        for k in range(runs.num_rows):
            if k not in rows:
                grads["task_left"][k] = grads["task_right"][k] = 0
        for g in range(runs.num_groups):
            if g not in groups:
                grads["shared"][g] = 0
        made.append({"prompt": grads})
    return made


# Task 1 is present late and rarely, task 3 never, task 2 sometimes.
PRESENT = [{0}, {0, 2}, {0}, {1, 2}] * 2 + [{0}, {2}, {0, 2}, {0}]


class NumpyAdamW:
    """Each row of each parameter has its own moments and step count; float64. `rates` are the
    learning rate of each parameter: (step, group) -> number."""

    def __init__(self, tree: dict, runs: Runs, hold: bool, clip, rates: dict):
        self.values = {k: v.astype(np.float64) for k, v in tree["prompt"].items()}
        self.runs, self.hold, self.clip, self.rates = runs, hold, clip, rates
        self.first = {k: np.zeros_like(v) for k, v in self.values.items()}
        self.second = {k: np.zeros_like(v) for k, v in self.values.items()}
        self.steps = {k: np.zeros(len(v), int) for k, v in self.values.items()}

    def group(self, name: str, row: int) -> int:
        return row if name == "shared" else self.runs.group_of_row[row]

    def step(self, grads: dict) -> None:
        grads = {k: v.astype(np.float64) for k, v in grads["prompt"].items()}
        squares = np.zeros(self.runs.num_groups)
        for name, grad in grads.items():
            for row in range(len(grad)):
                squares[self.group(name, row)] += np.sum(grad[row] ** 2)
        for name, counts in self.steps.items():
            for row in range(len(counts)):
                group = self.group(name, row)
                if self.hold and not grads[name][row].any():
                    continue
                counts[row] += 1
                shrink = 1.0
                if self.clip is not None and math.sqrt(squares[group]) > self.clip[group]:
                    shrink = self.clip[group] / math.sqrt(squares[group])
                rate = self.rates[name](counts[row] - 1, group)
                self.update(name, row, shrink * grads[name][row], counts[row], rate)

    def update(self, name: str, row: int, grad, count: int, rate: float) -> None:
        m, v, value = self.first[name], self.second[name], self.values[name]
        m[row] = 0.9 * m[row] + 0.1 * grad
        v[row] = 0.999 * v[row] + 0.001 * grad**2
        adam = (m[row] / (1 - 0.9**count)) / (np.sqrt(v[row] / (1 - 0.999**count)) + 1e-8)
        value[row] = value[row] - rate * (adam + DECAY * value[row])


def run(optimizer: PromptOptimizer, tree: dict, grads: list[dict]) -> tuple[dict, object]:
    """Returns the parameters after one step per gradient, and the last state."""
    state = optimizer.init(jax.tree.map(jnp.asarray, tree))

    @jax.jit
    def step(grads, state, tree):
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    tree = jax.tree.map(jnp.asarray, tree)
    for grad in grads:
        tree, state = step(grad, state, tree)
    return tree["prompt"], state


def constant(peak) -> Schedule:
    return Schedule(peak, decay="constant")


# A label only selects a learning rate: rows follow the method's axes with every table.
TABLES = {
    "the methods'": LABELS,
    "one for each": tuple(
        (f"prompt/{name}", name) for name in ("shared", "task_left", "task_right")
    ),
    "one for all": (("prompt/.*", "all"),),
}


CLIPS = {"unclipped": None, "clipped": [0.5, 100.0, 2.0]}
# Each value with each value of another setting; the rest of the product is slow.
PAIRS = {
    ("dense", "unclipped", "the methods'"),
    ("dense", "clipped", "one for each"),
    ("hold", "clipped", "the methods'"),
    ("hold", "unclipped", "one for each"),
    ("hold", "clipped", "one for all"),
    ("dense", "unclipped", "one for all"),
}


@pytest.mark.parametrize(
    ("absent", "clip", "table"),
    [
        pytest.param(
            absent,
            CLIPS[clip],
            table,
            id=f"{absent}-{clip}-{table}",
            marks=[] if (absent, clip, table) in PAIRS else pytest.mark.slow,
        )
        for absent in ("dense", "hold")
        for clip in CLIPS
        for table in TABLES
    ],
)
def test_prompt_optimizer_adamw_by_rows_matches_separate_rows(absent, clip, table):
    def linear(step, group):
        ramp = min(1.0, step / 3)
        return [0.4, 0.1, 0.2][group] * ramp * min(1.0, (20 - step) / (20 - 3))

    ours, theirs = Schedule([0.4, 0.1, 0.2], 20, 3), linear
    schedules = {
        "the methods'": {"shared": (constant(0.3), lambda *_: 0.3), "task": (ours, theirs)},
        "one for each": {
            "shared": (constant(0.3), lambda *_: 0.3),
            "task_left": (ours, theirs),
            "task_right": (constant(0.2), lambda *_: 0.2),
        },
        "one for all": {"all": (ours, theirs)},
    }[table]
    optimizer = PromptOptimizer(
        {label: schedule for label, (schedule, _) in schedules.items()},
        weight_decay=DECAY,
        clip_norm=clip,
        absent_tasks=absent,
    ).bind(TABLES[table], RUNS, ROWS)
    label_of = {
        name: next(label for rule, label in TABLES[table] if re.fullmatch(rule, f"prompt/{name}"))
        for name in ("shared", "task_left", "task_right")
    }
    tree = random_tree(0)
    rates = {name: schedules[label][1] for name, label in label_of.items()}
    oracle = NumpyAdamW(tree, RUNS, absent == "hold", clip, rates)
    for step, grads in enumerate(gradients(PRESENT), start=1):
        oracle.step(grads)
        if step in (1, STEPS):
            found, state = run(optimizer, tree, gradients(PRESENT)[:step])
            for name, expected in oracle.values.items():
                np.testing.assert_allclose(found[name], expected, atol=ATOL, err_msg=name)
    moments = flatten(state)
    for name in tree["prompt"]:
        for moment, expected in (("mu", oracle.first), ("nu", oracle.second)):
            (key,) = [k for k in moments if k.endswith(f"{moment}/prompt/{name}")]
            np.testing.assert_allclose(moments[key], expected[name], atol=1e-6, err_msg=key)


def test_row_axes_derived_from_method_axes():
    assert row_axes(MPT(P)) == ROWS
    assert row_axes(PromptTuning(P)) == {"prompt/table": "tasks"}

    class Odd(PromptTuning):
        axes = {"scale": ("tasks",), "bias": ("embed",), "number": ()}

    assert row_axes(Odd(P)) == {"prompt/scale": "tasks"}
    assert row_groups("prompt/shared", ROWS, RUNS) == (0, 1, 2)
    assert row_groups("prompt/task_left", ROWS, RUNS) == (0, 1, 0, 2)
    assert row_groups("encoder/bias", ROWS, Runs(["a", "b"])) is None


def test_absent_tasks_dense_decays_and_hold_keeps_absent_rows():
    tree, grads = random_tree(0), gradients(PRESENT)
    found = {}
    for absent in ("dense", "hold"):
        optimizer = PromptOptimizer(
            {"shared": constant(0.3), "task": constant(0.3)},
            weight_decay=DECAY,
            absent_tasks=absent,
        )
        found[absent], _ = run(optimizer.bind(LABELS, RUNS, ROWS), tree, grads)
    never, before = 3, tree["prompt"]
    shrunk = (1 - 0.3 * DECAY) ** STEPS
    for name, row in (("task_left", never), ("task_right", never), ("shared", 2)):
        np.testing.assert_array_equal(found["hold"][name][row], before[name][row])
        np.testing.assert_allclose(found["dense"][name][row], shrunk * before[name][row], rtol=1e-5)


@pytest.mark.parity
def test_absent_tasks_dense_matches_torch_adamw():
    import torch

    tree, grads = random_tree(0), gradients(PRESENT)
    rates = {"shared": constant(0.3), "task": constant(0.4)}
    optimizer = PromptOptimizer(rates, weight_decay=DECAY, clip_norm=None).bind(LABELS, RUNS, ROWS)
    found, _ = run(optimizer, tree, grads)
    leaves = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in tree["prompt"].items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [leaves["shared"]], "lr": 0.3},
            {"params": [leaves["task_left"], leaves["task_right"]], "lr": 0.4},
        ],
        weight_decay=DECAY,
    )
    for grad in grads:
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(grad["prompt"][name])
        theirs.step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found[name], leaf.detach().numpy(), atol=ATOL, err_msg=name)


# --- Clipping ------------------------------------------------------------------------------------


def test_clip_by_group_norm_scales_each_group_by_its_own_norm():
    grads = random_tree(1)
    leaves = {name: leaf.astype(np.float64) for name, leaf in grads["prompt"].items()}
    expected = []
    for group in range(RUNS.num_groups):
        rows = [row for row, found in enumerate(RUNS.group_of_row) if found == group]
        parts = [leaves["shared"][group], leaves["task_left"][rows], leaves["task_right"][rows]]
        expected.append(math.sqrt(sum(np.sum(part**2) for part in parts)))
    grads = jax.tree.map(jnp.asarray, grads)
    np.testing.assert_allclose(gradient_norms(grads, ROWS, RUNS), expected, rtol=1e-5)
    limits = [expected[0] / 2, expected[1] * 2, expected[2]]
    clip = clip_by_group_norm(limits, ROWS, RUNS)
    clipped, _ = clip.update(grads, clip.init(grads))
    for name, leaf in clipped["prompt"].items():
        for row, value in enumerate(leaf):
            group = row if name == "shared" else RUNS.group_of_row[row]
            factor = 0.5 if group == 0 else 1.0
            np.testing.assert_allclose(value, factor * leaves[name][row], rtol=1e-5)


def test_clip_by_group_norm_nan_gradient_stays_in_its_group():
    grads = random_tree(1)
    grads["prompt"]["task_left"][1] = np.nan
    grads = jax.tree.map(jnp.asarray, grads)
    clip = clip_by_group_norm(0.1, ROWS, RUNS)
    clipped, _ = clip.update(grads, clip.init(grads))
    assert np.isfinite(clipped["prompt"]["shared"][np.array([0, 2])]).all()
    assert np.isfinite(clipped["prompt"]["task_left"][np.array([0, 2, 3])]).all()


# --- Schedules -----------------------------------------------------------------------------------


def expected_rate(decay: str, step: float, peak: float, warmup: float, total: float) -> float:
    if step < warmup:
        return peak * step / warmup
    if decay == "constant":
        return peak
    if decay == "rsqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step, warmup, 1))
    done = min(1.0, (step - warmup) / (total - warmup))
    return peak * (1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant", "rsqrt"])
def test_schedule_decays_match_formula(decay, warmup):
    schedule = Schedule(0.3, 100, warmup, decay=decay)
    steps = np.array([0, 1, 5, 9, 10, 11, 50, 99, 100, 130])
    expected = [expected_rate(decay, step, 0.3, warmup, 100) for step in steps]
    np.testing.assert_allclose(schedule(jnp.asarray(steps)), expected, atol=1e-6)


def test_schedule_warmup_fraction_matches_warmup_steps():
    by_steps, by_fraction = Schedule(0.3, 200, 20), Schedule(0.3, 200, warmup_fraction=0.1)
    steps = jnp.arange(0, 210, 7)
    np.testing.assert_allclose(by_fraction(steps), by_steps(steps), atol=1e-7)


def test_schedule_values_per_group_match_formula():
    schedule = Schedule([0.1, 0.2, 0.3], [50, 100, 150], [0, 10, 20])
    steps, groups = jnp.array([30, 30, 30, 5]), jnp.array([0, 1, 2, 1])
    expected = [
        expected_rate("linear", 30, 0.1, 0, 50),
        expected_rate("linear", 30, 0.2, 10, 100),
        expected_rate("linear", 30, 0.3, 20, 150),
        expected_rate("linear", 5, 0.2, 10, 100),
    ]
    np.testing.assert_allclose(schedule(steps, groups), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"decay": "exponential"}, "'exponential'"),
        ({"decay": "linear"}, "needs total_steps"),
        ({"decay": "constant", "warmup_fraction": 0.1}, "needs total_steps"),
        (
            {"total_steps": 9, "warmup_steps": 1, "warmup_fraction": 0.1},
            "both set the length",
        ),
    ],
)
def test_schedule_invalid_arguments_error(arguments, says):
    with pytest.raises(ValueError, match=says):
        Schedule(0.3, **arguments)


# --- Errors --------------------------------------------------------------------------------------


def test_prompt_optimizer_label_without_learning_rate_error():
    optimizer = PromptOptimizer({"shared": constant(0.3)}).bind(LABELS, RUNS, ROWS)
    with pytest.raises(ValueError, match="labels task: .*learning_rates has shared"):
        optimizer.init(random_tree(0))


def test_prompt_optimizer_parameter_without_label_error():
    optimizer = PromptOptimizer({"shared": constant(0.3)}).bind(LABELS[:1], RUNS, ROWS)
    with pytest.raises(ValueError, match="prompt/task_left"):
        optimizer.init(random_tree(0))


def test_prompt_optimizer_wrong_number_of_group_settings_error():
    rates = {"shared": constant([0.1, 0.2]), "task": constant(0.3)}
    with pytest.raises(ValueError, match=r"'shared'\]\.peak has 2 entries.*3 groups"):
        PromptOptimizer(rates).bind(LABELS, RUNS, ROWS)
    with pytest.raises(ValueError, match="clip_norm has 4 entries.*3 groups"):
        PromptOptimizer({}, clip_norm=[1.0] * 4).bind(LABELS, RUNS, ROWS)


def test_prompt_optimizer_parameter_shared_by_groups_error():
    rates = {label: constant(0.1) for label in ("shared", "task", "backbone")}
    optimizer = PromptOptimizer(rates).bind(LABELS, RUNS, ROWS)
    tree = jax.tree.map(jnp.asarray, {**random_tree(0), "backbone": {"w": np.ones(3)}})
    with pytest.raises(ValueError, match="'backbone/w' is shared.*so 3 independent"):
        optimizer.init(tree)


def test_prompt_optimizer_unbound_or_unknown_policy_error():
    with pytest.raises(ValueError, match="bind"):
        PromptOptimizer({"shared": constant(0.1)}).init(random_tree(0))
    with pytest.raises(ValueError, match="'dense' or 'hold', got 'skip'"):
        PromptOptimizer({}, absent_tasks="skip")


def test_adafactor_by_rows_matches_optax_on_separate_rows():
    tree, grads = random_tree(0), gradients([{0, 1, 2, 3}] * 4)
    rate = 0.3
    optimizer = PromptOptimizer(
        {"shared": constant(rate), "task": constant(rate)},
        weight_decay=0.0,
        clip_norm=None,
        rule=adafactor,
    ).bind(LABELS, RUNS, ROWS)
    found, _ = run(optimizer, tree, grads)
    peer = optax.adafactor(
        rate, multiply_by_parameter_scale=False, clipping_threshold=1.0, factored=False
    )
    for name, leaf in tree["prompt"].items():
        for row in range(len(leaf)):
            value = jnp.asarray(leaf[row])
            state = peer.init(value)
            for grad in grads:
                update, state = peer.update(jnp.asarray(grad["prompt"][name][row]), state, value)
                value = value + update
            np.testing.assert_allclose(found[name][row], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [ROWS, {}])
def test_adafactor_weight_decay_does_not_depend_on_rate(rows):
    """As in T5X: (1 - decay) p, minus the update."""
    tree, grads, rate, decay = random_tree(0), gradients([{0, 1, 2, 3}]), 0.3, 0.01
    found, plain = (
        run(
            PromptOptimizer(
                {"shared": constant(rate), "task": constant(rate)},
                weight_decay=each,
                weight_decay_times_rate=False,
                clip_norm=None,
                rule=adafactor,
            ).bind(LABELS, RUNS if rows else Runs(["a"]), rows),
            tree,
            grads,
        )[0]
        for each in (decay, 0.0)
    )
    for name, leaf in tree["prompt"].items():
        np.testing.assert_allclose(found[name], plain[name] - decay * leaf, rtol=1e-5, atol=1e-6)
        assert not np.allclose(found[name], plain[name] - rate * decay * leaf, atol=1e-4)


def test_adafactor_idle_values_decay_as_in_t5x():
    """After 30,000 steps, 0.741 of an idle value is left: (1 - 1e-5)^30000."""
    optimizer = PromptOptimizer(
        {"shared": constant(0.3), "task": constant(0.3)},
        weight_decay_times_rate=False,
        rule=adafactor,
    ).bind(LABELS, RUNS, ROWS)
    tree = jax.tree.map(jnp.ones_like, random_tree(0))
    state, zeros = optimizer.init(tree), jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(zeros, state, tree)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -1e-5, rtol=1e-6)
    assert (1 - 1e-5) ** 30_000 == pytest.approx(0.741, abs=1e-3)


def test_prompt_optimizer_adam_settings_with_other_rule_error():
    with pytest.raises(ValueError, match="b1 = 0.5 would have no effect.*default, 0.9,"):
        PromptOptimizer({}, rule=adafactor, b1=0.5)


def test_prompt_optimizer_defaults():
    optimizer = PromptOptimizer({})
    assert (optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 1.0)
    assert optimizer.absent_tasks == "dense"
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)

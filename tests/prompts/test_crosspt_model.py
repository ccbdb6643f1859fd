"""Tests of CrossPT in the model: packing, fleets, the clock, artifacts."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.batching import collate
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, merge, split
from mpt_jax.models import losses
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.training import train_step, trainer
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.state import trainable_labels
from tests.fixtures import tiny
from tests.fixtures.prompt_methods import KEY, crosspt

MIXES = {
    "drawn": {},
    "drawn, learned share": {"share": "learned", "top_k": 2, "normalize": "sum"},
    "drawn for runs": {"draws": "run", "share": "joint"},
    "pieces": {"compose_by": "cat", "top_k": 2, "router": "sigmoid"},
    "by text": {"router": "attention", "compose_by": "private_product"},
    "layers": {"reparameterize": ("sources", "private"), "router": "softmax"},
    "longer": {
        "compose_by": "private_cat",
        "private_length": {"alpha": 2, "beta": 4, "gamma": 1},
        "share": "add",
    },
}
TEXTS = [(2, 3), (0, 5), (1, 4), (0, 2), (1, 5)]  # bank row, tokens


class Mixed:
    """A model of some bank with random parameters and texts of several tasks."""

    def __init__(self, settings, groups=(1, 0, 1), names=tiny.RUNS.task_names, params=None):
        self.settings, self.method = settings, crosspt(tiny.PROMPT, **settings)
        self.runs = Runs(names, groups=groups)
        self.model = tiny.model(self.runs, self.method)
        self.params = params or self._params()
        self.lengths = self.method.prompt_lengths(self.runs)
        self.trainable, self.frozen = split(
            self.params, self.model.labels, trainable_labels(self.model, self.params)
        )
        self.forward = jax.jit(self.model.forward)
        self.logits = jax.jit(self.model.logits)
        self.losses = jax.jit(jax.value_and_grad(self._total))

    def _params(self):
        params = tiny.params(self.model)
        prompt = {
            # An MLP is as wide as the backbone; scale it so that its output keeps the scale.
            name: leaf / tiny.WIDTH**0.5 if "kernel" in name else leaf
            for name, leaf in params["prompt"].items()
        }
        if "clock" in prompt:
            prompt["clock"] = jnp.arange(self.runs.num_groups, dtype=prompt["clock"].dtype) * 40
        return {**params, "prompt": prompt}

    def _total(self, trainable, frozen, batch, key):
        sums, _ = self.model.loss_sums(merge(trainable, frozen), batch, key)
        weights = self.model.loss_normalizers(batch)
        return losses.total_loss(self.model.objective, sums, weights)[0]

    def loss(self, batch, key=None):
        """Returns the loss and the gradients of trainable parameters."""
        return self.losses(self.trainable, self.frozen, batch, key)

    def examples(self, rows=None) -> list[collate.Example]:
        """Returns the examples of `TEXTS`, or those of one row as row 0 of its own bank."""
        rng = np.random.default_rng(0)
        made = []
        for row, size in TEXTS:
            words = rng.integers(2, tiny.VOCABULARY, size)
            answer = [*rng.integers(2, tiny.VOCABULARY, 1 + size % 3), tiny.EOS]
            if rows is None or row == rows:
                made.append(collate.Example(words, answer, 0 if rows is not None else row))
        return made

    def unpacked(self, rows=None):
        return collate.unpacked(self.examples(rows), self.lengths, tiny.TEXT, tiny.TARGET)

    def packed(self):
        row = {"inputs": 2 * (max(self.lengths) + tiny.TEXT), "targets": 3 * tiny.TARGET}
        return collate.packed(self.examples(), self.lengths, row)


@functools.cache
def mixed_of(name: str) -> Mixed:
    """Caches models over tests, so that each program is compiled once."""
    return Mixed(MIXES[name])


@pytest.fixture(scope="module", params=list(MIXES))
def mixed(request) -> Mixed:
    return mixed_of(request.param)


@pytest.fixture(scope="module", params=list(MIXES))
def apart(request) -> Mixed:
    return Mixed(MIXES[request.param], groups="independent")


FAST = {("drawn", 0), ("longer", 2)}


def some(*fast: str):
    """Returns parameters of the fixture `mixed`: all mixes; those not in `fast` are slow."""
    marks = {name: [] if name in fast else [pytest.mark.slow] for name in MIXES}
    return [pytest.param(name, marks=marks[name]) for name in MIXES]


@pytest.mark.parametrize(
    ("mixed", "key"),
    [
        pytest.param(*mix.values, key, marks=mix.marks, id=f"{mix.values[0]}-{name}")
        for name, key, mixes in (
            ("deterministic", None, some("pieces", "by text", "longer")),
            ("training", KEY, some("drawn for runs")),
        )
        for mix in mixes
        # Packing reorders examples, so draws of each example differ.
        if key is None or mix.values[0] == "drawn for runs"
    ],
    indirect=["mixed"],
)
def test_crosspt_packed_equals_unpacked(mixed, key):
    packed = mixed.packed()
    assert len(packed["encoder_task_ids"]) < len(TEXTS)
    tiny.close(mixed.loss(packed, key), mixed.loss(mixed.unpacked(), key), 1e-5)


def test_crosspt_gradients_nonzero_except_clock(mixed):
    _, grads = mixed.loss(mixed.unpacked())
    for name, grad in flatten(grads).items():
        assert (np.abs(grad).max() > 0) == (name != "prompt/clock"), name


def test_crosspt_text_follows_prompt_of_its_run():
    """A run's short prompt in a bank of longer ones takes only its own length."""
    mixed = mixed_of("longer")
    batch = mixed.unpacked()
    for example, (row, size) in enumerate(TEXTS):
        length = tiny.PROMPT + (2, 4, 1)[row]
        slots = batch["encoder_prompt_slots"][example]
        assert slots[:length].tolist() == list(range(1, length + 1)) and not slots[length:].any()
        words = batch["encoder_input_tokens"][example]
        assert words[length : length + size].all() and not words[length + size :].any()


@pytest.mark.parametrize(
    ("apart", "row"),
    [
        # test_crosspt.py checks the composed prompts against the formula.
        pytest.param(name, row, marks=[] if (name, row) in FAST else pytest.mark.slow)
        for name in MIXES
        for row in (0, 2)
    ],
    indirect=["apart"],
)
def test_crosspt_fleet_matches_each_run_alone(apart, row):
    fleet, run = apart, tiny.RUNS.task_names[row]
    batch, key = fleet.unpacked(), KEY if fleet.method.is_random else None
    settings = dict(fleet.settings)
    params = {leaf: value[row : row + 1] for leaf, value in fleet.params["prompt"].items()}
    own = settings.get("private_length", {}).get(run)
    if own:
        settings["private_length"] = {run: own}
        params["private"] = params["private"][:, :own]
    params = {**fleet.params, "prompt": params}
    alone = Mixed(settings, groups="joint", names=[run], params=params)
    mine, members = alone.unpacked(row), [at for at, (of, _) in enumerate(TEXTS) if of == row]
    prompts = np.asarray(fleet.forward(fleet.params, batch, key).prompts)
    found = np.asarray(alone.forward(params, mine, key).prompts)
    length = alone.lengths[0]
    np.testing.assert_allclose(found[:, :length], prompts[members, :length], 1e-6, 1e-6)
    grads = fleet.loss(batch, key)[1]["prompt"]
    expected = {leaf: grad[row : row + 1] for leaf, grad in grads.items()}
    if own:
        assert not np.any(expected["private"][:, own:]), "rows beyond the run's own length"
        expected["private"] = expected["private"][:, :own]
    tiny.close(expected, alone.loss(mine, key)[1]["prompt"], 1e-6)


@pytest.mark.parametrize("name", ["drawn", pytest.param("longer", marks=pytest.mark.slow)])
def test_crosspt_microbatches_share_draws_of_step(name):
    mixed = mixed_of(name)
    batch = tiny.pick(mixed.unpacked(), [0, 1, 2, 3])
    found = [
        jax.jit(
            lambda p, f, b, parts=parts: train_step.gradients(mixed.model, p, f, b, KEY, parts)[0]
        )(mixed.trainable, mixed.frozen, batch)
        for parts in (1, 2)
    ]
    tiny.close(found[1], found[0], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["joint", "independent"])
def test_crosspt_clock_counts_steps(groups):
    """Learning rates, weight decay and clipping do not affect the clock."""
    runs = Runs(tiny.RUNS.task_names, groups=groups)
    schedule = Schedule(0.3, 40, warmup_steps=5)
    rates = {label: schedule for label in ("source", "private", "router")}
    method = crosspt(tiny.PROMPT, annealing=Annealing(5.0, 0.001, 20))
    model = tiny.model(
        runs, method, optimizer_def=PromptOptimizer(rates, weight_decay=0.1, clip_norm=0.1)
    )
    params = tiny.params(model)
    start = model.init_prompt(KEY, params["token_embedder"]["embedding"])
    state = tiny.state(model, {**params, "prompt": start})
    made = trainer.Trainer(model, state, PjitPartitioner(), KEY)
    for step in range(1, 4):
        made.train(tiny.batch([0, 1, 2, 1], seed=step))
        clock = made.state.trainable["prompt"]["clock"]
        np.testing.assert_array_equal(clock, [step] * runs.num_groups)
    made.read_metrics()
    assert not np.array_equal(made.state.trainable["prompt"]["sources"], start["sources"])


@pytest.mark.parametrize("router", ["attention", pytest.param("uniform", marks=pytest.mark.slow)])
def test_trainer_labels_sorted_unlike_parameters_trains(router):
    """With attention to the text, the label 'router' comes before 'private'."""
    model = tiny.model(tiny.RUNS, crosspt(tiny.PROMPT, router=router))
    state = tiny.state(model, tiny.params(model))
    made = trainer.Trainer(model, state, PjitPartitioner(), KEY)
    for step in range(2):
        made.train(tiny.batch([0, 1, 2, 1], seed=step))
    assert made.read_metrics()["loss"] > 0 and int(made.state.step) == 2


@pytest.mark.parametrize("mixed", some("drawn, learned share", "layers", "longer"), indirect=True)
def test_crosspt_artifact_same_logits(mixed, tmp_path):
    method, params = mixed.method.for_inference(mixed.params["prompt"])
    read = tiny.read_back(tmp_path / "artifact", method, params, mixed.runs)
    again = tiny.model(read.runs, read.method)
    found = jax.jit(again.logits)({**mixed.params, "prompt": read.params}, mixed.unpacked())
    before = mixed.logits(mixed.params, mixed.unpacked())
    np.testing.assert_allclose(found, before, 1e-5, 1e-5)


def test_crosspt_mixes_have_different_losses():
    """The settings that the tests above compare have an effect."""
    made = [mixed_of(name) for name in MIXES]
    totals = [float(mixed.loss(mixed.unpacked())[0]) for mixed in made]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(totals, 2))

"""The train step: trainable and frozen parameters, microbatches, groups, non-finite values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, merge, split
from mpt_jax.models import encoder_decoder
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts import get_method
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training import train_step, trainer
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from tests.fixtures import tiny

KEY = jax.random.PRNGKey(0)
GROUPED = Runs(tiny.RUNS.task_names, groups=[1, 0, 1])
BATCH = tiny.batch([0, 1, None, 2, 1, 0, 2, 0], seed=2)


def make_trainer(model, num_microbatches=None, seed=0) -> trainer.Trainer:
    state = tiny.state(model, tiny.params(model, seed))
    return trainer.Trainer(model, state, PjitPartitioner(), KEY, num_microbatches)


def bytes_of(tree) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in flatten(tree).items()}


# --- Trainable parameters ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled() -> trainer.Trainer:
    """A trainer after three steps."""
    objective = Objective(distillation=Distillation())
    made = make_trainer(tiny.model(GROUPED, objective=objective))
    made.before = {part: bytes_of(getattr(made.state, part)) for part in ("trainable", "frozen")}
    for seed in range(3):
        made.train(tiny.batch([0, 1, 2, 2], seed=seed))
    return made


def test_trainer_prompt_changes_and_frozen_params_stay_identical(distilled):
    assert bytes_of(distilled.state.frozen) == distilled.before["frozen"]
    names = set(distilled.before["frozen"])
    assert {"teacher/table", "token_embedder/embedding", "encoder/encoder_norm/scale"} <= names
    after = bytes_of(distilled.state.trainable)
    assert set(after) == {"prompt/shared", "prompt/task_left", "prompt/task_right"}
    assert all(after[name] != distilled.before["trainable"][name] for name in after)
    assert int(distilled.state.step) == distilled.step == 3


def test_read_metrics_returns_every_run_and_term_once(distilled):
    found = distilled.read_metrics()
    assert distilled.read_metrics() == {}
    expected = {"loss", "token_accuracy", "gradient_norm", "learning_rate/shared"}
    expected |= {
        f"{name}/{run}" for name in ("loss", "token_accuracy") for run in GROUPED.run_names
    }
    expected |= {f"term/{t}" for t in ("cross_entropy", "kl", "hidden_encoder", "hidden_decoder")}
    expected |= {"term/kl/beta", "term/kl/group_1", "learning_rate/task"}
    assert expected <= set(found)
    assert found["learning_rate/task"] == pytest.approx(0.3)
    assert all(np.isfinite(value) for value in found.values())


def shapes_made_by(function, *arguments) -> set[tuple[int, ...]]:
    """Returns the shapes of everything a traced function computes, including inner functions."""
    found: set[tuple[int, ...]] = set()

    def walk(jaxpr) -> None:
        for equation in jaxpr.eqns:
            inner = [
                x for x in jax.tree.leaves(list(equation.params.values())) if hasattr(x, "eqns")
            ]
            inner += [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
            for part in inner:
                walk(part)
            found.update(out.aval.shape for out in equation.outvars)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


# Widths that no product of the batch's sizes can equal by chance.
ODD = tiny.config(vocab_size=61, emb_dim=22, mlp_dim=58, head_dim=17)


@pytest.mark.parametrize("labels", [encoder_decoder.PROMPT_ONLY, encoder_decoder.FULL_FINETUNING])
def test_train_step_frozen_backbone_has_no_gradient_or_moment(labels):
    full = labels == encoder_decoder.FULL_FINETUNING
    method = get_method("none")() if full else MPT(tiny.PROMPT)
    runs = Runs(["alpha"])
    model = tiny.model(runs, method, ODD, labels=labels)
    state = tiny.state(model, tiny.params(model))
    batch = tiny.batch([0, 0], prompt_length=method.prompt_length)
    step = functools.partial(train_step.train_step, model, 1)
    made = shapes_made_by(step, state, tiny.arrays(batch), KEY)
    kernels = {(22, 58), (58, 22), (22, 34), (34, 22)}
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    if full:
        # Control: if the backbone is trainable, the same search finds its gradients.
        assert kernels <= made and kernels <= moments
    else:
        assert not kernels & made
        largest = max(int(np.prod(shape)) for shape in moments)
        assert largest == tiny.PROMPT * 22


TABLES = {
    "full": (encoder_decoder.FULL_FINETUNING, {}, lambda name: True),
    "layer norms": (encoder_decoder.LAYER_NORMS, {}, lambda name: name.endswith("norm/scale")),
    "bitfit": (encoder_decoder.BITFIT, {"biases": True}, lambda name: name.endswith("/bias")),
}


# A model of the method 'none' trains layer norms in test_encoder_decoder.py.
@pytest.mark.parametrize(
    "table", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bitfit", "layer norms"))]
)
def test_label_table_trains_exactly_its_parameters(table):
    labels, fields, chosen = TABLES[table]
    runs = Runs(["alpha"])
    model = tiny.model(runs, get_method("none")(), tiny.config(**fields), labels=labels)
    made = make_trainer(model)
    before = bytes_of(made.state.params)
    expected = {name for name in before if chosen(name)}
    assert expected, "the model should have such parameters"
    assert set(flatten(made.state.trainable)) == expected
    for seed in range(2):
        made.train(tiny.batch([0, 0, 0, 0], seed=seed, prompt_length=0))
    made.read_metrics()
    after = bytes_of(made.state.params)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == expected


def test_layer_norm_labels_train_prompt_and_layer_norms():
    model = tiny.model(Runs(["alpha"]), MPT(tiny.PROMPT), labels=encoder_decoder.LAYER_NORMS)
    trainable, _ = split(tiny.params(model), model.labels, {"shared", "task", "backbone"})
    names = set(flatten(trainable))
    assert {"prompt/shared", "encoder/encoder_norm/scale"} <= names
    assert not any("kernel" in name or "embedding" in name for name in names)


# --- Microbatches --------------------------------------------------------------------------------


def test_gradients_number_of_microbatches_changes_only_rounding():
    model = tiny.model(GROUPED, objective=Objective(distillation=Distillation(), z_loss=1e-2))
    trainable, frozen = split(tiny.params(model), model.labels, {"shared", "task"})
    found = {}
    for parts in (1, 4):
        step = functools.partial(train_step.gradients, model, num_microbatches=parts)
        found[parts] = jax.jit(step)(trainable, frozen, BATCH, None)
    tiny.close(found[4], found[1], 1e-6)


@pytest.mark.parametrize("parts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_term_gradient_norms_match_objectives_of_one_term(parts):
    objective = Objective(distillation=Distillation(encoder_weight=0.5), z_loss=1e-2)
    made = make_trainer(tiny.model(GROUPED, objective=objective), parts)
    found = made.term_gradient_norms(BATCH)
    coefficients = objective.coefficients()
    assert set(found) == set(coefficients) and coefficients["hidden_encoder"] == 0.45
    model, state = made.model, made.state

    def term(trainable, name):
        sums, _ = model.loss_sums(merge(trainable, state.frozen), tiny.arrays(BATCH))
        weights = model.loss_normalizers(tiny.arrays(BATCH))
        return (sums[name] / weights[name]).sum()

    for name, coefficient in coefficients.items():
        grads = jax.jit(jax.grad(functools.partial(term, name=name)))(state.trainable)
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in flatten(grads).values()))
        assert found[name] == pytest.approx(coefficient * norm, rel=1e-5)
    assert make_trainer(tiny.model(GROUPED)).term_gradient_norms(BATCH) == {}


def test_gradients_indivisible_batch_error():
    model = tiny.model(GROUPED)
    trainable, frozen = split(tiny.params(model), model.labels, {"shared", "task"})
    with pytest.raises(ValueError, match="8 rows does not divide into 3"):
        train_step.gradients(model, trainable, frozen, tiny.arrays(BATCH), None, 3)


# --- Groups --------------------------------------------------------------------------------------

NAMES = ["alpha", "beta", "gamma"]
PEAKS, TOTALS, WARMUPS, CLIPS = [0.1, 0.03, 0.06], [60, 40, 80], [5, 0, 12], [0.2, 5.0, 1.0]
# Smooth activations and moderate rates: at rates of 0.4 the one-bit difference that comes from
# another order of addition grows past 1e-5 within 50 steps of this tiny random problem.
SMOOTH = tiny.config(mlp_activations=("gelu", "linear"))


def grouped_optimizer(groups: list[int]) -> PromptOptimizer:
    """The settings of some of the groups."""
    pick = lambda values: [values[group] for group in groups]  # noqa: E731
    schedule = Schedule(pick(PEAKS), pick(TOTALS), pick(WARMUPS))
    return PromptOptimizer(
        {"shared": schedule, "task": schedule},
        weight_decay=1e-2,
        clip_norm=pick(CLIPS),
        absent_tasks="hold",
    )


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(MPT(tiny.PROMPT), id="mpt"),
        pytest.param(PromptTuning(tiny.PROMPT), id="pt", marks=pytest.mark.slow),
    ],
)
def test_independent_runs_in_one_job_match_solo_runs(method):
    """50 steps, float32: every group has its own learning rate, schedule and clipping norm, and
    is sometimes absent from a batch."""
    together = Runs(NAMES, groups="independent")
    model = tiny.model(together, method, SMOOTH, optimizer_def=grouped_optimizer([0, 1, 2]))
    params = tiny.params(model)
    params["prompt"] = dict(model.init_prompt(KEY, params["token_embedder"]["embedding"]))
    rng = np.random.default_rng(0)
    rows = [[row if rng.random() < 0.7 else None for row in (0, 1, 2)] * 2 for _ in range(50)]
    step = jax.jit(functools.partial(train_step.train_step, model, 1))
    state = tiny.state(model, params)
    for seed, present in enumerate(rows):
        state, _ = step(state, tiny.batch(present, seed=seed), KEY)
    for row, name in enumerate(NAMES):
        alone = tiny.model(Runs([name]), method, SMOOTH, optimizer_def=grouped_optimizer([row]))
        prompt = alone.init_prompt(KEY, params["token_embedder"]["embedding"])
        solo_step = jax.jit(functools.partial(train_step.train_step, alone, 1))
        solo = tiny.state(alone, {**params, "prompt": dict(prompt)})
        taken = 0
        for seed, present in enumerate(rows):
            if row in present:
                mine = tiny.batch([0 if found == row else None for found in present], seed=seed)
                solo, _ = solo_step(solo, mine, KEY)
                taken += 1
        assert 0 < taken < 50 and int(solo.step) == taken
        for leaf, value in solo.trainable["prompt"].items():
            grouped = np.asarray(state.trainable["prompt"][leaf][row])
            np.testing.assert_allclose(grouped, value[0], atol=1e-5, err_msg=f"{name} {leaf}")
            assert np.abs(grouped - np.asarray(prompt[leaf][0])).max() > 0.1, (
                "the prompt should have changed"
            )


# --- Non-finite values ---------------------------------------------------------------------------


def test_trainer_nan_batch_raises_and_keeps_state():
    made = make_trainer(tiny.model(GROUPED))
    good = [tiny.batch([0, 1, 2, 2], seed=seed) for seed in range(4)]
    made.train(good[0])
    made.read_metrics()
    parts = ("trainable", "opt_state", "frozen")
    before = {part: bytes_of(getattr(made.state, part)) for part in parts}
    bad = {**good[1], "decoder_loss_weights": good[1]["decoder_loss_weights"] * np.float32("nan")}
    made.train(bad)
    # Steps dispatched before the failure is read must not continue without the failed one.
    made.train(good[2])
    made.train(good[3])
    with pytest.raises(trainer.NonFiniteLoss, match="step 1 is not finite"):
        made.read_metrics()
    assert int(made.state.step) == 1
    assert {part: bytes_of(getattr(made.state, part)) for part in parts} == before


def test_train_step_infinite_loss_with_finite_gradient_not_taken():
    class Overflowing(encoder_decoder.PromptedEncoderDecoder):
        def loss_sums(self, *args, **settings):
            sums, found = super().loss_sums(*args, **settings)
            return {name: value + jnp.inf for name, value in sums.items()}, found

    plain = tiny.model(GROUPED)
    model = Overflowing(plain.module, plain.prompt, GROUPED, tiny.optimizer())
    state = tiny.state(model, tiny.params(model))
    new, _ = jax.jit(functools.partial(train_step.train_step, model, 1))(state, BATCH, KEY)
    assert int(new.step) == 0
    assert bytes_of(new.trainable) == bytes_of(state.trainable)


# --- Dropout and evaluation ----------------------------------------------------------------------


def test_train_step_dropout_depends_on_key_and_step():
    model = tiny.model(GROUPED, config=tiny.config(dropout_rate=0.2))
    step = jax.jit(functools.partial(train_step.train_step, model, 1))
    state = tiny.state(model, tiny.params(model))
    first, again = step(state, BATCH, KEY)[0], step(state, BATCH, KEY)[0]
    assert bytes_of(first.trainable) == bytes_of(again.trainable)
    later = state.replace(step=state.step + 1)
    for other in (step(later, BATCH, KEY)[0], step(state, BATCH, jax.random.PRNGKey(1))[0]):
        assert bytes_of(other.trainable) != bytes_of(first.trainable)


def test_evaluate_returns_mean_over_batches_and_keeps_state(distilled):
    before = bytes_of(distilled.state.params)
    batches = [tiny.batch([0, 1, 2, 2], seed=9), tiny.batch([2, None, None, 1], seed=10)]
    found = distilled.evaluate(batches)
    assert bytes_of(distilled.state.params) == before
    logits_of = jax.jit(distilled.model.logits)
    sums, counts = np.zeros(3), np.zeros(3)
    for batch in batches:
        logits = np.asarray(logits_of(distilled.state.params, batch), np.float64)
        for i, position in zip(*np.nonzero(batch["decoder_loss_weights"]), strict=True):
            row = batch["decoder_task_ids"][i, position]
            scores = logits[i, position]
            target = batch["decoder_target_tokens"][i, position]
            sums[row] += np.log(np.exp(scores).sum()) - scores[target]
            counts[row] += 1
    np.testing.assert_allclose(found["loss"], sums.sum() / counts.sum(), rtol=1e-5)
    for row, name in enumerate(NAMES):
        np.testing.assert_allclose(found[f"loss/{name}"], sums[row] / counts[row], rtol=1e-5)
    assert distilled.evaluate([]) == {}

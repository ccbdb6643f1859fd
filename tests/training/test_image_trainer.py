"""Training of the dual encoder: runs, chunks, padding and microbatches do not affect each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.init import Normal, Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.training import train_step, trainer
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.row_compaction import RowCompactor
from mpt_jax.training.schedules import EpochCosine
from mpt_jax.training.state import create_train_state
from tests.fixtures import clip_models, tiny, tiny_clip

KEY = jax.random.PRNGKey(0)
CONFIG = clip_models.shallow()
TASKS, NAMES = ["pets", "shapes", "pets"], ["pets_s1", "shapes_s1", "pets_s2"]
JOINT, APART = Runs(TASKS, NAMES), Runs(TASKS, NAMES, "independent")
ROWS, LABELS = [0, 1, 2, 0, 1, 2], [2, 1, 0, 1, 0, 2]
WIDE = Uniform(0.5)
COOP = SitePrompts(PromptTuning(tiny_clip.CONTEXT, WIDE))
BOTH = SitePrompts(PromptTuning(tiny_clip.CONTEXT, WIDE), PromptTuning(4, WIDE), image_layers=2)
FACTORS = SitePrompts(MPT(tiny_clip.CONTEXT, 2, WIDE), MPT(4, 1, WIDE), image_layers=2)
RECIPE = PromptOptimizer(
    {label: EpochCosine(0.5, 12, 2, 0.1) for label in ("shared", "task")},
    weight_decay=0.0,
    clip_norm=None,
    absent_tasks="hold",
    rule=functools.partial(sgd, 0.9, 0.01),
)


def made(prompt=BOTH, runs=APART, **settings):
    """A model and all its parameters; prompts depend only on the names of runs."""
    model = tiny_clip.model(prompt, runs, **{"optimizer_def": RECIPE, "config": CONFIG, **settings})
    return model, tiny_clip.params(model)


def state_of(model, params):
    return create_train_state(model, jax.tree.map(jnp.array, params), PjitPartitioner())


def batch_of(seed=0, **settings):
    return tiny_clip.batch(ROWS, LABELS, seed, **settings)


def pick(batch, rows):
    return {name: value[jnp.asarray(rows)] for name, value in batch.items()}


def spoil(params, row):
    """The same parameters, with NaN in all prompts of one bank row."""
    return {**params, "prompt": jax.tree.map(lambda x: x.at[row].set(jnp.nan), params["prompt"])}


@functools.cache
def compiled(model, parts):
    return jax.jit(functools.partial(train_step.gradients, model, num_microbatches=parts))


def gradients(model, params, batch, parts=1):
    """The gradient of all prompts, and the metrics."""
    state = state_of(model, params)
    found = compiled(model, parts)(state.trainable, state.frozen, batch, None)
    return found[0]["prompt"], found[1]


def close_gradients(found, expected):
    """Equal except for rounding, which is relative to the largest gradient."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    relative = lambda tree: jax.tree.map(lambda x: np.asarray(x) / scale, tree)  # noqa: E731
    tiny.close(relative(found), relative(expected), 5e-6)


def row_of(tree, row):
    return {name: np.asarray(leaf)[row] for name, leaf in flatten(tree).items()}


# --- The same result in other layouts ------------------------------------------------------------


@pytest.mark.parametrize("softmax", ["own", pytest.param("union", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [[0, 3], pytest.param([0, 1, 2, 3, 4, 5], marks=pytest.mark.slow)])
def test_text_chunk_changes_only_rounding(rows, softmax):
    """With the rows 0 and 3 of the batch, the texts of two of the three runs are left out."""
    batch = pick(batch_of(), rows)
    runs = JOINT if softmax == "union" else APART
    found = []
    for chunk in (128, 3):
        model, params = made(COOP, runs, softmax=softmax, text_chunk=chunk)
        found.append(gradients(model, params, batch))
    (expected, metrics), (grads, own_metrics) = found
    close_gradients(grads, expected)
    tiny.close(own_metrics, metrics, 1e-6)


def test_text_chunk_texts_of_absent_runs_are_not_encoded():
    """Left out are all chunks that have only texts of runs without examples."""
    model, params = made(COOP, text_chunk=1)
    batch = tiny_clip.batch([0, 1, 2], [0, 0, 0], weights=[0.0, 1.0, 0.0])
    texts = np.asarray(jax.jit(model.text_features)(params, batch))
    assert texts.any(-1).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    whole = jax.jit(made(COOP)[0].text_features)(params, batch)
    np.testing.assert_allclose(texts[3:5], whole[3:5], atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        pytest.param(BOTH, [0, 1], id="pt"),
        pytest.param(FACTORS, [0, 1, 2], id="mpt", marks=pytest.mark.slow),
    ],
)
def test_independent_runs_match_separate_jobs(prompt, rows):
    """Losses and gradients of the first step, and parameters after five."""
    together, params = made(prompt)
    batches = [batch_of(seed) for seed in range(5)]
    grads, metrics = gradients(together, params, batches[0])
    step = jax.jit(lambda s, b: train_step.train_step(together, 1, s, b, KEY)[0])
    state = state_of(together, params)
    for batch in batches:
        state = step(state, batch)
    assert not np.asarray(state.failed).any()
    for row in rows:
        alone, own = made(prompt, Runs([TASKS[row]], [NAMES[row]]))
        tiny.close(row_of(own["prompt"], 0), row_of(params["prompt"], row), 0)
        mine = [
            {**pick(batch, [row, row + 3]), "task_ids": jnp.zeros(2, jnp.int32)}
            for batch in batches
        ]
        own_grads, own_metrics = gradients(alone, own, mine[0])
        close_gradients(row_of(grads, row), row_of(own_grads, 0))
        for metric in ("term/cross_entropy", "loss", "accuracy"):
            for part in ("sum", "weight"):
                value = np.asarray(getattr(metrics[metric], part))[row]
                expected = np.asarray(getattr(own_metrics[metric], part))[0]
                np.testing.assert_allclose(value, expected, 1e-6, 1e-6, err_msg=metric)
        own_step = jax.jit(lambda s, b: train_step.train_step(alone, 1, s, b, KEY)[0])  # noqa: B023
        own_state = state_of(alone, own)
        for batch in mine:
            own_state = own_step(own_state, batch)
        found, expected = (
            row_of(s.trainable["prompt"], r) for s, r in ((state, row), (own_state, 0))
        )
        tiny.close(found, expected, 1e-6)
        moved = {k: np.abs(v - row_of(own["prompt"], 0)[k]).max() for k, v in found.items()}
        assert min(moved.values()) > 1e-3, moved


@pytest.mark.parametrize(
    "rows", [APART, pytest.param(JOINT, marks=pytest.mark.slow)], ids=["independent", "joint"]
)
def test_padding_rows_change_nothing(rows):
    model, params = made(BOTH, rows)
    whole = pick(batch_of(), [0, 1, 3])
    padding = tiny_clip.batch([2, 0], [-1, -1], seed=9, weights=[0.0, 0.0])
    padded = jax.tree.map(lambda *x: jnp.concatenate(x), whole, padding)
    found, expected = gradients(model, params, padded), gradients(model, params, whole)
    close_gradients(found[0], expected[0])
    tiny.close(found[1], expected[1], 1e-6)
    normalizers = model.loss_normalizers(padded)["cross_entropy"]
    assert normalizers.tolist() == ([3.0] if rows is JOINT else [2.0, 1.0, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3])
def test_microbatches_change_only_rounding(parts):
    model, params = made(FACTORS, JOINT)
    batch = batch_of(weights=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    found, expected = gradients(model, params, batch, parts), gradients(model, params, batch)
    close_gradients(found[0], expected[0])
    tiny.close(found[1], expected[1], 1e-6)


@pytest.mark.slow
def test_order_of_tasks_and_examples_irrelevant():
    order = [2, 0, 1]  # new bank row -> old
    first, params = made()
    runs = Runs([TASKS[i] for i in order], [NAMES[i] for i in order], "independent")
    texts = tiny_clip.texts(tasks=(tiny_clip.SHAPES, tiny_clip.PETS))
    second, other = made(runs=runs, texts=texts)
    for row, old in enumerate(order):
        tiny.close(row_of(other["prompt"], row), row_of(params["prompt"], old), 0)
    batch = pick(batch_of(), [4, 0, 2, 1, 5, 3])
    batch["task_ids"] = jnp.asarray([order.index(i) for i in batch["task_ids"].tolist()], jnp.int32)
    expected, found = gradients(first, params, batch_of()), gradients(second, other, batch)
    index = np.argsort(order)  # old bank row -> new
    close_gradients(jax.tree.map(lambda x: x[index], found[0]), expected[0])
    by_run = lambda x: tiny.close(x, expected[1], 1e-6)  # noqa: E731
    by_run(jax.tree.map(lambda x: x[index], found[1]))


# --- Failed runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "rest"),
    [
        (128, [0, 1, 2, 3, 4, 5]),
        (3, [0, 2, 3, 5]),
        pytest.param(3, [0, 1, 2, 3, 4, 5], marks=pytest.mark.slow),
        pytest.param(128, [0, 2, 3, 5], marks=pytest.mark.slow),
    ],
)
def test_gradients_nan_of_one_run_leave_others_equal(rest, chunk):
    model, params = made(BOTH, text_chunk=chunk)
    batch = pick(batch_of(), rest)
    expected, _ = gradients(model, params, batch)
    found, metrics = gradients(model, spoil(params, 1), batch)
    for row in (0, 2):
        tiny.close(row_of(found, row), row_of(expected, row), 0)
        assert np.isfinite(np.asarray(metrics["term/cross_entropy"].sum)[row])
    if 1 in rest:
        assert np.isnan(np.asarray(metrics["term/cross_entropy"].sum)[1])


def test_gradients_nan_in_a_large_bank_leave_others_equal():
    """With more than four times as many texts as a task has classes, another product is used, whose
    third column for a task of two classes is a text of the next run."""
    tasks = ["pets", *["shapes"] * 5]
    runs = Runs(tasks, [f"{task}_s{i}" for i, task in enumerate(tasks)], "independent")
    model, params = made(BOTH, runs)
    assert len(model.bank.row) == 13 and model.texts.most_classes == 3
    batch = tiny_clip.batch([0, 1, 2, 3, 4, 5], [2, 1, 0, 1, 0, 1])
    expected, _ = gradients(model, params, batch)
    found, _ = gradients(model, spoil(params, 2), batch)
    for row in (0, 1, 3, 4, 5):
        tiny.close(row_of(found, row), row_of(expected, row), 1e-7)
        assert all(x.any() for x in row_of(expected, row).values())


@pytest.mark.slow
def test_padding_of_a_failed_run_changes_nothing():
    model, params = made(BOTH)
    whole = pick(batch_of(), [0, 2, 3])
    padding = tiny_clip.batch([1], [-1], seed=9, weights=[0.0])
    padded = jax.tree.map(lambda *x: jnp.concatenate(x), whole, padding)
    expected, _ = gradients(model, params, whole)
    found, metrics = gradients(model, spoil(params, 1), padded)
    for row in (0, 2):
        close_gradients(row_of(found, row), row_of(expected, row))
    assert np.asarray(metrics["term/cross_entropy"].sum)[1] == 0


def rows_of(made_trainer, row):
    """Every bit of a run: its parameters, moments and step counts."""
    state = made_trainer.state
    leaves = [*jax.tree.leaves(state.trainable), *jax.tree.leaves(state.opt_state)]
    assert all(leaf.shape[0] == 3 for leaf in leaves)
    return [np.asarray(leaf)[row].tobytes() for leaf in leaves]


def test_trainer_failed_run_leaves_other_runs_bit_identical():
    def learn(params):
        one = trainer.Trainer(model, state_of(model, params), PjitPartitioner(), KEY)
        one._train_step = steps.setdefault("", one._train_step)  # the same program
        for seed in range(4):
            one.train({k: np.asarray(v) for k, v in batch_of(seed).items()})
        return one, one.read_metrics()

    steps = {}
    model, params = made(BOTH)
    (healthy, _), (failed, metrics) = learn(params), learn(spoil(params, 0))
    assert failed.failed.tolist() == [True, False, False] and failed.ended.tolist() == [0, -1, -1]
    for row in (1, 2):
        assert rows_of(failed, row) == rows_of(healthy, row)
    assert np.isfinite(metrics["loss"]) and "loss/pets_s1" not in metrics
    assert metrics["learning_rate/task"] == pytest.approx(0.25 * (1 + np.cos(np.pi / 6)), 1e-5)
    evaluated = failed.evaluate([{k: np.asarray(v) for k, v in batch_of(7).items()}])
    assert "loss/pets_s1" not in evaluated and np.isfinite(evaluated["loss/pets_s2"])


# --- Rows that are left out ----------------------------------------------------------------------


def test_row_compaction_of_images():
    """Rows of finished runs are left out, or replaced by padding that names an active run."""
    runs = Runs(["pets", "shapes"] * 2, list("abcd"), "independent")
    batch = tiny_clip.batch([0, 0, 1, 1, 2, 2, 3, 3], [2, 1, 1, 0, 2, 1, 1, 0])
    batch = {name: np.array(value) for name, value in batch.items()}
    found = RowCompactor(runs).pack(batch, [False, True, False, False])
    assert found["task_ids"].tolist() == [1, 1] and found["label"].tolist() == [1, 0]
    np.testing.assert_array_equal(found["image"], batch["image"][2:4])
    found = RowCompactor(runs, num_microbatches=4).pack(batch, [False, True, True, False])
    assert found["task_ids"].tolist() == [1, 1, 2, 2]
    found = RowCompactor(runs, shards=2, local_shards=2).pack(batch, [False, True, False, False])
    assert found["loss_weights"].tolist() == [1, 1, 0, 0]
    assert found["task_ids"].tolist() == [1, 1, 2, 2], "a block without active runs names its first"


@pytest.mark.slow
def test_gradients_only_of_prompts():
    """A step has no gradient of the backbone, and changes only rows of the batch."""
    model, params = made(BOTH, APART)
    state = state_of(model, params)
    assert sorted(state.trainable) == ["prompt"] and "text_encoder" in state.frozen
    batch = pick(batch_of(), [0, 3])
    new, _ = jax.jit(lambda s, b: train_step.train_step(model, 1, s, b, KEY))(state, batch)
    for name, leaf in flatten(new.trainable).items():
        before = np.asarray(flatten(params)[name])
        np.testing.assert_array_equal(np.asarray(leaf)[1:], before[1:])
        assert (np.asarray(leaf)[0] != before[0]).any()


def test_initial_values_of_published_recipes():
    """CoOp: N(0, 0.02). VPT: uniform within sqrt(6 / (3 p^2 + H)), here with p = 4 and H = 24."""
    bound = (6 / (3 * 4**2 + 24)) ** 0.5
    prompt = SitePrompts(
        PromptTuning(tiny_clip.CONTEXT, Normal()), PromptTuning(600, Uniform(bound)), image_layers=3
    )
    runs = Runs(["pets"] * 60, [f"pets_s{i}" for i in range(60)])
    model = tiny_clip.model(prompt, runs)
    backbone = clip_models.random_params(model.module.config)
    params = model.init_prompt(KEY, jnp.asarray(model.embedding(backbone)))
    context, tokens = (np.asarray(params[x]["table"]) for x in ("text_context", "image_tokens"))
    assert context.shape == (60, 3, 16) and tokens.shape == (60, 600, 24)
    # 2,880 normal values: the standard deviation is off by 1.3%, the mean by 0.0004.
    assert context.std() == pytest.approx(0.02, rel=0.06) and abs(context.mean()) < 0.002
    assert np.abs(context).max() > 0.05, "a normal distribution has tails"
    assert np.abs(tokens).max() == pytest.approx(bound, rel=1e-3)
    assert tokens.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert np.unique(context[:, 0, 0]).size == 60, "runs differ"


@pytest.mark.slow
def test_optimizer_schedule_per_run():
    """Each independent run has its own schedule; see EpochCosine."""
    schedule = EpochCosine([0.5, 0.25, 0.125], 12, [1, 2, 3], 0.0)
    optimizer = PromptOptimizer({"task": schedule}, 0.0, clip_norm=None, rule=lambda: sgd(0.0, 0.0))
    model, params = made(COOP, optimizer_def=optimizer)
    state = state_of(model, params)
    step = jax.jit(lambda s, b: train_step.train_step(model, 1, s, b, KEY)[0])
    moved = []
    for seed in range(4):
        new = step(state, batch_of(seed))
        change = jax.tree.map(
            lambda a, b: np.abs(a - b).max((1, 2)), new.trainable, state.trainable
        )
        moved.append((jax.tree.leaves(change)[0] > 0).tolist())
        state = new
    assert moved == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    with pytest.raises(ValueError, match="peak has 3 entries, but the job has 1 groups"):
        optimizer.bind(model.labels, JOINT, model.rows)

"""Runs of one job that fail or finish: they keep their parameters, and others are unaffected."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training import trainer
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from tests.fixtures import tiny

NAMES = ["alpha", "beta", "gamma"]
KEY = jax.random.PRNGKey(0)
SMOOTH = tiny.config(mlp_activations=("gelu", "linear"))
METHODS = {"mpt": MPT(tiny.PROMPT), "pt": PromptTuning(tiny.PROMPT)}
PROGRAMS: dict[str, tuple] = {}
ONE = pytest.mark.parametrize(
    "method",
    [
        pytest.param(METHODS["mpt"], id="mpt"),
        pytest.param(METHODS["pt"], id="pt", marks=pytest.mark.slow),
    ],
)


@functools.cache
def backbone() -> dict:
    model = tiny.model(Runs(["any"]), METHODS["pt"], SMOOTH)
    return {name: leaf for name, leaf in tiny.params(model).items() if name != "prompt"}


def make(method, names=NAMES, peaks=0.1, totals=40, spoiled=None) -> trainer.Trainer:
    """A trainer of independent runs; `spoiled` names one that starts from NaN."""
    schedule = Schedule(peaks, totals)
    optimizer = PromptOptimizer({"shared": schedule, "task": schedule}, clip_norm=None)
    runs = Runs(names, groups="independent")
    model = tiny.model(runs, method, SMOOTH, optimizer_def=optimizer)
    params = backbone()
    prompt = dict(model.init_prompt(KEY, params["token_embedder"]["embedding"]))
    if spoiled:
        row = runs.row(spoiled)
        prompt = {name: leaf.at[row].set(np.nan) for name, leaf in prompt.items()}
    state = tiny.state(model, {**params, "prompt": prompt})
    made = trainer.Trainer(model, state, PjitPartitioner(), KEY)
    # Trainers of equal models run the same programs, so they are compiled once.
    settings = repr((method, names, peaks, totals))
    made._train_step, made._eval_step = PROGRAMS.setdefault(
        settings, (made._train_step, made._eval_step)
    )
    return made


def learn(made: trainer.Trainer, steps: range, rows=(0, 0, 1, 1, 2, 2)) -> trainer.Trainer:
    for seed in steps:
        made.train(tiny.batch(list(rows), seed=seed))
    return made


def alone(method, row: int, steps: range, **settings) -> trainer.Trainer:
    """A trainer of one row's run, on its own examples of the same batches."""
    made = make(method, [NAMES[row]], **settings)
    for seed in steps:
        batch = tiny.batch([0 if found == row else None for found in (0, 0, 1, 1, 2, 2)], seed=seed)
        made.train(batch)
    return made


def rows_of(made: trainer.Trainer, row: int) -> dict[str, bytes]:
    """Every bit of a run: its parameters, moments and step counts."""
    rows = len(made.model.runs.run_names)
    leaves = [*jax.tree.leaves(made.state.trainable), *jax.tree.leaves(made.state.opt_state)]
    assert all(leaf.shape[0] == rows for leaf in leaves)
    return {str(i): np.asarray(leaf)[row].tobytes() for i, leaf in enumerate(leaves)}


def close_to_alone(made: trainer.Trainer, row: int, solo: trainer.Trainer) -> None:
    for name, leaf in solo.state.trainable["prompt"].items():
        found = np.asarray(made.state.trainable["prompt"][name])[row]
        np.testing.assert_allclose(found, np.asarray(leaf)[0], atol=1e-5, err_msg=name)


# By contract, padding of every row names bank row 0.
@pytest.mark.parametrize(
    ("method", "bad"),
    [
        pytest.param(METHODS["mpt"], 0, id="mpt-0"),
        pytest.param(METHODS["pt"], 1, id="pt-1"),
        pytest.param(METHODS["mpt"], 1, id="mpt-1", marks=pytest.mark.slow),
        pytest.param(METHODS["pt"], 0, id="pt-0", marks=pytest.mark.slow),
    ],
)
def test_trainer_failed_run_leaves_other_runs_bit_identical(method, bad, caplog):
    healthy = learn(make(method), range(6))
    made = make(method, spoiled=NAMES[bad])
    before = rows_of(made, bad)
    with caplog.at_level("ERROR", logger="absl"):
        found = learn(made, range(3)).read_metrics()
        learn(made, range(3, 6)).read_metrics()
    others = [row for row in range(3) if row != bad]
    assert all(rows_of(made, row) == rows_of(healthy, row) for row in others)
    assert rows_of(made, bad) == before
    assert made.failed.tolist() == [row == bad for row in range(3)]
    assert made.ended[bad] == 0 and made.active.tolist() == [row != bad for row in range(3)]
    assert f"{NAMES[bad]} failed: the loss or a gradient of step 0" in caplog.text
    assert caplog.text.count(" failed: ") == 1, "the failure should be logged once"
    assert f"loss/{NAMES[bad]}" not in found and np.isfinite(found["loss"])
    for row in others:
        close_to_alone(made, row, alone(method, row, range(6)))


@pytest.mark.parametrize("bad", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluate_failed_run_excluded_and_other_scores_unchanged(bad):
    """An evaluation batch may mix runs. By contract, padding of every row names bank row 0."""
    made, healthy = make(METHODS["mpt"], spoiled=NAMES[bad]), make(METHODS["mpt"])
    learn(made, range(1)).read_metrics()
    learn(healthy, range(1)).read_metrics()
    batches = [tiny.batch([0, 1, 2, None], seed=7)]
    found, expected = made.evaluate(batches), healthy.evaluate(batches)
    others = [name for name in NAMES if name != NAMES[bad]]
    for name in others:
        for metric in ("loss", "token_accuracy", "term/cross_entropy"):
            assert found[f"{metric}/{name}"] == expected[f"{metric}/{name}"], (metric, name)
    assert not [name for name in found if name.endswith(NAMES[bad])]
    means = [found[name] for name in ("loss", "term/cross_entropy")]
    assert np.isfinite(means).all()
    assert found["batch/encoder_padding"] == expected["batch/encoder_padding"]


def test_trainer_too_high_learning_rate_fails_only_that_run():
    method = METHODS["mpt"]
    made = learn(make(method, peaks=[0.1, 1e38, 0.05]), range(5))
    made.read_metrics()
    assert made.failed.tolist() == [False, True, False] and 0 < made.ended[1] < 5
    calm = learn(make(method, peaks=[0.1, 0.1, 0.05]), range(5))
    for row, peak in ((0, 0.1), (2, 0.05)):
        assert rows_of(made, row) == rows_of(calm, row)
        close_to_alone(made, row, alone(method, row, range(5), peaks=peak))
    for leaf in made.state.trainable["prompt"].values():
        assert np.isfinite(leaf).all(), "parameters should be the last finite ones"


def test_trainer_all_runs_failed_raises_non_finite_loss():
    made = learn(make(METHODS["pt"], peaks=[1e38, 1e38, 1e38]), range(2))
    with pytest.raises(trainer.NonFiniteLoss, match="of step 1 is not finite; training stopped"):
        learn(made, range(2, 4)).read_metrics()
    first = make(METHODS["pt"], peaks=[1e38, 0.1, 1e38], spoiled="beta")
    with pytest.raises(trainer.NonFiniteLoss, match="step 1 .* all other runs failed before"):
        learn(first, range(4)).read_metrics()
    assert int(first.state.step) == 1 and first.failed.tolist() == [False, True, False]


@ONE
def test_trainer_run_past_its_schedule_stays_bit_identical(method):
    made = learn(make(method, totals=[3, 40, 5]), range(3))
    kept = rows_of(made, 0)
    learn(made, range(3, 7)).read_metrics()
    assert made.ended.tolist() == [3, -1, 5] and not made.failed.any()
    assert rows_of(made, 0) == kept
    for row, steps, total in ((0, 3, 3), (1, 7, 40), (2, 5, 5)):
        close_to_alone(made, row, alone(method, row, range(steps), totals=total))


def test_reactivate_extended_longer_schedule_resumes_training(caplog):
    first = make(METHODS["pt"], totals=[2, 40, 2])
    learn(first, range(3)).stop_groups([False, True, False])

    def resumed(totals) -> trainer.Trainer:
        made = make(METHODS["pt"], totals=totals)
        copied = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), first.state)
        made = trainer.Trainer(made.model, copied, PjitPartitioner(), KEY)
        made.load_run_status(first.run_status())
        return made

    same = resumed([2, 40, 2])
    same.reactivate_extended([False, True, False], 9)
    assert same.ended.tolist() == [2, 3, 2], (
        "one group is out of patience, the schedules of the others have ended"
    )
    late = resumed([4, 40, 2])
    with caplog.at_level("WARNING", logger="absl"):
        late.reactivate_extended([False, True, False], 3)
    assert late.ended.tolist() == [2, 3, 2] and "alpha ended early and could resume" in caplog.text
    made = resumed([4, 40, 2])
    with caplog.at_level("INFO", logger="absl"):
        made.reactivate_extended([False, False, False], 9)
    assert made.ended.tolist() == [-1, -1, 2]
    assert "alpha, beta had ended; training resumes from step 3" in caplog.text
    before = [rows_of(made, row) for row in range(3)]
    learn(made, range(3, 6)).read_metrics()
    assert made.ended.tolist() == [5, -1, 2], "two more of the run's own steps"
    assert [rows_of(made, row) == before[row] for row in range(3)] == [False, False, True]


def test_stop_groups_stopped_run_stays_bit_identical():
    made = learn(make(METHODS["mpt"]), range(2))
    made.stop_groups([False, True, False])
    kept = rows_of(made, 1)
    learn(made, range(2, 4))
    made.stop_groups([True, True, False])
    assert made.ended.tolist() == [4, 2, -1] and made.active.tolist() == [False, False, True]
    assert rows_of(made, 1) == kept
    close_to_alone(made, 2, alone(METHODS["mpt"], 2, range(4)))
    assert made._train_step._cache_size() == 1, "a step was compiled again"


@ONE
def test_compact_batches_finished_runs_dropped_with_same_results(method):
    """Two of three runs end early. Later steps are compiled for fewer rows."""
    rows, found = [0] * 4 + [1] * 4 + [2] * 4, {}
    for by_run in (False, True):
        made = make(method, totals=[2, 40, 4], peaks=0.03)
        made._compactor = (
            trainer._make_compactor(made.model, made.partitioner, 1) if by_run else None
        )
        sizes, step = [], made._train_step
        made._train_step = lambda state, batch, *rest, step=step, sizes=sizes: (
            sizes.append(len(batch["encoder_task_ids"])) or step(state, batch, *rest)
        )
        for start in range(0, 8, 2):
            learn(made, range(start, start + 2), rows).read_metrics()
            made.compact_batches()
        found[by_run] = (sizes, made.state.trainable)
        assert step._cache_size() == len(set(sizes))
    assert found[False][0] == [12] * 8
    assert found[True][0] == [12] * 4 + [6] * 4  # two runs need 8 rows of 12, one needs 4 of 6
    tiny.close(found[True][1], found[False][1], 1e-6)

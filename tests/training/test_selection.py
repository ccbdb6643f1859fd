"""Each group's best step, its patience, and the files that store it."""

import json
import math
import types

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models import encoder_decoder
from mpt_jax.prompts import get_method
from mpt_jax.training import best_steps
from mpt_jax.training.selection import EarlyStoppingAction, SelectBest, TerminateOnNanAction
from tests.fixtures import tiny

RUNS = Runs(["rte", "rte", "cb"], ["rte_s1", "rte_s2", "cb_s1"], groups=[0, 1, 1])
MODEL = tiny.model(RUNS)


def state(step: int, value: float):
    """A train state in which every parameter is `value`."""
    shapes = {
        "shared": (2, tiny.PROMPT, tiny.WIDTH),
        "task_left": (3, tiny.PROMPT, 1),
        "task_right": (3, 1, tiny.WIDTH),
    }
    prompt = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
    return types.SimpleNamespace(step=step, trainable={"prompt": prompt})


def scores(first: float, second: float, third: float):
    values = zip(RUNS.run_names, (first, second, third), strict=True)
    return {run: {"accuracy": float(value), "f1": float(-value)} for run, value in values}


def rows_of(select: SelectBest) -> dict[str, list[float]]:
    """Returns the value of each stored row; fails if a row has several values."""
    assert select.trainable is not None
    found = {}
    for name, leaf in select.trainable["prompt"].items():
        assert all(np.ptp(row) == 0 for row in np.asarray(leaf))
        found[name] = [float(np.ravel(row)[0]) for row in np.asarray(leaf)]
    return found


def test_select_best_each_group_keeps_its_own_best_step(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    assert select.best_step == [-1, -1] and all(map(math.isnan, select.best_group_scores()))
    # The second group's score is the mean of its two runs.
    for step, found in (
        (10, (50, 40, 60)),
        (20, (70, 80, 10)),
        (30, (60, 70, 50)),
        (40, (70, 1, 1)),
    ):
        assert not select.run(state(step, step), scores(*found))
    assert select.best_step == [20, 30]
    assert select.best_group_scores() == [70, 60]
    assert rows_of(select) == {
        "shared": [20, 30],
        "task_left": [20, 30, 30],
        "task_right": [20, 30, 30],
    }
    assert select.history[20] == [70, 45]


def test_select_best_min_mode_and_named_metric(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), metric="f1", mode="min")
    for step, found in ((1, (1, 1, 1)), (2, (3, 0, 0)), (3, (2, 5, 5))):
        select.run(state(step, step), scores(*found))
    assert select.best_step == [2, 3], "f1 is minus the accuracy"
    by_task = SelectBest(MODEL, str(tmp_path / "b"), metric={"rte": "accuracy", "cb": "f1"})
    assert by_task.group_scores(scores(1, 2, 3)) == [1, (2 - 3) / 2]
    lacking = SelectBest(MODEL, str(tmp_path / "c"), metric={"rte": "accuracy"})
    with pytest.raises(ValueError, match=r"SelectBest.metric has no entry for the task 'cb'"):
        lacking.group_scores(scores(1, 2, 3))


def test_select_best_resume_and_repeated_evaluation_change_nothing(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    select.run(state(20, 2), scores(60, 50, 50))
    again = SelectBest(MODEL, str(tmp_path))
    again.resume(20)
    assert again.best_step == [20, 10] and again.history == select.history
    assert again.scores == select.scores
    assert rows_of(again) == rows_of(select)
    # A run that was killed after step 20's evaluation and resumed from before it.
    again.run(state(20, 2), scores(60, 50, 50))
    assert again.best_step == [20, 10] and rows_of(again) == rows_of(select)
    again.run(state(30, 3), scores(61, 1, 1))
    assert again.best_step == [30, 10]
    assert rows_of(again)["task_left"] == [3, 1, 1]


def test_select_best_resume_discards_later_evaluations(tmp_path, caplog):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    select.run(state(20, 2), scores(40, 50, 50))
    again = SelectBest(MODEL, str(tmp_path))
    again.resume(15)
    assert again.best_step == [10, 10] and sorted(again.history) == [10]
    select.run(state(30, 3), scores(90, 90, 90))
    for step in (0, 25):  # a new run, and one that resumes from before the stored parameters
        again = SelectBest(MODEL, str(tmp_path))
        with caplog.at_level("WARNING", logger="absl"):
            again.resume(step)
        assert again.best_step == [-1, -1] and not again.history and again.trainable is None
    assert "Selection starts over" in caplog.text
    again.run(state(26, 4), scores(1, 1, 1))
    assert again.best_step == [26, 26] and rows_of(again)["task_left"] == [4, 4, 4]


def test_select_best_resume_with_other_runs_error(tmp_path):
    SelectBest(MODEL, str(tmp_path)).run(state(10, 1), scores(50, 60, 60))
    other = SelectBest(tiny.model(Runs(["rte", "cb"])), str(tmp_path))
    with pytest.raises(ValueError, match="runs rte_s1, .*, but this job has the runs rte, cb"):
        other.resume(10)


def test_select_best_scores_come_from_best_steps(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 62))
    select.run(state(20, 2), scores(70, 1, 2))
    assert {run: found["accuracy"] for run, found in select.scores.items()} == {
        "rte_s1": 70, "rte_s2": 60, "cb_s1": 62,
    }  # fmt: skip


def test_select_best_folder_has_only_two_files(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    names = sorted(path.name for path in (tmp_path / best_steps.FOLDER).iterdir())
    assert names == ["history.json", "trainable.safetensors"]


def test_select_best_first_score_nan_is_replaced(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(math.nan, 50, 50))
    select.run(state(20, 2), scores(10, math.nan, 50))
    select.run(state(30, 3), scores(9, math.nan, math.nan))
    assert select.best_step == [20, 10]
    assert rows_of(select)["task_left"] == [2, 1, 1]


def test_select_best_patience_counts_evaluations_without_improvement(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), patience=2)
    found = [(50, 50, 50), (40, 40, 40), (40, 60, 60), (40, 40, 40), (50, 60, 60)]
    stops = [select.run(state(step, step), scores(*f)) for step, f in enumerate(found)]
    assert stops == [False, False, False, False, True]


def test_select_best_min_evaluations_delays_stopping(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), patience=1, min_evaluations=4)
    stops = [select.run(state(step, step), scores(*[50 - step] * 3)) for step in range(5)]
    assert stops == [False, False, False, True, True]


def test_select_best_trainable_backbone_is_kept_whole(tmp_path):
    runs = Runs(["rte"])
    model = tiny.model(runs, get_method("none")(), labels=encoder_decoder.FULL_FINETUNING)
    select = SelectBest(model, str(tmp_path))
    for step, score in ((1, 10.0), (2, 30.0), (3, 20.0)):
        kernel = np.full((2, 3), step, np.float32)
        learned = {"encoder": {"layers_0": {"mlp": {"wi": {"kernel": kernel}}}}}
        select.run(
            types.SimpleNamespace(step=step, trainable=learned), {"rte": {"accuracy": score}}
        )
    assert select.best_step == [2]
    again = SelectBest(model, str(tmp_path))
    again.resume(3)
    (leaf,) = flatten(again.trainable).values()
    assert np.all(np.asarray(leaf) == 2)


@pytest.mark.parametrize(
    ("settings", "found", "says"),
    [
        ({}, {"rte_s1": {"accuracy": 1.0}}, "needs a score of 'rte_s2'.* evaluated: rte_s1"),
        ({"metric": "acuracy"}, scores(1, 2, 3), r"metric of rte_s1 in .*: 'acuracy'.*'accuracy'"),
    ],
)
def test_select_best_missing_score_error(tmp_path, settings, found, says):
    with pytest.raises(ValueError, match=says):
        SelectBest(MODEL, str(tmp_path), **settings).run(state(1, 1), found)


@pytest.mark.parametrize(("settings", "says"), [({"mode": "most"}, "most"), ({"patience": 0}, "0")])
def test_select_best_settings_out_of_range_error(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        SelectBest(MODEL, str(tmp_path), **settings)


# --- T5X's actions -------------------------------------------------------------------------------


def test_early_stopping_stops_exactly_after_patience():
    action = EarlyStoppingAction(("rte", "accuracy"), "max", patience=2, atol=0.5)
    values = [50, 60, 60.4, 61, 61, 40]
    stops = [action.run(None, {"rte": {"accuracy": float(value)}}) for value in values]
    assert stops == [False, False, False, False, False, True]
    falling = EarlyStoppingAction(("rte", "loss"), "min", patience=1)
    assert [falling.run(None, {"rte": {"loss": x}}) for x in (3.0, 2.0, 2.0)] == [
        False,
        False,
        True,
    ]


def test_early_stopping_first_loss_nan_is_replaced():
    action = EarlyStoppingAction(("rte", "loss"), "min", patience=2)
    values = [math.nan, 2.0, 1.0, math.nan, 1.5]
    stops = [action.run(None, {"rte": {"loss": value}}) for value in values]
    assert stops == [False, False, False, False, True]


def test_actions_unknown_task_metric_or_mode_error():
    action = EarlyStoppingAction(("rtee", "accuracy"), "max")
    with pytest.raises(ValueError, match="'rtee'.*'rte'"):
        action.run(None, {"rte": {"accuracy": 1.0}})
    with pytest.raises(ValueError, match="metric of rte in EarlyStoppingAction: 'f1'"):
        EarlyStoppingAction(("rte", "f1"), "max").run(None, {"rte": {"accuracy": 1.0}})
    with pytest.raises(ValueError, match="'up'"):
        EarlyStoppingAction(("rte", "f1"), "up")
    with pytest.raises(ValueError, match="metric of rte in TerminateOnNanAction: 'loss'"):
        TerminateOnNanAction("rte").run(None, {"rte": {"accuracy": 1.0}})


def test_terminate_on_nan_stops_on_nan_or_infinity():
    action = TerminateOnNanAction("rte", "loss")
    values = (1.0, math.nan, math.inf)
    assert [action.run(None, {"rte": {"loss": x}}) for x in values] == [False, True, True]


# --- Groups out of patience, failed or ended ------------------------------------------------------


def test_select_best_patience_per_group(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), patience=[1, 3])
    found = [(50, 50, 50), (40, 40, 40), (99, 30, 30), (99, 20, 20), (99, 99, 99)]
    over, stops = [], []
    for step, values in enumerate(found):
        stops.append(select.run(state(step, step), scores(*values)))
        over.append(select.over)
    assert over == [[False] * 2, [True, False], [True, False], [True, True], [True, True]]
    assert stops == [False, False, False, True, True]
    assert select.best_step == [0, 0], "a group out of patience should not be scored"
    again = SelectBest(MODEL, str(tmp_path), patience=[1, 3])
    again.resume(4)
    assert again.over == [True, True] and again.history[2] == [None, 30]
    with pytest.raises(ValueError, match="3 entries, but the job has 2 groups"):
        SelectBest(MODEL, str(tmp_path), patience=[1, 2, 3])


def test_select_best_failed_group_ignored_ended_group_scored_once(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    standing = {"ended": np.array([-1, -1]), "failed": np.zeros(2, bool)}
    select.run(types.SimpleNamespace(**vars(state(10, 1)), **standing), scores(50, 50, 50))
    standing = {"ended": np.array([15, 17]), "failed": np.array([True, False])}
    for step in (20, 20, 30):  # the evaluation of step 20 is repeated after a restart
        values = scores(60, 60, 60) if step == 20 else scores(70, 70, 70)
        select.run(types.SimpleNamespace(**vars(state(step, step)), **standing), values)
    assert select.best_step == [10, 20] and select.best_group_scores() == [50, 60]
    assert rows_of(select)["task_left"] == [1, 20, 20]
    # A run that failed before its first evaluation needs no score.
    other = SelectBest(MODEL, str(tmp_path / "b"))
    only = {run: found for run, found in scores(1, 2, 3).items() if run != "rte_s1"}
    other.run(types.SimpleNamespace(**vars(state(20, 1)), **standing), only)
    assert other.best_step == [-1, 20] and math.isnan(other.best_group_scores()[0])


def test_select_best_resume_resets_only_groups_with_later_best(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), patience=2)
    select.run(state(10, 1), scores(50, 60, 60))
    select.run(state(20, 2), scores(60, 50, 50))
    again = SelectBest(MODEL, str(tmp_path), patience=2)
    again.resume(15)
    assert again.best_step == [-1, 10] and again.history == {10: [None, 60]}
    again.run(state(20, 3), scores(1, 50, 50))
    assert again.best_step == [20, 10] and rows_of(again)["task_left"] == [3, 1, 1]
    assert again.over == [False, False]


# --- The two files -------------------------------------------------------------------------------


def test_best_steps_corrupt_file_error_gives_advice(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    path = tmp_path / best_steps.FOLDER / best_steps.PARAMETERS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    again = SelectBest(MODEL, str(tmp_path))
    with pytest.raises(
        ValueError, match=r"safetensors does not match its record.*rename .*best and"
    ):
        again.resume(10)
    (tmp_path / best_steps.FOLDER / best_steps.HISTORY).write_text('{"run_names": [')
    with pytest.raises(ValueError, match=r"best cannot be read .*rename"):
        SelectBest(MODEL, str(tmp_path)).resume(10)


@pytest.mark.parametrize("written", [1, 2])
def test_best_steps_kill_between_writes_loses_nothing(tmp_path, monkeypatch, written):
    """The second selection is killed after its first or second write. The files still match, and
    hold the previous step or the new one."""
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    replace, count = best_steps._replace, iter(range(9))

    def until(path, content):
        if next(count) >= written:
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(best_steps, "_replace", until)
    with pytest.raises(KeyboardInterrupt):
        select.run(state(20, 2), scores(60, 70, 70))
    monkeypatch.setattr(best_steps, "_replace", replace)
    again = SelectBest(MODEL, str(tmp_path))
    again.resume(20)
    step = 10 if written == 1 else 20
    assert again.best_step == [step] * 2 and rows_of(again)["shared"] == [step / 10] * 2
    again.run(state(20, 2), scores(60, 70, 70))
    assert again.best_step == [20, 20] and rows_of(again)["shared"] == [2, 2]


def test_select_best_resumed_on_other_data_raises(tmp_path):
    """The scores of other validation rows say nothing about which step is best on these."""

    def record(rows: int) -> dict:
        return {"rte": {"source": "Files", "splits": {"validation": {"rows": rows}}}}

    def select(data: dict | None = None) -> SelectBest:
        made = SelectBest(MODEL, str(tmp_path))
        made.data = data or {}
        return made

    select(record(4)).run(state(10, 10), scores(50, 40, 60))
    for same in (record(4), None):
        again = select(same)
        again.resume(10)
        assert again.best_step == [10, 10]
    with pytest.raises(ValueError, match="measured on other data .* saved 4 rows, current 5 rows"):
        select(record(5)).resume(10)


def test_select_best_unscored_runs_need_no_metrics_and_keep_last_parameters(tmp_path):
    select = SelectBest(MODEL, str(tmp_path), patience=1)
    select.unscored = {"rte_s1"}  # all of the first group
    found = scores(0, 80, 60)
    del found["rte_s1"]
    assert not select.run(state(10, 10), found)
    assert not select.run(state(20, 20), {run: {"accuracy": 0.0} for run in found})
    assert select.best_step == [-1, 10] and select.over == [False, True]
    kept = select.parameters(state(30, 30))["prompt"]
    assert [row.max() for row in kept["task_left"]] == [30, 10, 10]
    assert [row.max() for row in kept["shared"]] == [30, 10]


def test_select_best_run_unscored_in_scored_group_is_left_out_of_mean(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.unscored = {"cb_s1"}
    found = scores(50, 40, 0)
    del found["cb_s1"]
    select.run(state(10, 10), found)
    assert select.best_group_scores() == [50, 40] and set(select.scores) == {"rte_s1", "rte_s2"}


def test_best_steps_changed_record_error_and_unsealed_record_is_read(tmp_path):
    select = SelectBest(MODEL, str(tmp_path))
    select.run(state(10, 1), scores(50, 60, 60))
    history = tmp_path / best_steps.FOLDER / best_steps.HISTORY
    written = json.loads(history.read_text())
    history.write_text(json.dumps(written | {"scores": {"rte_s1": {"accuracy": 99.0}}}))
    with pytest.raises(ValueError, match="history.json was changed .* its record_sha256 is"):
        best_steps.BestSteps(str(tmp_path)).read()
    del written[best_steps.SEAL]
    history.write_text(json.dumps(written))
    assert best_steps.BestSteps(str(tmp_path)).read()[0] == written

"""Second conditions of few-shot tables, repeats, and the notes below a table."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mpt_jax.data import task_lookup
from mpt_jax.experiments import results, stages
from mpt_jax.experiments.paper import __main__ as command
from mpt_jax.experiments.paper import footnotes, suites, tables, variants
from mpt_jax.experiments.stages import Draws
from tests.fixtures.paper_tables import given, planned, result

# --- Draws of examples ---------------------------------------------------------------------------


def test_balanced_draws_have_equally_many_examples_of_each_label():
    suites.TOY.register()
    draws = Draws(balanced=True)
    names = {task: draws.run_name(task, 4, 2) for task in ("toy_boolq", "toy_cb", "toy_d2t")}
    assert names == {
        "toy_boolq": "toy_boolq_k2_per_class_s2",
        "toy_cb": "toy_cb_k1_per_class_s2",  # three labels
        "toy_d2t": "toy_d2t_k4_s2",  # text without labels
    }
    for task in names:
        task_lookup.find_task(names[task])
    with pytest.raises(ValueError, match="k = 2 is less than the 3 labels of toy_cb"):
        draws.run_name("toy_cb", 2, 0)
    assert Draws(few_dev=True).run_name("toy_cb", 16, 0) == "toy_cb_k16_s0_dev"


def test_conditions_have_separate_folders_and_runs():
    plain = {stage.name for cell in planned("table3", suites.PAPER)[1] for stage in cell.jobs}
    for draws, folder, run in (
        (Draws(balanced=True), "_balanced", "cb_k5_per_class_s0"),
        (Draws(few_dev=True), "_few_dev", "cb_k16_s0_dev"),
    ):
        _, cells = planned("table3", suites.PAPER, draws=draws, shots=(16,))
        jobs = {cell.variant.name: cell.jobs for cell in cells}
        assert jobs["MPT"][0].name == f"mpt/k16/boolq-cb-scitail_s0-9{folder}"
        assert json.loads(given(jobs["MPT"][0])["RUN_NAMES"])[10] == run
        assert not plain & {job.name for cell in cells for job in cell.jobs}


@pytest.mark.parametrize("name", ["table3", "table4", "starts"])
@pytest.mark.parametrize("draws", [Draws(), Draws(balanced=True), Draws(few_dev=True)])
def test_every_few_shot_run_can_be_drawn(name, draws):
    """CB's validation split has 28 examples, fewer than k = 32."""
    _, cells = planned(name, suites.PAPER, draws=draws, seeds=1)
    runs = {run.name for cell in cells for job in cell.jobs for run in job.runs}
    assert all(task_lookup.find_task(run) for run in runs)
    if draws.few_dev:
        assert {"cb_k32_s0", "boolq_k32_s0_dev"} <= runs


def test_repeats_run_the_same_examples_with_other_random_seeds():
    _, cells = planned("table3", shots=(4,), repeats=3)
    pt = next(cell for cell in cells if cell.variant.name == "PT")
    assert len({json.dumps(given(job)["RUN_NAMES"]) for job in pt.jobs}) == 1
    assert [given(job).get("RANDOM_SEED") for job in pt.jobs] == [None, "1042", "2042"]
    assert len({job.name for job in pt.jobs}) == 3
    together = dataclasses.replace(variants.MPT_TOGETHER, source=None)
    _, (cell,) = planned("table1", repeats=2, seeds=2, variants=(together,), toy={})
    seeds = {given(job)["RANDOM_SEED"] for job in cell.jobs}
    assert seeds == {"42", "43", "1042", "1043"}


def test_repeats_are_averaged_and_their_spread_is_apart():
    by_seed = [{"accuracy": [50.0, 54.0]}, {"accuracy": [60.0, 60.0]}]
    assert results.over_repeats(by_seed) == {"accuracy": [52.0, 60.0]}
    # Variances 8 and 0 of two repeats each.
    assert results.repeat_stds(by_seed) == {"accuracy": pytest.approx(2.0)}
    assert results.repeat_stds([{"accuracy": [50.0]}]) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--balanced"], "--balanced would have no effect: table 'table1' trains on all"),
        (["table3", "--few-dev"], "--few-dev would have no effect: the toy suite does not select"),
        (["table3", "--balanced", "--few-dev", "--suite", "paper"], "cannot be combined"),
    ],
)
def test_paper_command_condition_without_effect_fails(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--suite", "toy", *arguments, "--root", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# --- Baselines that train the backbone -----------------------------------------------------------


def test_fine_tuning_evaluates_the_trained_backbone_of_each_run():
    _, cells = planned("table1", suites.PAPER)
    for cell in cells[:2]:
        assert len(cell.jobs) == 13 * 3 and not cell.sources
        for job, test in zip(cell.jobs, cell.tests, strict=True):
            bound = given(test)
            assert bound["INITIAL_CHECKPOINT_PATH"].endswith(f'{job.name}/backbone"')
            assert "INITIAL_ARTIFACT" not in bound and test.runs == job.runs
            assert given(job)["BATCH_SIZE"] == "32" and cell.variant.method in test.files
    assert [cell.variant.name for cell in cells[:2]] == ["full fine-tuning", "BitFit"]


# --- Notes ---------------------------------------------------------------------------------------


def test_binomial_interval_matches_known_values():
    """Clopper and Pearson's interval: closed forms at the ends, and a tabulated value."""
    low, high = footnotes.binomial_interval(0.0, 28)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 28)))
    low, high = footnotes.binomial_interval(1.0, 28)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 28)), 1.0)
    assert footnotes.binomial_interval(0.5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def test_small_test_splits_show_their_sampling_error():
    table = tables.get_table("table1").on(suites.PAPER)
    suites.PAPER.register()
    scores = {task: [80.0, 82.0] for task in suites.PAPER.tasks.values()}
    rows = footnotes.sampling_rows(table, suites.PAPER, {("MPT", None): result("MPT", scores)})
    by_name = {row[0]: row for row in rows[1:]}
    assert {"RTE", "WSC", "CB", "MRPC"} <= set(by_name) and "MNLI" not in by_name
    assert by_name["CB"][2] == "28" and by_name["RTE"][2] == "139" and by_name["WSC"][2] == "52"
    low, high = map(float, by_name["CB"][4].split(" to "))
    assert 60 < low < 66 and 91 < high < 95


def test_draws_without_a_label_are_counted():
    table = tables.get_table("crosspt").on(suites.TOY)
    lines = "\n".join(footnotes.missing_labels(table, suites.TOY))
    assert "at k = 4: 2 of 10 of BoolQ, 8 of 10 of CB, 4 of 10 of MRPC" in lines
    assert "at k = 16: 1 of 10 of CB." in lines and "k = 32" not in lines
    balanced = dataclasses.replace(table, draws=Draws(balanced=True))
    assert footnotes.missing_labels(balanced, suites.TOY) == []


def test_missing_cells_are_named(tmp_path):
    _, cells = planned("table3", root=tmp_path, seeds=1)
    lines = list(footnotes.missing_cells(cells, tmp_path))
    assert len(lines) == len(cells) and "Not run: PT, k = 4: 1 of 1 stages" in lines[0]
    job = tmp_path / cells[0].jobs[0].name
    (job / "artifact").mkdir(parents=True)
    (job / f"checkpoint_{cells[0].jobs[0].steps}").mkdir()
    assert len(list(footnotes.missing_cells(cells, tmp_path))) == len(cells) - 1


def test_costs_show_trained_and_stored_numbers():
    table = tables.get_table("table1").on(suites.TOY)
    made = result("MPT", {task: [70.0, 71.0] for task in ("toy_rte", "toy_cb")})
    made = dataclasses.replace(
        made, stored=76_800.0, operations=8e12, seconds=7200.0, source_seconds=3600.0
    )
    head, row = footnotes.cost_rows(table, suites.TOY, {("MPT", None): made})
    shown = dict(zip(head, row, strict=True))
    # Two tasks with two seeds are four runs.
    assert (shown["trained"], shown["stored"], shown["operations"]) == ("100", "76,800", "2e+12")
    assert (shown["hours"], shown["source hours"]) == ("0.5", "1")


def test_repeat_rows_only_for_repeated_runs():
    table = tables.get_table("table3").on(suites.TOY)
    made = result("MPT", {"toy_cb": [50.0]}, 4)
    assert len(footnotes.repeat_rows(table, suites.TOY, {("MPT", 4): made})) == 1
    tasks = {suites.TOY.tasks[name]: [50.0] for name in table.tasks}
    made = dataclasses.replace(
        result("MPT", tasks, 4),
        repeat_stds={task: {"accuracy": 2.5, "f1": 9.0} for task in tasks},
    )
    rows = footnotes.repeat_rows(table, suites.TOY, {("MPT", 4): made})
    assert dict(zip(rows[0], rows[1], strict=True))["CB"] == "2.5"


@pytest.mark.slow
def test_paper_command_runs_fine_tuning_balanced_draws_and_repeats(tmp_path, monkeypatch, capsys):
    """On toy tasks, but tested in separate stages like the paper's suite."""
    toy_suite = dataclasses.replace(
        suites.TOY,
        files=("gin/tiny.gin",),
        source_steps=2,
        length=lambda task, variant, shots: suites.Length(4, 4, period=2),
        rates={**suites.TOY.rates, "bitfit": 3e-4},
        tested_apart=True,
    )
    monkeypatch.setitem(suites.SUITES, "toy", toy_suite)
    rows = ("full fine-tuning", "BitFit", "PT")
    table = dataclasses.replace(
        tables.get_table("table3"),
        variants=tuple(variants.get_variant(row) for row in rows),
        shots=(4,),
        groups={"mean": ("BoolQ",)},
        seeds=1,
        toy={},
    )
    monkeypatch.setitem(tables.TABLES, "table3", table)
    conditions = ["--balanced", "--repeats", "2", "--root", str(tmp_path)]
    command.main(["table3", "--suite", "toy", *conditions])
    text = capsys.readouterr().out
    assert "not run" not in text.lower()
    assert re.search(r"BitFit +k = 4 +[\d.]+$", text, re.M), "spread over random seeds"
    found = {each.method: each for each in results.load(tmp_path / "table3_balanced_repeats2")}
    tuned, biases, prompts = (found[row] for row in rows)
    assert tuned.parameters == 854_272 and prompts.parameters == prompts.stored == 2_560
    assert 0 < biases.parameters < 10_000
    assert tuned.operations > prompts.operations > biases.operations > 0, "it reads no prompt"
    record = results.read_record(stages.Path(tuned.model_dirs[0]))
    assert len(record["few_shot"]["toy_boolq_k2_per_class_s0"]) == 4

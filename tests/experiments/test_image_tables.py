"""Tables on images: their stages, what runs start from, and a table that is run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex

import gin
import numpy as np
import pytest
from scipy import stats

from mpt_jax.config import gin_utils, trainer_choice
from mpt_jax.experiments import demo, image_demo, results, sequence
from mpt_jax.experiments.paper import __main__ as command
from mpt_jax.experiments.paper import (
    footnotes,
    format,
    image_suites,
    image_variants,
    published,
    sequence_chains,
    tables,
)
from mpt_jax.experiments.stages import Stage
from tests.fixtures.gin_files import ROOT, trained, value
from tests.fixtures.paper_tables import given, result

NAMES = [
    name
    for name, table in tables.TABLES.items()
    if image_suites.TOY_IMAGES in table.suites.values()
]
ELEVATER, TOY = image_suites.IMAGES, image_suites.TOY_IMAGES


def planned(name: str, suite=TOY, **changes):
    table = dataclasses.replace(tables.get_table(name).on(suite), **changes)
    return table, command.cells_of(table, suite, ROOT / "no such folder")


def cell_of(name: str, variant: str, suite=TOY, **changes):
    found = {cell.variant.name: cell for cell in planned(name, suite, **changes)[1]}
    return found[variant]


def parsed(stage: Stage) -> None:
    """Parses a stage's command line as a shell and the job would."""
    trainer_choice.install_fallback()
    line = shlex.split(stage.command(ROOT))
    assert line[:3] == ["python", "-m", f"mpt_jax.{stage.entry}"]
    files = [x.partition("=")[2] for x in line if x.startswith("--gin_file=")]
    bindings = [x.removeprefix("--gin.").replace("=", " = ", 1) for x in line if "--gin." in x]
    with gin_utils.as_main(importlib.import_module(f"mpt_jax.{stage.entry}")):
        gin_utils.parse(files, bindings, (str(ROOT),))


@pytest.fixture(autouse=True)
def _no_gin():
    yield
    gin.clear_config()


# --- stages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_stage_names_mean_the_same_in_all_tables(name):
    """Tables share a root, so that a source stage trains once."""
    known: dict[str, Stage] = {}
    for other in (name, "mvlpt", "clip_mpt"):
        for cell in planned(other, seeds=2)[1]:
            for stage in cell.stages:
                assert known.setdefault(stage.name, stage) == stage
    assert all(len(part) < 256 for stage in known for part in stage.split("/"))


@pytest.mark.parametrize("name", ["mvlpt", "mvlpt_parts", "clip_mpt", "base_to_new"])
def test_published_table_has_every_set(name):
    table, cells = planned(name, ELEVATER)
    runs = {run.task for cell in cells for stage in cell.scored for run in stage.runs}
    assert runs == {ELEVATER.tasks[task] for task in table.tasks}
    assert len(table.tasks) == (22 if name == "base_to_new" else 20)
    assert not {"toy_tint", "toy_gray_texture"} & set(TOY.tasks), "they chose the learning rates"


def test_length_is_the_published_recipe():
    """200 epochs in batches of 32, or of all images if there are fewer."""
    length = lambda name, shots: ELEVATER.length(f"elevater_{name}", image_variants.MVPT, shots)  # noqa: E731
    assert length("cifar100", 20)[:2] == (200 * (2000 // 32), 32)
    assert length("eurosat", 1)[:2] == (200, 10) and length("eurosat", 1).epoch == 1
    assert "STEPS_PER_EPOCH = 62" in length("cifar100", 20).bindings()
    base = ELEVATER.length("coop_ucf101_base", image_variants.COOP_VARIANT, 16)
    assert base.epoch == 16 * 51 // 32


def test_source_stage_trains_the_draws_of_all_seeds_and_targets_start_from_theirs():
    table, cells = planned("mvlpt", seeds=2)
    few = {cell.variant.name: cell for cell in cells if cell.shots == 5}
    (source,) = few["MVPT"].sources
    assert json.loads(given(source)["SEEDS"]) == [1, 2, 3, 4, 5, 6]
    assert json.loads(given(source)["SOURCE_TASKS"]) == list(image_suites.TOY_SOURCES)
    start = json.loads(given(few["MVPT"].jobs[0])["START_FROM"])
    assert set(start) == {f"{task}_k5_per_class_s{s}" for task in table.tasks for s in (0, 1)}
    for run, rows in start.items():
        draws = (1, 2, 3) if run.endswith("s0") else (4, 5, 6)
        assert rows == {
            f"{task}_k20_per_class_s{draw}": 1.0
            for task in image_suites.TOY_SOURCES
            for draw in draws
        }
    assert "START_FROM" not in given(few["VPT"].jobs[0])
    assert given(few["VPT"].jobs[0])["INITIAL_ARTIFACT"] == "None"
    shared = cell_of("mvlpt", "MVPT", ELEVATER, shots=(1,))
    assert json.loads(given(shared.sources[0])["SEEDS"]) == [1, 2, 3]
    assert "START_FROM" not in given(shared.jobs[0]), "the mean of all rows, for every seed"


def test_one_draw_starts_from_that_draw():
    job = cell_of("mvlpt_parts", "MUPT from draw 2", seeds=2).jobs[0]
    for run, rows in json.loads(given(job)["START_FROM"]).items():
        draw = 2 if "_s0" in run else 5
        assert set(rows) == {f"{task}_k20_per_class_s{draw}" for task in image_suites.TOY_SOURCES}


def test_transfer_starts_every_target_from_one_task_of_the_table():
    table, cells = planned("mvlpt_transfer", seeds=2)
    assert len(cells) == len(table.tasks) + 1
    for cell in cells[:-1]:
        source, job = cell.sources[-1], cell.jobs[0]
        assert json.loads(given(source)["SOURCE_TASKS"]) == list(table.tasks)
        assert given(source)["SEEDS"] == "[1, 2]"
        start = json.loads(given(job)["START_FROM"])
        assert len(start) == 2 * len(table.tasks)
        assert start["toy_digits_k5_per_class_s1"] == {
            f"{cell.variant.start}_k20_per_class_s2": 1.0
        }
        assert TOY.start_of(cell.variant) == cell.variant.start
    assert len(planned("mvlpt_transfer", ELEVATER)[0].variants) == 3 * 21  # 20 x 20, three methods


def test_mpt_has_teachers_of_the_same_draws():
    teachers, source = cell_of("clip_mpt", "MPT", seeds=3).sources
    assert given(teachers)["SEEDS"] == given(source)["SEEDS"] == "[1, 2, 3]"
    assert given(source)["TEACHERS"] == f'"{ROOT / "no such folder" / teachers.name / "artifact"}"'
    alone = cell_of("clip_mpt", "MPT, no distillation", seeds=3)
    assert len(alone.sources) == 1 and given(alone.sources[0])["DISTILLATION"] == "None"
    assert "DISTILLATION" not in given(alone.jobs[0])


def test_new_classes_are_tested_with_the_prompts_of_base_classes():
    table, _ = planned("base_to_new")
    cell = cell_of("base_to_new", "CoOp", seeds=2)
    (job,), (test,) = cell.jobs, cell.tests
    assert all(run.task.endswith("_base") for run in job.runs)
    assert {run.task for run in test.runs} == set(table.held_out)
    start = json.loads(given(test)["START_FROM"])
    assert start["toy_digits_new_s1"] == "toy_digits_base_k5_per_class_s1"
    assert cell.scored == (job, test)
    tested = cell_of("base_to_new", "CoOp", ELEVATER, seeds=1)
    assert all(stage.entry == "eval" for stage in tested.scored)


def test_method_without_training_is_evaluated_once_for_all_seeds():
    (stage,) = cell_of("mvlpt", "zero-shot", seeds=3).stages
    assert json.loads(given(stage)["RUN_NAMES"]) == list(image_suites.TOY_TARGETS)
    assert len(stage.runs) == 3 * len(image_suites.TOY_TARGETS)
    assert cell_of("mvlpt", "zero-shot", seeds=3).jobs == ()


# --- commands --------------------------------------------------------------------------------

MVPT_NUMBERS = 5 * 4 * 4 * 128  # tasks, layers, tokens, width of the tiny CLIP
EXPECTED = {
    ("mvlpt", "CoOp"): 5 * 4 * 128,
    ("mvlpt", "MCoOp"): 5 * 4 * 128,
    ("mvlpt", "VPT"): MVPT_NUMBERS,
    ("mvlpt", "MVPT"): MVPT_NUMBERS,
    ("mvlpt_parts", "M(CoOp + VPT)"): 5 * 4 * 128 + MVPT_NUMBERS,
    ("clip_mpt", "shared prompt"): 5 * 4 * 128 + MVPT_NUMBERS,
    # P*, and U [P, 1] and V [1, H] at each site.
    ("clip_mpt", "MPT"): 5 * (4 * 128 + 4 + 128) + 5 * (16 * 128 + 16 + 128),
    ("clip_mpt", "MPT, text, no distillation"): 5 * (4 * 128 + 4 + 128),
    ("clip_mpt", "MPT, image, no distillation"): 5 * (16 * 128 + 16 + 128),
    ("clip_mpt", "MPT, tied layers, no distillation"): 5 * (4 * 128 + 4 + 128)
    + 5 * (16 * 128 + 4 + 128),
}


@pytest.mark.parametrize(("name", "variant"), EXPECTED, ids=lambda x: str(x))
def test_commands_parse_and_count_parameters(name, variant):
    cell = cell_of(name, variant, seeds=1, shots=(5,))
    for stage in (*cell.sources, *cell.jobs):
        parsed(stage)
        count = trained(value("MODEL"))
        gin.clear_config()
    assert count == EXPECTED[name, variant]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_commands_parse(name):
    for cell in planned(name, seeds=1)[1]:
        for stage in cell.stages:
            parsed(stage)
            runs = value("MODEL").runs.run_names
            expected = [run.name for run in stage.runs]
            assert list(runs) == expected or (not expected and len(runs) >= 7), stage.name
            gin.clear_config()


@pytest.mark.parametrize("suite", ["paper", "toy"])
@pytest.mark.parametrize("name", NAMES)
def test_print_and_collect_work_without_results(name, suite, tmp_path, capsys):
    arguments = [name, "--suite", suite, "--seeds", "2", "--root", str(tmp_path)]
    command.main([*arguments, "--print"])
    assert capsys.readouterr().out.startswith("python -m mpt_jax.")
    command.main([*arguments, "--collect"])
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multilane", "--suite", "toy", "--seeds", "11"], "orders 0 to 9, and 10 was asked for"),
        (["multilane", "--suite", "toy", "--repeats", "2"], "--repeats would have no effect"),
        (["mvlpt", "--suite", "toy", "--labels", "digits"], "no versions with digits"),
        (["mvlpt", "--suite", "toy", "--balanced"], "--balanced would have no effect"),
    ],
)
def test_arguments_without_effect_fail(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--print", "--root", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_new_lane_starts_from_the_lane_before_or_the_mean_of_its_sequence():
    names = [["a_1", "a_2", "a_3"], ["b_1", "b_2", "b_3"]]
    assert sequence.start_from(names, 3)["b_3"] == "b_2"
    mean = sequence.start_from(names, 3, mean=True)
    assert mean == {
        **{x: x for x in ("a_1", "a_2", "b_1", "b_2")},
        "a_3": {"a_1": 1.0, "a_2": 1.0},
        "b_3": {"b_1": 1.0, "b_2": 1.0},
    }
    from_mean = cell_of("multilane", "lanes start from the mean", seeds=2)
    assert "sequence.start_from.mean" in given(from_mean.jobs[0])


def test_tasks_at_once_see_as_many_images_as_one_after_another():
    for suite, tasks in ((TOY, 4), (ELEVATER, 5)):
        single = cell_of("multilane", "MULTI-LANE", suite, seeds=2).jobs[0]
        joint = cell_of("multilane", "all tasks at once", suite, seeds=2).jobs[0]
        assert joint.steps == tasks * single.steps
        assert int(given(joint)["BATCH_SIZE"]) % tasks == 0


def test_transfer_sources_train_each_task_equally():
    source = cell_of("mvlpt_transfer", "CoOp from toy_shape", seeds=1).sources[-1]
    parsed(source)
    assert type(value("SAMPLER")).__name__ == "EqualQuotas"
    assert set(value("PROMPT").parts) == {"text_context"}


def test_hours_are_per_trained_run():
    table, _ = planned("base_to_new", seeds=2)
    found = {("CoOp", 5): result("CoOp", {task: [50.0, 60.0] for task in table.tasks}, 5)}
    found["CoOp", 5] = dataclasses.replace(found["CoOp", 5], seconds=3600.0 * 6)
    head, row = footnotes.cost_rows(table, TOY, found)
    assert row[head.index("hours")] == "1", "three tasks and two seeds are trained"


def test_sequences_have_a_stage_for_each_task_and_an_order_for_each_seed():
    cell = cell_of("multilane", "MULTI-LANE", seeds=3)
    assert isinstance(cell, sequence_chains.SequenceCell) and len(cell.jobs) == 4
    sequences = json.loads(given(cell.jobs[0])["SEQUENCES"])
    assert sequences[0] == [f"toy_many_{i}" for i in (1, 2, 3, 4)] and len(sequences) == 3
    for step, job in enumerate(cell.jobs, 1):
        assert given(job)["STEP"] == str(step) and len(job.runs) == 3 * step
        if step > 1:
            assert cell.jobs[step - 2].name in given(job)["INITIAL_ARTIFACT"]
    voc = cell_of("multilane", "MULTI-LANE", ELEVATER, seeds=2).jobs[-1]
    assert [run.name for run in voc.runs] == [
        f"voc2007_b0_c4_{task}_s{seed}" for seed in (0, 1) for task in range(1, 6)
    ]
    together = cell_of("multilane", "all tasks at once", seeds=3)
    assert len(together.jobs) == 1 and given(together.jobs[0])["STEP"] == "4"


# --- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvlpt", "base_to_new"])
def test_format_text_shows_every_published_row(name):
    table = tables.get_table(name).on(ELEVATER)
    text = format.text(table, ELEVATER, {}, {})
    rows = published.rows(name)
    assert rows and "T5" not in text
    for row in rows:
        found = [x for x in text.splitlines() if x.startswith(f"{row.name} ({row.source})")]
        assert len(found) >= len(table.shots) and any(re.search(r"\d\.\d", x) for x in found)


def test_format_text_shows_the_harmonic_mean_of_each_seed():
    table = tables.get_table("base_to_new").on(TOY)
    base, new = [80.0, 90.0], [60.0, 40.0]
    values = {task: new if task in table.held_out else base for task in table.tasks}
    text = format.text(table, TOY, {("CoOp", 5): result("CoOp", values, 5)}, {})
    line = next(x for x in text.splitlines() if x.startswith("CoOp "))
    means = stats.hmean([base, new], axis=0)
    assert f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}" in line
    assert "harmonic mean" in text


# --- running ---------------------------------------------------------------------------------


SHORT = dataclasses.replace(
    TOY,
    source_steps=2,
    sequence_steps=2,
    length=lambda task, variant, shots: image_suites.Length(steps=2, rows=4, epoch=1),
)


@pytest.fixture
def small(monkeypatch):
    """Makes all stages of the toy suite a few steps long."""

    def use(name: str, *names: str, **changes):
        table = tables.get_table(name)
        kept = tuple(x for x in table.on(TOY).variants if x.name in names)
        toy = {**table.toy, "variants": kept, **changes}
        monkeypatch.setitem(
            tables.TABLES, name, dataclasses.replace(table, toy=toy, suites={"toy": SHORT})
        )

    return use


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "changes"),
    [
        ("mvlpt", ("zero-shot", "linear probe", "CoOp", "MCoOp", "MUPT"), {"shots": (1,)}),
        ("base_to_new", ("zero-shot", "CoOp", "CoCoOp"), {}),
        ("mvlpt_transfer", ("CoOp", "CoOp from toy_shape"), {}),
        ("clip_mpt", ("MPT", "shared prompt"), {}),
        ("multilane", ("MULTI-LANE", "lanes start from the mean", "all tasks at once"), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_table_runs_and_prints_its_rows(name, rows, changes, small, tmp_path, capsys):
    small(name, *rows, **changes)
    arguments = [name, "--suite", "toy", "--seeds", "2", "--root", str(tmp_path)]
    command.main(arguments)
    text = capsys.readouterr().out
    assert "not run" not in text.lower() and "tiny_clip" in text
    for row in rows:
        assert any(line.startswith(row) for line in text.splitlines())
    command.main([*arguments, "--print"])
    assert not capsys.readouterr().out.strip(), "finished stages are not run again"


def test_demo_runs_rows_of_the_table_on_fewer_tasks():
    chosen = image_demo.table()
    assert [x.name for x in chosen.variants] == ["zero-shot", "CoOp", "VPT", "MVPT"]
    assert set(chosen.tasks) < set(image_suites.TOY_TARGETS) and chosen.seeds == 3
    cells = command.cells_of(chosen, TOY, ROOT / "no such folder")
    assert json.loads(given(cells[-1].sources[0])["SEEDS"]) == list(range(1, 10))


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(image_demo.image_suites, "TOY_IMAGES", SHORT)
    monkeypatch.setattr(image_demo, "SEEDS", 1)
    monkeypatch.setattr(image_demo, "TARGETS", ("toy_digits",))
    demo.main(["--vision", "--root", str(tmp_path / "demo")])
    text = capsys.readouterr().out
    assert "not run" not in text and "MVPT" in text and "tiny_clip" in text
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Zero-shot and tuned" in page
    assert {x.method for x in results.load(tmp_path / "demo")} == {
        *("zero-shot", "CoOp", "VPT", "MVPT"),
    }

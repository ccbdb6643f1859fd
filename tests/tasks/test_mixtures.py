"""Named mixtures, and the gin file for twelve sources."""

from __future__ import annotations

import gin
import pytest
import seqio

from mpt_jax.tasks import mixtures
from tests.fixtures.gin_files import ROOT, VOCABULARY, bind_vocabulary, parse, value
from tests.fixtures.processes import run_script
from tests.fixtures.suite_rows import ROWS

pytestmark = pytest.mark.usefixtures("own_trainer")

# Rows per epoch in docs/tasks.md and the paper. ReCoRD has one row per answer.
SIX, TWELVE, RECORD_ROWS = 1_151_093, 1_425_899, 138_854


def train_size(name):
    part = ROWS[name].parts["train"]
    size = ROWS[name].sizes[part.split]
    places = part.places(size)
    return size if places is None else len(range(*places.indices(size)))


def test_target_mixtures_have_the_papers_21_tasks():
    targets = [t for name, tasks in mixtures.MIXTURES.items() if "targets" in name for t in tasks]
    assert len(targets) == len(set(targets)) == 8 + 5 + 4 + 4
    assert set(targets) <= set(ROWS)
    assert "record" not in targets and "squad" not in targets  # only sources


@pytest.mark.parametrize("name", mixtures.MIXTURES)
def test_mixture_rates_are_sizes_up_to_cap(name):
    bind_vocabulary("byt5")
    mixture = seqio.get_mixture_or_task(name)
    expected = {task: min(2**18, train_size(task)) for task in mixtures.MIXTURES[name]}
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == expected
    assert mixture.total_rate == sum(expected.values())


def test_leave_one_out_mixtures_omit_one_source():
    expected = {
        "mpt_source_6_without_mnli": {"qqp", "qnli", "sst2", "squad", "record"},
        "mpt_source_6_without_record": {"mnli", "qqp", "qnli", "sst2", "squad"},
        "mpt_source_12_without_agnews": {
            *("mnli", "qqp", "qnli", "sst2", "squad", "record"),
            *("commonsenseqa", "openbookqa", "arc_easy", "anli_r3", "winogrande"),
        },
    }
    assert {name: set(mixtures.MIXTURES[name]) for name in expected} == expected
    for count in (6, 12):
        whole = mixtures.MIXTURES[f"mpt_source_{count}"]
        names = [name for name in mixtures.MIXTURES if f"mpt_source_{count}_without_" in name]
        left_out = [set(whole) - set(mixtures.MIXTURES[name]) for name in names]
        assert sorted(left_out, key=min) == [{task} for task in sorted(whole)]
    bind_vocabulary("byt5")
    mixture = seqio.get_mixture_or_task("mpt_source_6_without_mnli")
    # QQP, at most 2^18; QNLI, SST-2, SQuAD and ReCoRD without the 1,000 rows held out.
    assert mixture.total_rate == 262_144 + 103_743 + 66_349 + 86_599 + 99_730


def test_mixture_rates_by_hand():
    bind_vocabulary("byt5")
    mixture = seqio.get_mixture_or_task("mpt_source_12")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates["mnli"] == rates["qqp"] == 262_144
    assert (rates["agnews"], rates["arc_easy"], rates["anli_r3"]) == (119_000, 2_251, 99_459)


def test_mixture_registered_before_vocabulary_is_bound():
    """Runs in a new process, since this one may have constructed the mixtures already."""
    script = """
import gin, seqio
from mpt_jax.tasks import mixtures
mixture = seqio.get_mixture_or_task("glue_targets")
for _ in range(2):
    try:
        mixture.output_features
    except ValueError as error:
        assert "vocabularies.load.path" in str(error)
    else:
        raise AssertionError
assert mixture.name == "glue_targets"
gin.parse_config('''
from __gin__ import dynamic_registration
from mpt_jax.data import vocabularies
vocabularies.load.path = 'byt5'
''')
assert len(mixture.tasks) == 8 and set(mixture.splits) == {"train", "validation", "test"}
assert not hasattr(mixture, "no_such_thing")
"""
    run_script(script)


def test_gin_source_tasks_match_mixtures():
    parse(["gin/mpt_source.gin"])
    assert value("SOURCE_TASKS") == list(mixtures.MIXTURES["mpt_source_6"])
    gin.clear_config()
    parse(["gin/mpt_source.gin", "gin/runs/source_tasks_12.gin"])
    assert value("SOURCE_TASKS") == list(mixtures.MIXTURES["mpt_source_12"])


@pytest.mark.parametrize(("name", "total"), [("mpt_source_6", SIX), ("mpt_source_12", TWELVE)])
def test_source_mixtures_total_size(name, total):
    tasks = mixtures.MIXTURES[name]
    assert sum(RECORD_ROWS if task == "record" else train_size(task) for task in tasks) == total


STAGES = {
    "gin/mpt_source.gin": ("mpt_source_12", [], 32, 5 * (TWELVE // 32)),
    "gin/pt_source.gin": (
        "pt_source_12",
        ["BATCH_SIZE = 384", "TRAIN_STEPS = 18566"],
        384,
        5 * TWELVE // 384,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_source_tasks_12_gin_replaces_six_sources(stage, monkeypatch):
    monkeypatch.setenv("MPT_JAX_ROOT", "root")
    name, bindings, batch_size, steps = STAGES[stage]
    own = [f"STAGE = {name!r}", VOCABULARY, *bindings]
    parse([stage, "gin/runs/source_tasks_12.gin"], own)
    assert (value("BATCH_SIZE"), value("TRAIN_STEPS")) == (batch_size, steps)
    assert value("MODEL_DIR") == f"root/{name}"
    runs = value("MODEL").runs
    assert runs.task_names == tuple(mixtures.MIXTURES["mpt_source_12"])
    assert runs.num_groups == (12 if stage == "gin/pt_source.gin" else 1)
    if stage == "gin/mpt_source.gin":
        assert value("TEACHERS") == "root/pt_source_12/artifact"
    value("SAMPLER").check(12)


def test_source_tasks_12_gin_header_and_error_show_tested_commands():
    text = (ROOT / "gin" / "runs" / "source_tasks_12.gin").read_text()
    parse(["gin/mpt_source.gin", "gin/runs/source_tasks_12.gin"])
    for part in ("pt_source_12", "BATCH_SIZE=384", "TRAIN_STEPS=18566", "gin/pt_source.gin"):
        assert part in text.split("# Provides")[0]
        assert part in value("TEACHERS_COMMAND")


def test_source_tasks_command_line_omits_one_source():
    """As in docs/tasks.md, with five epochs over the remaining sources."""
    left = [task for task in mixtures.MIXTURES["mpt_source_6"] if task != "squad"]
    text = (ROOT / "docs" / "tasks.md").read_text()
    steps = 5 * ((SIX - train_size("squad")) // 32)
    assert f'--gin.SOURCE_TASKS="{left!r}" --gin.TRAIN_STEPS={steps}' in text
    parse(["gin/mpt_source.gin"], [f"SOURCE_TASKS = {left!r}", VOCABULARY])
    assert value("MODEL").runs.task_names == tuple(left)


def test_task_modules_binding_lists_every_suite():
    parse(["gin/mpt_source.gin"])
    stems = {
        path.stem
        for path in (ROOT / "mpt_jax" / "tasks").glob("*.py")
        if "ROWS = (" in path.read_text()
    }
    assert set(value("TASK_MODULES")) == {f"mpt_jax.tasks.{stem}" for stem in stems}

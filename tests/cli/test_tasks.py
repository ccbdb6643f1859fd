"""`mpt-jax tasks`, and the `mpt-jax` command's help."""

from __future__ import annotations

import io
import json

import gin
import pytest
import sentencepiece
import seqio
from rich.console import Console

from mpt_jax.cli import main, registered_tasks, tasks
from mpt_jax.tasks import (  # noqa: F401
    few_shot,
    glue,
    splits,
    super_glue,
    text_metrics,
    toy,
    toy_vocabulary,
)
from mpt_jax.tasks import files as jsonl
from tests.fixtures import tfds_data
from tests.fixtures.processes import ROOT, run_command, run_script


@pytest.fixture(autouse=True)
def no_run():
    gin.clear_config()


@pytest.fixture
def folder(tmp_path):
    tfds_data.write(tmp_path, "super_glue/cb:1.0.2")
    return tmp_path


def cells(text: str) -> list[list[str]]:
    """The columns of every line of a plain table."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]


# --- list ------------------------------------------------------------------------------------


def test_tasks_list_prints_one_line_per_task(data_dir, capsys):
    registered_tasks.list_tasks({"some": ["cb", "boolq_digits", "toy_cb"], "none": []})
    title, headers, *lines = cells(capsys.readouterr().out)
    assert title == ["some"]
    assert headers == ["task", "data set", "rows", "metrics", "here"]
    assert lines[:3] == [
        [
            *("cb", "super_glue/cb:1.0.2", "train 250, validation 28, test 28"),
            *("accuracy, f1, invalid", "yes; train has 9, published 250"),
        ],
        [
            *("boolq_digits", "super_glue/boolq:1.0.2"),
            *("train 9,427, validation 1,635, test 1,635", "accuracy, invalid", "no"),
        ],
        [
            *("toy_cb", "made by a function", "train 2,000, validation 200, test 200"),
            *("accuracy, f1, invalid", "yes"),
        ],
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"train": 9, "validation": 56}, "yes"),
        # The task takes 5 of train, of 9 as of 10; which ones they are differs.
        ({"train": 10, "validation": 56}, "yes; train has 9, published 10"),
        (
            {"train": 9, "validation": 1_056, "test": 2},
            "yes; validation has 56, published 1,056; test has 0, published 2",
        ),
    ],
)
def test_tasks_list_marks_unpublished_split_sizes(sizes, expected, data_dir, monkeypatch, capsys):
    source = splits.PartsSource("super_glue/cb:1.0.2", splits.carved(held_out=1, most=5), sizes)
    monkeypatch.setattr(seqio.TaskRegistry.get("cb"), "_source", source)
    registered_tasks.list_tasks({"some": ["cb"]})
    assert cells(capsys.readouterr().out)[2][-1] == expected


def test_tasks_list_seqio_sources_are_described(tmp_path, data_dir, capsys):
    for name, version in (("lst_here", "1.0.2"), ("lst_gone", "9.9.9")):
        source = seqio.TfdsDataSource(f"super_glue/cb:{version}")
        seqio.TaskRegistry.add(name, source=source, output_features={}, preprocessors=[])
    registered_tasks.list_tasks({"mine": ["lst_here", "lst_gone"]})
    _, _, here, gone, _ = cells(capsys.readouterr().out)
    assert here == ["lst_here", "super_glue/cb:1.0.2", "train 9, validation 56", "none", "yes"]
    assert gone == ["lst_gone", "super_glue/cb:9.9.9", "none", "no"]


def test_tasks_list_user_files_are_described(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n')
    files = {"train": tmp_path / "rows.jsonl"}
    jsonl.register("lst_file", inputs="{a}", targets="{b}", **files)
    registered_tasks.list_tasks({"mine": ["lst_file"]})
    line = cells(capsys.readouterr().out)[2]
    assert line[0] == "lst_file" and str(tmp_path / "rows.jsonl") in line[1]
    assert line[2] == "train 1" and line[4] == "yes"


def test_tasks_list_on_terminal_prints_table(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr(tasks, "Console", lambda: console)
    registered_tasks.list_tasks({"some": ["toy_cb"]})
    text = console.file.getvalue()
    assert "┃ task" in text and "│ toy_cb" in text and "train 2,000, validation 200" in text


# --- show ------------------------------------------------------------------------------------


def test_tasks_show_prints_examples_with_lengths(capsys):
    tasks.main(["show", "toy_boolq_k4_s0", "-n", "2"])
    title, headers, *lines = cells(capsys.readouterr().out)
    assert title == [
        "toy_boolq_k4_s0, train; metrics (the first selects the best step): accuracy, f1, invalid"
    ]
    assert headers == ["input tokens", "target tokens", "targets", "inputs"]
    rows = [toy.rows("toy_boolq", "train")[i] for i in (1795, 732)]  # of the published draw
    # The toy vocabulary has a piece for each word; EOS is one more.
    expected = [[str(len(i.split()) + 1), str(len(t.split()) + 1), t, i] for i, t in rows]
    assert lines[:2] == expected and len(lines) == 3


def test_tasks_show_without_vocabulary_omits_lengths(data_dir, capsys):
    tasks.main(["show", "cb", "-n", "1", "--split", "validation"])
    _, headers, line, _ = cells(capsys.readouterr().out)
    assert headers == ["targets", "inputs"]
    target, text = line
    place = int(text.rpartition(" ")[2])
    assert text == f"cb premise: premise {place} hypothesis: hypothesis {place}"
    assert target == ("entailment", "contradiction", "neutral")[place % 3]


def test_tasks_show_given_vocabulary_counts_tokens(data_dir, capsys):
    tasks.main(["show", "cb", "-n", "1", "--vocabulary", "byt5"])
    _, _, line, _ = cells(capsys.readouterr().out)
    inputs, targets = line[3], line[2]
    assert line[:2] == [str(len(inputs) + 1), str(len(targets) + 1)]  # bytes and EOS


def test_tasks_show_gives_share_of_unknown_tokens(data_dir, capsys):
    model = str(toy_vocabulary.VOCABULARY_PATH)  # without digits
    tasks.main(["show", "cb", "-n", "1", "--vocabulary", model])
    _, _, line, _ = cells(capsys.readouterr().out)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = processor.EncodeAsIds(line[3])
    unknown = ids.count(processor.unk_id())
    assert unknown
    assert line[0] == f"{len(ids) + 1} ({100 * unknown / len(ids):.0f}% <unk>)"


def test_tasks_list_user_modules_and_data_folder(data_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "lst_mine.py").write_text(
        "import seqio\n"
        "task = seqio.TaskRegistry.get('toy_cb')\n"
        "seqio.TaskRegistry.add_provider('lst_mine_cb', task.replace(name='lst_mine_cb'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seqio.set_tfds_data_dir_override(None)
    tasks.main(["list", "--modules", "lst_mine", "--tfds_data_dir", str(data_dir)])
    text = capsys.readouterr().out
    assert text.startswith("lst_mine\n") or "\nlst_mine\n" in text
    assert "lst_mine_cb" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "toy_bolq"], "Unknown task 'toy_bolq'. Did you mean 'toy_boolq'"),
        (["show", "toy_boolq", "-n", "0"], "-n must be positive, got 0"),
        (["show", "toy_boolq", "--split", "dev"], "has no 'dev' split; it has train"),
        (["show", "boolq"], "tfds build super_glue/boolq:1.0.2"),
        (["show", "toy_boolq_k9999_s0"], "has 2,000 rows"),
        (["show", "toy_boolq", "--vocabulary", "no/such"], "There is no vocabulary at no/such"),
        (["list", "--modules", "no_such"], "The task suite no_such cannot be imported"),
    ],
)
def test_tasks_invalid_arguments_print_one_line(arguments, message, data_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        tasks.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    # TensorFlow Datasets may warn about a missing folder, once per process.
    (line,) = [x for x in captured.err.splitlines() if "file_utils.py" not in x]
    assert message in line and line.startswith("mpt-jax tasks: ") and not captured.out


# --- the command line ------------------------------------------------------------------------


def test_tasks_list_shows_all_suites_and_local_module(tmp_path):
    (tmp_path / "my_tasks.py").write_text(
        "import seqio\n"
        "source = seqio.FunctionDataSource(lambda split, shuffle_files: None, ['train'])\n"
        "seqio.TaskRegistry.add('mine', source=source, output_features={}, preprocessors=[])\n"
    )
    listing = ("tasks", "list", "--modules", "my_tasks")
    child = run_command(*listing, cwd=tmp_path, PYTHONPATH=str(ROOT))
    tables = {block.split("\n")[0]: block for block in child.stdout.split("\n\n")}
    for module, name in [
        *[
            ("mpt_jax.tasks.glue", "mnli"),
            ("mpt_jax.tasks.super_glue", "wsc_digits"),
            ("mpt_jax.tasks.mrqa", "newsqa"),
        ],
        *[
            ("mpt_jax.tasks.mpt_others", "paws"),
            ("mpt_jax.tasks.toy", "toy_d2t"),
            ("my_tasks", "mine"),
        ],
    ]:
        assert f"\n{name} " in tables[module]


def test_index_holds_what_the_registry_holds(tmp_path):
    script = (
        "import json; from mpt_jax.cli import registered_tasks as r; print(json.dumps(r.index()))"
    )
    printed = run_script(script, TFDS_DATA_DIR=str(tmp_path)).splitlines()[-1]
    assert json.loads(tasks.INDEX.read_text()) == json.loads(printed), (
        "run `python -m mpt_jax.cli.registered_tasks`"
    )


def test_tasks_list_from_index_equals_list_of_registry(data_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "nothing.py").touch()
    listing = ("tasks", "list", "--tfds_data_dir", str(tmp_path))
    fast = run_command(*listing, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
    slow = run_command(*listing, "--modules", "nothing", cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
    assert fast == slow and "  no\n" in fast and "  yes\n" in fast


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["list"]])
def test_tasks_without_data_do_not_import_tensorflow(arguments, tmp_path):
    script = (
        "import sys; sys.modules['tensorflow'] = sys.modules['jax'] = None\n"
        f"sys.argv = ['mpt-jax', 'tasks', *{arguments}]\n"
        "from mpt_jax.cli.main import main; main()"
    )
    printed = run_script(script, TFDS_DATA_DIR=str(tmp_path))
    assert "usage: mpt-jax tasks" in printed or "mpt_jax.tasks.glue\n" in printed


def test_tasks_list_with_data_compares_its_size(data_dir, capsys):
    tasks.main(["list", "--tfds_data_dir", str(data_dir)])
    assert tasks._has_data(str(data_dir)) and not tasks._has_data(str(data_dir / "super_glue"))


def test_metric_names_are_those_of_the_values():
    labels = ["no", "yes"]
    targets = ["yes", "no", "yes"]
    for make in (text_metrics.f1, text_metrics.macro_f1, text_metrics.matthews):
        values = make(labels)(targets, targets)
        names = [name for name in values if not name.endswith("_undefined")]
        assert list(text_metrics.value_names(text_metrics.of_task("x", make(labels)))) == names
    values = text_metrics.correlations(["1", "2"], ["1", "2"])
    names = [name for name in values if not name.endswith("_undefined")]
    assert list(text_metrics.value_names(text_metrics.correlations)) == names
    answers = [{"answers": ["a"], "group": ""}]
    values = text_metrics.answer_overlap(answers, ["a"])
    assert text_metrics.value_names(text_metrics.answer_overlap) == tuple(values)


def test_help_without_tensorflow_lists_commands(tmp_path):
    script = "import sys; sys.modules['tensorflow'] = None; sys.argv = ['x', '--help']\n"
    printed = run_script(script + "from mpt_jax.cli.main import main; main()")
    assert all(f"  {command}" in printed for command in main.COMMANDS)

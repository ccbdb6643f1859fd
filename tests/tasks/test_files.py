"""Tasks from files: the examples of every format, the errors, and training."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import seqio
from etils import epath

from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.sampling import EqualQuotas, task_mixture
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import file_readers, file_sources, files
from tests.fixtures import gin_files

ROOT = Path(__file__).resolve().parents[2]
QUESTION = {"inputs": "{q}", "targets": "{a}"}


@pytest.fixture(autouse=True)
def registry():
    """Removes the tasks of each test."""
    before = seqio.TaskRegistry.names(), seqio.MixtureRegistry.names()
    yield
    for names, registry in zip(before, (seqio.TaskRegistry, seqio.MixtureRegistry), strict=True):
        for name in registry.names() - names:
            registry.remove(name)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def read(
    name: str,
    inputs: str = "{q}",
    targets: str = "{a}",
    words: dict | None = None,
    quoting: bool = False,
):
    templates = file_readers.Template("inputs", inputs), file_readers.Template("targets", targets)
    found = file_readers.read(epath.Path(name), *templates, words or {}, quoting)
    return list(zip(found.inputs, found.targets, strict=True))


def examples(name: str, split: str) -> list[tuple[str, str]]:
    source = seqio.TaskRegistry.get(name).source
    rows = source.get_dataset(split).as_numpy_iterator()
    return [(row["inputs"].decode(), row["targets"].decode()) for row in rows]


# --- Reading ---------------------------------------------------------------------------------

ROWS = [
    {"q": "is it red ?", "a": "yes", "n": 3},
    {"q": "first line\nsecond | \"quoted\", naïve – 東京", "a": "no", "n": 4},
    {"q": "a\ttab", "a": "no", "n": 5},
]  # fmt: skip
EXPECTED = [(f"q: {row['q']} n: {row['n']}", row["a"]) for row in ROWS]


def as_csv(delimiter: str, end: str = "\n") -> str:
    quoted = lambda text: '"' + str(text).replace('"', '""') + '"'  # noqa: E731
    lines = [["q", "a", "n"], *([quoted(row[key]) for key in ("q", "a", "n")] for row in ROWS)]
    return "".join(delimiter.join(line) + end for line in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("crlf.jsonl", "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("mark.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)),
        ("x.csv", as_csv(",")),
        ("mark.CSV", "\ufeff" + as_csv(",", "\r\n") + "\n\n"),
        ("x.tsv", as_csv("\t")),
    ],
)
def test_read_every_text_format_same_examples(name, content):
    Path(name).write_bytes(content.encode())
    assert read(name, "q: {q} n: {n}", quoting=name.endswith("tsv")) == EXPECTED


def test_read_parquet_same_examples():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), "x.parquet", row_group_size=2)
    assert read("x.parquet", "q: {q} n: {n}") == EXPECTED


def test_read_jsonl_numbers_unchanged_and_booleans_as_in_json():
    line = '{"q": [1], "a": 1.50, "big": 12345678901234567890123, "e": 1E5, "t": true, "f": false}'
    write("x.jsonl", line)
    (found,) = read("x.jsonl", "{big} {e} {t} {f}")
    assert found == ("12345678901234567890123 1E5 true false", "1.50")


def test_template_dotted_field_prefers_exact_name_then_nested():
    write("x.jsonl", {"doc": {"title": {"en": "hat"}}, "a.b": "dotted", "a": {"b": "nested"}})
    assert read("x.jsonl", "{doc.title.en} {{x}} {a.b}", "{a.b}") == [("hat {x} dotted", "dotted")]


def test_read_strips_surrounding_white_space():
    write("x.jsonl", {"q": "  wide  inside ", "a": " yes\n"})
    assert read("x.jsonl", words={"yes": "yes", "no": "no"}) == [("wide  inside", "yes")]


# --- Errors ----------------------------------------------------------------------------------

LABELS = {"yes": "yes", "no": "no"}
GOOD = '{"q": "x", "a": "yes"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nope", "line 2: not JSON: Expecting value, at character 1"),
        ('{"q": "x", "a": "yes"', "line 2: not JSON: Expecting ',' delimiter, at character 22"),
        ('["x", "yes"]', "line 2: not a JSON object: '[\"x\", \"yes\"]'"),
        ("3", "line 2: not a JSON object: '3'"),
        ('{"q": "x", "b": 1}', "line 2, field 'a': missing; the row has q, b"),
        ('{"q": null, "a": "yes"}', "line 2, field 'q': missing: it is null"),
        ('{"q": NaN, "a": "yes"}', "line 2, field 'q': missing: it is null"),
        ('{"q": "x", "a": "  "}', "line 2, field 'a': empty"),
        ('{"q": "", "a": "yes"}', "line 2, field 'q': empty"),
        ('{"q": "x", "a": "maybe"}', "field 'a': 'maybe' is not one of the labels 'yes', 'no'"),
        ('{"q": ["x", "y"], "a": "yes"}', "line 2, field 'q': a list of 2"),
        ('{"q": {"en": "x"}, "a": "yes"}', "line 2, field 'q': an object, .*: en"),
        ('{"q": "\\ud83d", "a": "yes"}', "line 2, field 'q': contains half of a surrogate pair"),
    ],
)  # fmt: skip
def test_read_bad_line_error_names_line_and_field(line, message):
    write("x.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=r"x\.jsonl: 1 of 3 rows cannot be used") as error:
        read("x.jsonl", words=LABELS)
    assert re.search(message.replace("[", r"\["), str(error.value)), error.value


@pytest.mark.parametrize(
    ("name", "header"), [("x.jsonl", b""), ("x.csv", b"q,a\n"), ("x.tsv", b"q\ta\n")]
)
def test_read_invalid_utf8_error_names_line_and_byte(name, header):
    good, bad = b'{"q": "x", "a": "y"}\n', '{"q": "naïve", "a": "y"}\n'.encode("latin-1")
    if header:
        sep = header[1:2]
        good, bad = b"x" + sep + b"y\n", "naïve".encode("latin-1") + sep + b"y\n"
    Path(name).write_bytes(header + good + bad)
    line = 3 if header else 2
    with pytest.raises(ValueError, match=f"line {line}: not UTF-8: the byte 0xef; save"):
        read(name)


def test_read_many_bad_rows_error_counts_all_and_lists_ten():
    write("x.jsonl", *[GOOD, "nope"] * 13)
    with pytest.raises(ValueError, match=r"13 of 26 rows") as error:
        read("x.jsonl")
    shown = re.findall(r"line (\d+):", str(error.value))
    assert [int(number) for number in shown] == list(range(2, 22, 2))
    assert str(error.value).endswith("and 3 more")


def test_read_csv_errors_use_line_numbers_of_file():
    """Cells that span lines, and blank lines, count as in an editor."""
    write("x.csv", "q,a", '"one\ntwo\nthree",yes', "", "x,maybe", '"p\nq",maybe', "x,yes,no", "x")
    with pytest.raises(ValueError, match="4 of 5 rows") as error:
        read("x.csv", words=LABELS)
    found = re.findall(r"line (\d+)(?:, field 'a')?: (.*)", str(error.value))
    assert [int(line) for line, _ in found] == [6, 7, 9, 10]
    assert found[2][1] == "3 cells, but the header has 2"
    assert found[3][1] == "1 cells, but the header has 2"


def test_read_csv_unclosed_quote_raises():
    write("x.csv", "q,a", "x,yes", '"x,yes', "x,yes")
    with pytest.raises(ValueError, match="line 3: unexpected end of data; the rest of the file"):
        read("x.csv")


def test_read_csv_bad_header_raises():
    write("x.csv", "q,a,a", "x,y,z")
    with pytest.raises(ValueError, match="line 1: the header repeats the columns a"):
        read("x.csv")
    write("x.csv", "q;a", "x;y")
    with pytest.raises(ValueError, match="line 2, field 'q': missing; the row has q;a"):
        read("x.csv")


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", ""), ("x.csv", "q,a\n"), ("x.tsv", "")])
def test_read_empty_file_raises(name, content):
    Path(name).write_text(content)
    with pytest.raises(ValueError, match=r"x\.\w+ contains no rows"):
        read(name)


def test_read_parquet_bad_rows_and_files_raise():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"q": ["x", "y", None], "a": [["w"], None, ["z"]], "f": [1.5, np.nan, 2.0]}
    )
    parquet.write_table(table, "x.parquet")
    with pytest.raises(
        ValueError, match="row 1, field 'a': a list of 1(.|\n)*row 2, field 'a': mi"
    ):
        read("x.parquet")
    with pytest.raises(ValueError, match="1 of 3 rows(.|\n)*row 2, field 'f': missing"):
        read("x.parquet", "{f}", "{f}")
    Path("y.parquet").write_text("q,a")
    with pytest.raises(ValueError, match="the file: not a complete Parquet file"):
        read("y.parquet")


# --- Registration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train": "absent.jsonl"}, FileNotFoundError, "file absent.jsonl does not exist. Correct"),
        (
            {"train": "x.json"},
            ValueError,
            r"extension '.json'. Use one of .jsonl, .ndjson, .csv, .tsv",
        ),
        ({"inputs": "question"}, ValueError, "inputs='question' names no field"),
        ({"targets": "{a!r}"}, ValueError, "has empty braces, or '!' or ':'"),
        ({"targets": "{a:>5}"}, ValueError, "has empty braces, or '!' or ':'"),
        ({"targets": "{}"}, ValueError, "has empty braces, or '!' or ':'"),
        ({"targets": "{a"}, ValueError, "targets='{a' cannot be parsed .* twice"),
        ({"train": None}, ValueError, "got neither"),
        ({"data": "x.jsonl"}, ValueError, "got both"),
        ({"seed": 1}, ValueError, "have no effect without data="),
        ({"quoting": True}, ValueError, "quoting=True of task 'own_bad' has no effect"),
        ({"labels": "yes"}, ValueError, "must be a sequence of labels, got the text 'yes'"),
        ({"labels": ["yes"]}, ValueError, "needs at least two labels"),
        ({"labels": ["yes", "yes"]}, ValueError, "'yes' is given twice"),
        ({"labels": {1: "yes", "1": "no"}}, ValueError, "'1' is given twice"),
        ({"labels": ["yes", " no"]}, ValueError, "single spaces"),
        ({"labels": {0: "no", None: "yes"}}, ValueError, "single spaces"),
        ({"name": "a name"}, ValueError, "invalid characters"),
    ],
)
def test_register_bad_arguments_raise(given, error, message):
    write("x.jsonl", GOOD)
    write("x.json", GOOD)
    arguments = {"name": "own_bad", "train": "x.jsonl", **QUESTION, **given}
    with pytest.raises(error, match=message):
        files.register(arguments.pop("name"), **arguments)
    assert "own_bad" not in seqio.TaskRegistry.names()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": (0.8, 0.2)}, "three numbers"),
        ({"split": (0.8, 0.1, 0.2)}, "sum to 1"),
        ({"split": (1.1, 0.0, -0.1)}, "at least 0"),
        ({"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_register_bad_shares_or_seed_raise(given, message):
    write("x.jsonl", GOOD)
    with pytest.raises(ValueError, match=message):
        files.register("own_bad", data="x.jsonl", **QUESTION, **given)


def test_register_duplicate_name_raises():
    write("x.jsonl", GOOD)
    files.register("own_one", train="x.jsonl", **QUESTION)
    with pytest.raises(ValueError, match="'own_one' is already registered"):
        files.register("own_one", train="x.jsonl", **QUESTION)


def test_register_parquet_without_pyarrow_error_names_extra(monkeypatch):
    Path("x.parquet").write_text("")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'mpt-jax\[parquet\]'"):
        files.register("own_bad", train="x.parquet", **QUESTION)


def test_files_first_use_reads_all_splits():
    write("train.jsonl", GOOD)
    write("test.jsonl", GOOD, "nope")
    files.register("own_late", train="train.jsonl", test="test.jsonl", **QUESTION)
    source = seqio.TaskRegistry.get("own_late").source
    assert source.splits == ("train", "test")
    with pytest.raises(ValueError, match=r"test\.jsonl: 1 of 2 rows(.|\n)*line 2: not JSON"):
        source.get_dataset("train")


# --- Splits ----------------------------------------------------------------------------------


def divided(inputs, shares=(0.8, 0.1, 0.1), seed=42) -> list[list[int]]:
    return [part.tolist() for part in file_sources.divide(inputs, shares, seed)]


def place(text: str, seed: int = 42) -> float:
    """The documented hash, from its hexadecimal digits."""
    return int(hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()[:16], 16) / 16.0**16


def test_split_file_cuts_places_of_inputs_by_shares():
    inputs = [f"question {i}" for i in range(200)]
    write("x.jsonl", *[{"q": text, "a": str(i)} for i, text in enumerate(inputs)])
    files.register("own_split", data="x.jsonl", **QUESTION)
    found = {
        split: [int(a) for _, a in examples("own_split", split)] for split in file_sources.SPLITS
    }
    places = [place(text) for text in inputs]
    assert found == {
        "train": [i for i, x in enumerate(places) if x < 0.8],
        "validation": [i for i, x in enumerate(places) if 0.8 <= x < 0.9],
        "test": [i for i, x in enumerate(places) if x >= 0.9],
    }
    source = seqio.TaskRegistry.get("own_split").source
    sizes = [source.num_input_examples(split) for split in source.splits]
    assert sizes == [len(rows) for rows in found.values()] and sum(sizes) == 200


def test_divide_added_row_moves_none_of_a_thousand():
    inputs = [f"question {i}" for i in range(1000)]
    before = divided(inputs)
    for position in (0, 500, 1000):
        after = divided([*inputs[:position], "added", *inputs[position:]])
        moved = [[row - (row > position) for row in part if row != position] for part in after]
        assert moved == before


def test_divide_order_of_rows_does_not_matter():
    inputs = [f"question {i}" for i in range(300)]
    before = [{inputs[row] for row in part} for part in divided(inputs)]
    turned = inputs[::-1]
    assert [{turned[row] for row in part} for part in divided(turned)] == before
    assert [{inputs[row] for row in part} for part in divided(inputs, seed=7)] != before


def test_divide_proportions_of_ten_thousand_rows_within_two_points():
    for seed in range(5):
        parts = divided([f"question {i}" for i in range(10_000)], seed=seed)
        assert [len(part) / 10_000 for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_divide_growing_small_file_has_no_empty_split_and_holds_out_no_row_of_train(seed):
    held_out: dict[str, int] = {}
    for size in range(10, 51):
        inputs = [f"{seed} question {i}" for i in range(size)]
        parts = divided(inputs)
        assert all(parts)
        now = {inputs[row]: number for number, part in enumerate(parts) for row in part}
        assert all(number or not now[text] for text, number in held_out.items())
        held_out = now


def test_divide_empty_split_takes_nearest_input():
    """Of these inputs none falls into validation or test: their places are all below 0.8."""
    inputs = [text for text in (f"question {i}" for i in range(40)) if place(text) < 0.8][:12]
    *train, second, first = sorted(inputs, key=place)
    parts = [{inputs[row] for row in part} for part in divided(inputs)]
    assert parts == [set(train), {second}, {first}]


@pytest.mark.parametrize("seed", range(5))
def test_divide_equal_inputs_stay_in_one_split(seed):
    inputs = [f"question {i % 60}" for i in range(200)]
    parts = divided(inputs, (0.5, 0.25, 0.25), seed)
    kept = [{inputs[row] for row in part} for part in parts]
    assert all(kept)
    assert not (kept[0] & kept[1] or kept[0] & kept[2] or kept[1] & kept[2])
    assert sorted(sum(parts, [])) == list(range(200))


def test_split_file_zero_share_omitted_and_too_few_inputs_raise():
    write("x.jsonl", *[{"q": f"question {i % 2}", "a": "y"} for i in range(20)])
    files.register("own_two", data="x.jsonl", split=(0.5, 0.5, 0), **QUESTION)
    assert seqio.TaskRegistry.get("own_two").source.splits == ("train", "validation")
    assert len(examples("own_two", "train")) == len(examples("own_two", "validation")) == 10
    files.register("own_few", data="x.jsonl", **QUESTION)
    with pytest.raises(ValueError, match="2 different inputs, too few for the splits train, val"):
        examples("own_few", "train")


def test_files_inputs_shared_with_train_log_warning(caplog):
    write("train.jsonl", *[{"q": f"question {i}", "a": "y"} for i in range(4)])
    write("dev.jsonl", {"q": "new", "a": "y"})
    write("test.jsonl", *[{"q": f"question {i}", "a": "n"} for i in (3, 9, 2)])
    of_splits = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    files.register("own_shared", **of_splits, **QUESTION)
    with caplog.at_level("WARNING", logger="absl"):
        examples("own_shared", "train")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("own_shared: 2 of the 3 inputs of test also occur in train")


# --- As a task -------------------------------------------------------------------------------


def test_register_label_mapping_words_reach_batches():
    gin_files.bind_vocabulary("byt5")
    write("x.csv", "q,a", "is it red ?,0", "is it blue ?,1")
    files.register("own_words", train="x.csv", labels={0: "no", 1: "yes"}, **QUESTION)
    task = seqio.TaskRegistry.get("own_words")
    assert evaluator.labels_of(task) == ("no", "yes")
    assert [a for _, a in examples("own_words", "train")] == ["no", "yes"]
    lengths = {"inputs": 20, "targets": 5}
    cfg = datasets.DatasetConfig(
        task_mixture(["own_words"], EqualQuotas(2, 3)), lengths, "train", 2, True, 3
    )
    converter = lambda pack: PromptFeatureConverter(2, Runs(["own_words"]), pack)  # noqa: E731
    batch = next(iter(datasets.get_dataset(cfg, 0, 1, converter).as_numpy_iterator()))
    vocabulary = task.output_features["targets"].vocabulary
    said = {vocabulary.decode(row[row > 0].tolist()) for row in batch["decoder_target_tokens"]}
    assert said == {"no", "yes"}


def scores(name: str, targets: list[str], predictions: list[str]) -> dict[str, float]:
    task = seqio.TaskRegistry.get(name)
    post = lambda text, is_target: task.postprocess_fn(text, example={}, is_target=is_target)  # noqa: E731
    golds = [post(text, True) for text in targets]
    said = [post(text, False) for text in predictions]
    found: dict[str, float] = {}
    for metric in task.metric_fns:
        found |= metric(golds, said)
    return found


def test_register_classification_default_metrics():
    write("x.jsonl", GOOD)
    files.register("own_labels", train="x.jsonl", labels=("yes", "no"), **QUESTION)
    found = scores("own_labels", ["yes", "yes", "no", "no"], ["yes", "no", "no", "perhaps"])
    # F1 of yes: 2*1/(2+1); of no: 2*1/(2+2).
    f1 = {"f1": 100 * (2 / 3 + 1 / 2) / 2, "f1_undefined": 0}
    assert found == pytest.approx({"accuracy": 50, **f1, "invalid": 25})
    assert next(iter(found)) == "accuracy"


def test_register_free_text_squad_metrics_unless_given():
    write("x.jsonl", GOOD)
    files.register("own_text", train="x.jsonl", **QUESTION)
    found = scores("own_text", ["the red hat", "a dog"], ["Red hat!", "a big dog"])
    assert found == pytest.approx({"f1": 100 * (1 + 2 / 3) / 2, "exact_match": 50})

    def same(targets, predictions):
        return {"same": 100 * np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}

    files.register("own_metric", train="x.jsonl", metrics=[same], **QUESTION)
    assert scores("own_metric", ["a hat", "a dog"], ["hat", "a dog"]) == {"same": 50}
    files.register("own_both", train="x.jsonl", metrics=[same], labels=["yes", "no"], **QUESTION)
    task = seqio.TaskRegistry.get("own_both")
    assert evaluator.labels_of(task) == ("yes", "no")
    assert scores("own_both", ["yes", "no"], ["yes", "yes"]) == {"same": 50}


@pytest.mark.slow
def test_readme_own_data_example_trains(tmp_path):
    """Runs its commands in an empty folder, with the installation of this environment."""
    section = (ROOT / "README.md").read_text().partition("## Your own data\n")[2]
    module, shell = re.search(r"```python\n(.*?)```(.*?)\n## ", section, re.DOTALL).groups()
    assert len(module.splitlines()) <= 10
    (tmp_path / "my_tasks.py").write_text(module)
    commands = re.findall(r"^    (.*)", shell, re.MULTILINE)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    child = subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    artifact = tmp_path / "runs" / "tiny" / "mpt_target" / "artifact"
    config = json.loads((artifact / "config.json").read_text())
    assert config["run_names"] == ["reviews"]
    assert "accuracy" in config["metrics"]["scores"]["reviews"]
    card = (artifact / "README.md").read_text()
    assert "| `reviews` | reviews.csv | train |  | 21 |" in card
    assert "| `reviews` | accuracy | " in card

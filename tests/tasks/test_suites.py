"""All registered tasks, read like a job reads them, from small data sets in the real format."""

from __future__ import annotations

import functools
import json
import re

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpt_jax import train
from mpt_jax.config import gin_utils, trainer_choice
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, token_tables, vocabularies
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.sampling import task_mixture
from mpt_jax.evaluation.evaluator import InferenceEvaluator, labels_of
from mpt_jax.tasks import glue, splits, suite
from mpt_jax.training.selection import SelectBest
from tests.fixtures import tfds_data, tiny
from tests.fixtures.gin_files import ROOT, TOY_MODEL, bind_vocabulary
from tests.fixtures.suite_rows import GENERATED, ROWS, TEXTS

pytestmark = pytest.mark.usefixtures("byte_vocabulary")

LENGTHS = {"inputs": 200, "targets": 40}  # bytes, here

# Our label names differ from TFDS's if those are numbers or other words for the same.
RENAMED = {
    "winogrande": ["1", "2"],
    "yelp": ["1", "2"],
    "scitail": ["entails", "neutral"],
    "openbookqa": list("ABCD"),
    **dict.fromkeys(["arc_easy", "arc_challenge"], list("ABCDE")),
    **dict.fromkeys(["anli_r1", "anli_r2", "anli_r3"], ["e", "n", "c"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    for name in tfds_data.DATA:
        tfds_data.write(path, name)
    return path


def texts(name: str, split: str) -> list[tuple[str, str]]:
    """Returns the inputs and targets of a split, from the token table that training reads."""
    table = token_tables.ExampleTable(seqio.TaskRegistry.get(name), split, LENGTHS, seed=42)
    assert not table.num_overlong
    decode = vocabularies.load("byt5").decode
    columns = []
    for feature in ("inputs", "targets"):
        bounds = table.offsets[feature][1:-1]
        rows = np.split(table.values[feature], bounds)
        columns.append([decode(row.tolist()) for row in rows])
    return list(zip(*columns, strict=True))


def place_of(inputs: str) -> int:
    return int(re.findall(r" (\d+)(?= |$|\.)", inputs)[0])


# --- The tables ------------------------------------------------------------------------------


def test_suites_all_tasks_tested_and_classification_has_digits():
    assert set(ROWS) == set(TEXTS)
    assert {row.data for row in {**ROWS, **GENERATED}.values()} == set(tfds_data.DATA)
    names = {n + s for n, row in ROWS.items() for s in (("", "_digits") if row.words else ("",))}
    assert names <= seqio.TaskRegistry.names()
    assert {name for name in names if name.endswith("_digits")} == {
        f"{name}_digits" for name, (*_, digit) in TEXTS.items() if digit
    }


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.words])
def test_suite_labels_in_data_set_order(name, tmp_path):
    row = ROWS[name]
    features = tfds.builder(row.data, data_dir=str(tmp_path)).info.features
    if name != "commonsenseqa":  # its rows have the text of the answer
        label = features["answerKey" if "answerKey" in features else "label"]
        assert label.names == RENAMED.get(name, list(row.words))
    assert labels_of(seqio.TaskRegistry.get(name)) == tuple(row.words)
    digits = labels_of(seqio.TaskRegistry.get(name + "_digits"))
    assert digits == tuple("01234")[: len(row.words)]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.words])
def test_digits_version_targets_are_label_numbers(name):
    row = tfds_data.DATA[ROWS[name].data][1](1)
    dataset = tf.data.Dataset.from_tensors(tf.nest.map_structure(tf.constant, row))
    task = seqio.TaskRegistry.get(name + "_digits")
    (made,) = task.preprocessors[0](dataset).as_numpy_iterator()
    inputs, _, digit = TEXTS[name]
    assert made["inputs"].decode() == inputs
    assert made["targets"].decode() == digit


@pytest.mark.parametrize("name", [*ROWS, *GENERATED])
def test_suite_split_sizes_match_docs(name):
    """Compares the table of docs/tasks.md with sizes computed from the data sets and rules."""
    row, found = {**ROWS, **GENERATED}[name], []
    for part in row.parts.values():
        size = row.sizes[part.split]
        places = part.places(size)
        found.append(size if places is None else len(range(*places.indices(size))))
    (line,) = re.findall(
        rf"^\| `{name}` \| `\S+:.*$", (ROOT / "docs" / "tasks.md").read_text(), re.M
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == f"`{row.data}`"
    assert [int(cell.replace(",", "")) for cell in cells[2:5]] == found


# --- Data on disk ----------------------------------------------------------------------------


def places_of(name: str, split: str) -> set[int]:
    """Returns the positions in the small copy of the original file that a split has."""
    row = ROWS[name]
    part = row.parts[split]
    size = tfds_data.DATA[row.data][0][part.split]
    order, places = splits.permutation(size), part.places(size)
    if row.keys == ():  # rows are in stored order
        order = np.array(tfds_data.stored_order(row.data, part.split))[order]
    return set(order.tolist() if places is None else order[places].tolist())


def read_splits():
    """Yields every split with rows of every task.

    The small copies of MRQA and ANLI have no training rows. All splits are marked slow except the
    first one of a task with row 1, whose text is known.
    """
    for name in TEXTS:
        filled = [split for split in ROWS[name].parts if places_of(name, split)]
        fast = next((split for split in filled if 1 in places_of(name, split)), filled[0])
        for split in filled:
            marks = [] if split == fast or name == "mnli" else pytest.mark.slow
            yield pytest.param(name, split, marks=marks)


@pytest.mark.parametrize(("name", "split"), read_splits())
def test_suite_task_reads_its_splits(data_dir, name, split):
    expected, found = places_of(name, split), texts(name, split)
    assert {place_of(inputs) for inputs, _ in found} == expected
    if name != "record":
        assert len(found) == len(expected)
    if 1 in expected:
        assert TEXTS[name][:2] in found
    if ROWS[name].words:
        assert {target for _, target in found} == set(ROWS[name].words)


def test_record_one_row_per_answer(data_dir):
    found = texts("record", "test")
    assert len(found) == 9 + 3
    of_row_0 = [target for inputs, target in found if place_of(inputs) == 0]
    assert of_row_0 == ["Ann", "Bob"]


def test_suite_task_absent_data_error_reaches_user(data_dir, tmp_path):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    with pytest.raises(ValueError) as error:
        texts("mnli", "train")
    for part in ("'mnli'", "glue/mnli", "2.0.0", "tfds build glue/mnli:2.0.0", str(tmp_path)):
        assert part in str(error.value)


# --- Metrics ---------------------------------------------------------------------------------

EVALUATED = ["stsb", "cola", "multirc", "record", "squad"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that `evaluated` writes to."""
    return tmp_path_factory.mktemp("inference_eval")


@pytest.fixture(scope="module")
def evaluated(folder, written):
    """predict_fn -> {task: {metric: value}} on the test split."""
    bind_vocabulary("byt5")
    seqio.set_tfds_data_dir_override(str(folder))
    cfg = datasets.DatasetConfig(
        task_mixture(EVALUATED),
        task_feature_lengths=LENGTHS,
        split="test",
        batch_size=64,
        shuffle=False,
        seed=0,
    )
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(EVALUATED))
    evaluator = InferenceEvaluator(cfg, converter, str(written))
    seqio.set_tfds_data_dir_override(None)

    def no_preference(batch):
        return np.zeros(len(batch["encoder_task_ids"]))

    return lambda predict: evaluator.evaluate(predict, no_preference, 0)


def test_suite_evaluation_of_gold_answers_has_top_scores(evaluated):
    found = evaluated(lambda batch: batch["decoder_target_tokens"])
    for name, first in zip(EVALUATED, ["pearson", "matthews", "f1", "f1", "f1"], strict=True):
        assert next(iter(found[name])) == first  # the one that selects
        assert found[name][first] == pytest.approx(100.0)
    assert found["cola"]["invalid"] == found["stsb"]["invalid"] == 0.0
    assert {"accuracy", "rank_accuracy"} <= set(found["multirc"])
    assert found["record"]["exact_match"] == 100.0


def test_suite_evaluation_any_gold_answer_counts_query_once(evaluated):
    """'Ann' answers queries 0, 3 and 6 of nine; 'cat no. 1' is a second answer of one question."""
    said = {"record": "Ann", "squad": "Cat no. 1!", "cola": "?", "stsb": "?", "multirc": "?"}
    table = np.zeros([len(EVALUATED), LENGTHS["targets"]], np.int32)
    for row, name in enumerate(EVALUATED):
        tokens = vocabularies.load("byt5").encode(said[name])
        table[row, : len(tokens)] = tokens
    found = evaluated(lambda batch: table[batch["encoder_task_ids"].max(axis=1)])
    third = pytest.approx(100 / 3)
    assert found["record"] == {"f1": third, "exact_match": third, "constant_prediction": 1.0}
    assert found["squad"]["exact_match"] == pytest.approx(100 / 9)
    # The other eight share two words of three with their own 'cat no. <place>'.
    assert found["squad"]["f1"] == pytest.approx(100 * (1 + 8 * 2 / 3) / 9)
    for name in ("cola", "stsb", "multirc"):
        assert found[name]["invalid"] == 100.0
    assert found["multirc"]["accuracy"] == found["multirc"]["f1"] == 0.0
    assert found["cola"]["matthews"] == 0.0  # no prediction is a label


def test_suite_evaluation_marks_undefined_metrics_in_all_outputs(evaluated, written, tmp_path):
    """With empty predictions, no correlation is defined; F1 is 0, since gold has the label."""
    found = evaluated(lambda batch: np.zeros_like(batch["decoder_target_tokens"]))
    marked = {"cola": {"matthews": 1.0}, "stsb": {"pearson": 1.0, "spearman": 1.0}}
    for task, marks in {**marked, "multirc": {"f1": 0.0}}.items():
        (*_, line) = (written / f"{task}-metrics.jsonl").read_text().splitlines()
        events = EventAccumulator(str(written / task))
        events.Reload()
        for metric, mark in marks.items():
            name = f"{metric}_undefined"
            assert found[task][metric] == 0.0
            assert found[task][name] == json.loads(line)[name] == mark
            assert tf.make_ndarray(events.Tensors(f"eval/{name}")[-1].tensor_proto) == mark
    gold = evaluated(lambda batch: batch["decoder_target_tokens"])
    select = SelectBest(tiny.model(Runs(EVALUATED)), str(tmp_path))
    assert select.group_scores(gold) == pytest.approx([100.0])  # the mean of values, not of marks


# --- Runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("gin/pt_source.gin", ["mnli", "qqp", "qnli", "sst2", "squad", "record"]),
        ("gin/mpt_source.gin", ["mnli", "qqp", "qnli", "sst2", "squad", "record"]),
        ("gin/mpt_target.gin", ["boolq"]),
    ],
)
def test_stage_gin_files_find_their_tasks(data_dir, name, tasks):
    trainer_choice.install_fallback()
    with gin_utils.as_main(train):
        gin_utils.parse([name], ["VOCABULARY = 'byt5'"], (str(ROOT),))

    def value(macro):
        return gin.get_configurable(f"{macro}/gin.macro")()

    mixture = seqio.get_mixture_or_task(value("MIXTURE_OR_TASK_NAME"))
    assert sorted(task.name for task in mixture.tasks) == sorted(tasks)
    for task in mixture.tasks:
        assert {"train", "validation", "test"} == set(task.splits)
        vocabulary = task.output_features["inputs"].vocabulary
        assert vocabulary == gin.get_configurable(vocabularies.load)()
    stream = mixture.get_dataset(value("TASK_FEATURE_LENGTHS"), "train", seed=42)
    seen = {int(example["task_ids"][0]) for example in stream.take(600).as_numpy_iterator()}
    assert len(seen) == len(tasks)


def test_run_task_without_vocabulary_error_names_binding():
    gin.clear_config()
    with pytest.raises(ValueError, match=r"vocabularies\.load\.path.*VOCABULARY"):
        _ = seqio.TaskRegistry.get("mnli").output_features


def test_run_vocabulary_bad_path_binding_keeps_original_error():
    gin.clear_config()
    gin.parse_config(
        "from __gin__ import dynamic_registration\n"
        "from mpt_jax.runtime import paths\n"
        "from mpt_jax.data import vocabularies\n"
        "vocabularies.load.path = @paths.under()\n"
        "paths.under.base = ''\n"
        "paths.under.name = 'spiece.model'"
    )
    with pytest.raises(ValueError, match="Cannot build a path"):
        suite.run_vocabulary()


def test_run_task_second_vocabulary_raises(tmp_path):
    row = glue.ROWS[0]
    task = suite.RunTask("any", source=seqio.TaskRegistry.get(row.name).source, output_features={})
    assert set(task.output_features) == {"inputs", "targets", "task_ids"}
    bind_vocabulary(TOY_MODEL)
    with pytest.raises(ValueError, match="Start a new process"):
        _ = task.output_features

"""Few-shot runs: their names, their draws, and the rows they read from disk."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.data import datasets, preprocessors, sampling, task_lookup, token_tables, vocabularies
from mpt_jax.evaluation import evaluator, metric_writers
from mpt_jax.tasks import few_shot, glue, mpt_others, mrqa, splits, super_glue, toy  # noqa: F401 - registered
from mpt_jax.tasks import files as jsonl
from mpt_jax.tasks.few_shot import Draw
from tests.fixtures import tfds_data

pytestmark = pytest.mark.usefixtures("byte_vocabulary")

LENGTHS = {"inputs": 200, "targets": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    for name in ("super_glue/cb:1.0.2", "glue/sst2:2.0.0", "squad/v1.1:3.0.0", "glue/stsb:2.0.0"):
        tfds_data.write(path, name)
    return path


def texts(name: str, split: str) -> list[tuple[str, str]]:
    dataset = task_lookup.find_task(name).get_dataset(LENGTHS, split, shuffle=False)
    rows = list(dataset.as_numpy_iterator())
    assert {row["task_ids"].item() for row in rows} <= {token_tables.task_id(name)}
    columns = ("inputs_pretokenized", "targets_pretokenized")
    return [tuple(row[column].decode() for column in columns) for row in rows]


# --- Names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("boolq_k16_s3", Draw("boolq", 16, 3)),
        ("boolq_digits_k4_s0", Draw("boolq_digits", 4, 0)),
        ("boolq_k16_per_class_s3", Draw("boolq", 16, 3, per_class=True)),
        ("toy_cb_k32_s12_dev", Draw("toy_cb", 32, 12, dev=True)),
        ("arc_k1_x_k2_per_class_s0_dev", Draw("arc_k1_x", 2, 0, per_class=True, dev=True)),
    ],
)
def test_draw_name_parse_round_trip(name, draw):
    assert few_shot.parse(name) == draw
    assert draw.name == name


@pytest.mark.parametrize(
    "name", ["boolq", "boolq_k16", "boolq_k0_s1", "boolq_k016_s1", "boolq_k16_s01", "_k16_s1x"]
)
def test_parse_other_names_returns_none(name):
    assert few_shot.parse(name) is None


def test_few_shot_run_registered_when_first_named():
    assert not [name for name in seqio.TaskRegistry.names() if "_k3_s777" in name]
    found = sampling.task_mixture(["wic_k3_s777", "toy_wic_k3_s777"])
    names = [task.name for task in seqio.get_mixture_or_task(found).tasks]
    assert sorted(names) == ["toy_wic_k3_s777", "wic_k3_s777"]


def test_dataset_config_accepts_few_shot_run_name():
    cfg = datasets.DatasetConfig("toy_wic_k3_s778", LENGTHS, "train", 1, False, 0)
    assert cfg.provider().name == "toy_wic_k3_s778"


def test_find_task_few_shot_name_of_unknown_task_raises():
    with pytest.raises(ValueError, match=r"Unknown task 'bolq_k4_s0'.*Known: .*boolq"):
        task_lookup.find_task("bolq_k4_s0")
    task_lookup.find_task("boolq_k4_s0")
    with pytest.raises(ValueError, match="Unknown task 'boolq_k4_s0_k2_s0'"):
        task_lookup.find_task("boolq_k4_s0_k2_s0")  # a few-shot run cannot be drawn from


# --- Draws -----------------------------------------------------------------------------------


def test_indices_do_not_change_between_releases():
    """A change of Python's generator would change every published few-shot result."""
    draw = Draw("boolq", 4, 0)
    assert few_shot.indices(draw, "train", 9427) == [8961, 4498, 9023, 5185]
    assert few_shot.indices(draw, "validation", 1635) == [792, 246, 1419, 1250]
    labels = np.arange(9427) % 2
    found = few_shot.indices_per_class(draw, "train", labels, ("False", "True"))
    assert found == [4838, 8150, 758, 4550, 2741, 5019, 2387, 1095]


def test_indices_differ_by_task_k_and_draw():
    draws = [Draw(task, k, s) for task in ("boolq", "rte") for k in (16, 32) for s in range(10)]
    found = {tuple(few_shot.indices(draw, "train", 2490)) for draw in draws}
    assert len(found) == len(draws)
    for drawn in found:
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(2490))


def test_indices_per_class_k_rows_of_each_label():
    labels = np.array([0, 1, 2, 2, 1, -1] * 50)
    draw = Draw("cb", 8, 1, per_class=True)
    found = few_shot.indices_per_class(draw, "train", labels, ("a", "b", "c"))
    assert labels[found].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(set(found)) == 24
    with pytest.raises(ValueError, match="cb has 50 rows of label 'a' in its train split.*k = 51"):
        few_shot.indices_per_class(Draw("cb", 51, 1, per_class=True), "train", labels, "abc")


def test_few_shot_runs_of_task_versions_use_same_rows(data_dir):
    first, *rest = [
        task_lookup.find_task(f"{name}_k5_s2").source.few_shot_indices("train")
        for name in ("cb", "cb_digits", "cb_unprefixed", "cb_synthetic")
    ]
    assert rest == [first] * 3
    assert first == random.Random("cb 5 2").sample(range(9), 5)


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cb_k251_s0", "cb has 250 rows in its train split, but cb_k251_s0 needs k = 251"),
        ("cb_k29_s0_dev", "cb has 28 rows in its validation split.*k = 29"),
        ("toy_boolq_k2001_s0", "toy_boolq has 2,000 rows in its train split.*k = 2001"),
        ("squad_k4_per_class_s0", "squad has no labels. Use squad_k4_s0 to draw from all rows"),
        ("stsb_k4_per_class_s0", "stsb has no labels"),
    ],
)
def test_find_task_impossible_draw_raises_before_reading(name, message):
    with pytest.raises(ValueError, match=message):
        task_lookup.find_task(name)


def test_few_shot_run_smaller_local_data_raises_with_local_size(data_dir):
    with pytest.raises(ValueError, match="cb has 9 rows in its train split.*k = 10"):
        texts("cb_k10_s0", "train")


def test_few_shot_source_unknown_size_raises():
    def rows(split, shuffle_files, seed=None):
        raise AssertionError("nothing is read")

    task = seqio.Task("any", seqio.FunctionDataSource(rows, ["train"]), output_features={})
    source = few_shot.FewShotSource(task, Draw("any", 1, 0))
    with pytest.raises(ValueError, match="'any' does not report how many rows its train split has"):
        source.few_shot_indices("train")


# --- Reading ---------------------------------------------------------------------------------


def test_few_shot_run_reads_original_rows_in_order_drawn(data_dir):
    drawn = random.Random("cb 4 1").sample(range(9), 4)
    words = super_glue.ROWS[1].words
    expected = [
        (f"cb premise: premise {i} hypothesis: hypothesis {i}", words[i % 3]) for i in drawn
    ]
    assert texts("cb_k4_s1", "train") == expected
    assert texts("cb_k4_s1", "validation") == texts("cb", "validation")
    assert len(texts("cb_k4_s1", "test")) == 28


def test_few_shot_run_of_carved_split_counts_from_split_start(data_dir):
    """The training split of sst2 is the rest of a permutation after 1,000 rows."""
    permuted = splits.permutation(1010)[1000:]
    drawn = random.Random("sst2 3 0").sample(range(10), 3)
    expected = [f"sst2 sentence: sentence {permuted[i]}" for i in drawn]
    assert [inputs for inputs, _ in texts("sst2_k3_s0", "train")] == expected


def test_repeat_run_has_all_rows_and_its_own_name(data_dir):
    for split in ("train", "validation", "test"):
        assert texts("cb_s7", split) == texts("cb", split)
    again, first = task_lookup.find_task("cb_s7"), task_lookup.find_task("cb")
    assert evaluator.labels_of(again) == evaluator.labels_of(first)
    assert again.name == "cb_s7"
    with pytest.raises(ValueError, match="Unknown task 'nothing_s7'"):
        task_lookup.find_task("nothing_s7")


def test_few_shot_dev_run_draws_validation_separately(data_dir):
    half = splits.permutation(56)[:28]
    drawn = random.Random("cb 4 1 validation").sample(range(28), 4)
    expected = [f"cb premise: premise {half[i]} hypothesis: hypothesis {half[i]}" for i in drawn]
    assert [inputs for inputs, _ in texts("cb_k4_s1_dev", "validation")] == expected
    assert texts("cb_k4_s1_dev", "train") == texts("cb_k4_s1", "train")
    assert len(texts("cb_k4_s1_dev", "test")) == 28


def test_per_class_run_rows_have_their_label(data_dir):
    found = texts("cb_k2_per_class_s0", "train")
    assert [target for _, target in found] == [w for w in super_glue.ROWS[1].words for _ in "12"]
    assert len(set(found)) == 6
    numbers = task_lookup.find_task("cb_k2_per_class_s0").source.few_shot_indices("train")
    assert [f"premise {i} " in text for i, (text, _) in zip(numbers, found, strict=True)] == [
        True
    ] * 6


def test_few_shot_run_keeps_lists_of_any_length(data_dir):
    found = texts("squad_k3_s0", "train")
    assert [target for _, target in found] == ["the cat"] * 3
    dataset = task_lookup.find_task("squad_k3_s0").get_dataset(LENGTHS, "train", shuffle=False)
    assert all(len(row["answers"]) == 2 for row in dataset.as_numpy_iterator())


def test_few_shot_run_of_own_files_draws_rows(tmp_path):
    lines = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(12)]
    for split, number in (("train", 12), ("validation", 6)):
        text = "".join(json.dumps(line) + "\n" for line in lines[:number])
        (tmp_path / f"{split}.jsonl").write_text(text)
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation")}
    jsonl.register("fws_own", inputs="{text}", targets="{label}", labels=("no", "yes"), **files)
    drawn = random.Random("fws_own 3 0").sample(range(12), 3)
    found = texts("fws_own_k3_s0", "train")
    assert [target for _, target in found] == [("no", "yes")[i % 2] for i in drawn]
    assert all(inputs.endswith(f"text {i}") for i, (inputs, _) in zip(drawn, found, strict=True))
    found = texts("fws_own_k2_per_class_s0_dev", "validation")
    assert [target for _, target in found] == ["no", "no", "yes", "yes"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["no", "maybe"], r"declares the labels 'no', 'yes', but 2 of the 4 .* as 'maybe'"),
        (["no", "yes", "no"], "make 6 examples from the 4 rows of its train .* Use fws_made_k1_s0"),
        (["no"], "make 2 examples from the 4 rows"),
    ],
)
def test_per_class_run_rows_without_one_label_error(made, message):
    """A row becomes as many examples as `made` has targets for two rows."""

    def rows(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.range(4)

    def to_text(dataset):
        targets = tf.constant(made)
        pairs = dataset.batch(2).flat_map(lambda _: tf.data.Dataset.from_tensor_slices(targets))
        return pairs.map(lambda target: {"inputs": "text", "targets": target})

    task = seqio.TaskRegistry.add(
        "fws_made",
        source=seqio.FunctionDataSource(rows, ["train"], num_input_examples={"train": 4}),
        preprocessors=[to_text, *preprocessors.finish("fws_made")],
        output_features=preprocessors.output_features(vocabularies.load("byt5")),
        metric_fns=[evaluator.with_labels(lambda targets, predictions: {}, ["no", "yes"])],
    )
    source = few_shot.FewShotSource(task, Draw("fws_made", 1, 0, per_class=True))
    with pytest.raises(ValueError, match=message):
        source.few_shot_indices("train")
    seqio.TaskRegistry.remove("fws_made")


# --- The run record --------------------------------------------------------------------------


def test_run_record_contains_few_shot_rows(tmp_path):
    runs = ["toy_rte_k4_s0", "toy_rte_k4_s1_dev", "toy_rte"]
    provider = seqio.get_mixture_or_task(sampling.task_mixture(runs))
    metric_writers.write_run_record(str(tmp_path), task_lookup.few_shot_rows(provider))
    (line,) = (tmp_path / "run.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["few_shot"] == {
        "toy_rte_k4_s0": random.Random("toy_rte 4 0").sample(range(2000), 4),
        "toy_rte_k4_s1_dev": random.Random("toy_rte 4 1").sample(range(2000), 4),
    }
    assert record["few_shot_validation"] == {
        "toy_rte_k4_s1_dev": random.Random("toy_rte 4 1 validation").sample(range(200), 4)
    }
    assert task_lookup.few_shot_rows(seqio.get_mixture_or_task("toy_rte")) == {}

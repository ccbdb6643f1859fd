"""E2E and WebNLG, read from small data sets in the real format, and scored."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import seqio

from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, vocabularies
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.sampling import task_mixture
from mpt_jax.evaluation.evaluator import InferenceEvaluator
from tests.fixtures import tfds_data

LENGTHS = {"inputs": 120, "targets": 60}  # bytes
TASKS = ["e2e", "webnlg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gem")
    for name in ("gem/e2e_nlg:1.1.0", "gem/web_nlg_en:1.1.0"):
        tfds_data.write(path, name)
    return path


@pytest.fixture(autouse=True)
def run(byte_vocabulary, data_dir):
    task_mixture(TASKS, modules=["mpt_jax.tasks.nlg"])


def rows(name, split):
    """Returns {inputs: [(targets, references), ...]} of a split."""
    found = {}
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, split, shuffle=False)
    for row in dataset.as_numpy_iterator():
        key, references = row["inputs_pretokenized"].decode(), row["references"].tolist()
        found.setdefault(key, []).append(
            (row["targets_pretokenized"].decode(), sorted(r.decode() for r in references))
        )
    return found


def test_grouped_source_train_one_row_per_reference():
    found = rows("e2e", "train")
    assert len(found) == 6 and sum(map(len, found.values())) == 9
    said = {target for target, _ in found["e2e name: Nº 3 food: Fish & Chips"]}
    assert said == {"Nº 3 serves fish, says 3.", "Nº 3 serves fish, says 4."}


@pytest.mark.parametrize(("split", "places"), [("validation", 6), ("test", 8)])
def test_grouped_source_evaluation_one_row_per_meaning(split, places):
    found = rows("e2e", split)
    expected = {}
    for place in range(places):
        number = place - place % 3 if place % 3 < 2 else place
        expected.setdefault(number, []).append(f"Nº {number} serves fish, says {place}.")
    assert set(found) == {f"e2e name: Nº {number} food: Fish & Chips" for number in expected}
    for number, expected_references in expected.items():
        ((target, references),) = found[f"e2e name: Nº {number} food: Fish & Chips"]
        assert references == expected_references
        assert target in references


def test_webnlg_triples_keep_references():
    found = rows("webnlg", "test")
    assert len(found) == 8
    ((target, given),) = found["webnlg Zoë A. | birthPlace | City 3 && City | partOf | Land"]
    assert (target, given) == ("Born in 3.", ["Born in 3.", "It is 3."])


def test_grouped_source_counts_rows_after_grouping():
    source = seqio.TaskRegistry.get("e2e").source
    assert [source.num_rows(split) for split in ("train", "validation", "test")] == [9, 4, 5]
    assert source.positions("test").tolist() == [0, 1, 2, 3, 4]
    assert sorted(source.positions("train").tolist()) == list(range(9))


def test_few_shot_run_draws_from_grouped_rows():
    task_mixture(["e2e_k2_s0_dev"], modules=["mpt_jax.tasks.nlg"])
    counts = {split: rows("e2e_k2_s0_dev", split) for split in ("train", "validation", "test")}
    assert {s: sum(map(len, found.values())) for s, found in counts.items()} == {
        "train": 2,
        "validation": 2,
        "test": 5,
    }
    assert set(counts["validation"]) < set(rows("e2e", "validation"))


def test_grouped_source_meaning_without_reference_dropped(tmp_path, monkeypatch):
    """A row without references but with a target uses the target."""
    name = "gem/web_nlg_en:1.1.0"
    sizes, row = tfds_data.DATA[name]

    def poor(place):
        lost = {
            0: {"references": [], "target": ""},
            1: {"references": []},
            2: {"references": [" "]},
        }
        return {**row(place), **lost.get(place, {})}

    monkeypatch.setitem(tfds_data.DATA, name, (sizes, poor))
    tfds_data.write(tmp_path, name)
    seqio.set_tfds_data_dir_override(str(tmp_path))
    found = {
        key.split("City ")[1].split()[0]: value for key, value in rows("webnlg", "test").items()
    }
    assert set(found) == set("1234567")
    assert found["1"] == [("Born in 1.", ["Born in 1."])]
    assert found["2"] == [("Born in 2.", ["Born in 2."])]


@pytest.fixture
def evaluator():
    cfg = datasets.DatasetConfig(
        task_mixture(TASKS),
        task_feature_lengths=LENGTHS,
        split="test",
        batch_size=16,
        shuffle=False,
        seed=0,
    )
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(TASKS))
    return InferenceEvaluator(cfg, converter, None)


def no_preference(batch):
    return np.zeros(len(batch["encoder_task_ids"]))


def test_nlg_evaluation_of_references_has_top_scores(evaluator):
    found = evaluator.evaluate(lambda batch: batch["decoder_target_tokens"], no_preference, 0)
    assert list(found["e2e"]) == ["bleu", "nist", "meteor_exact_stem", "rouge_l", "cider_d"]
    assert list(found["webnlg"]) == ["bleu", "meteor_exact_stem", "ter"]
    assert found["e2e"]["bleu"] == pytest.approx(100)
    assert found["e2e"]["rouge_l"] == pytest.approx(100)
    assert found["webnlg"]["ter"] == 0


def test_nlg_evaluation_any_reference_counts(evaluator):
    """'It is 3.' is the second reference of one of eight rows; others share one of three words."""
    tokens = vocabularies.load("byt5").encode("It is 3.")
    table = np.zeros([1, LENGTHS["targets"]], np.int32)
    table[0, : len(tokens)] = tokens
    said = lambda batch: np.repeat(table, len(batch["encoder_task_ids"]), axis=0)  # noqa: E731
    found = evaluator.evaluate(said, no_preference, 0)
    # One word of three differs in rows 1, 5 and 7; all three do in the four with one reference.
    assert found["webnlg"]["ter"] == pytest.approx(100 * (0 + 3 * 1 + 4 * 3) / (8 * 3))


def test_nlg_task_without_libraries_error_says_what_to_install(monkeypatch):
    """The error occurs when the rows of any split are read, before training."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else found(name)
    )
    for split in ("train", "test"):
        with pytest.raises(ImportError, match=r"sacrebleu.*pip install 'mpt-jax\[nlg\]'"):
            rows("e2e", split)

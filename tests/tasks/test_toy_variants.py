"""Variants of the toy targets: the same rows with a prefix or other labels."""

from __future__ import annotations

import collections
import functools
import random

import pytest
import sentencepiece

from mpt_jax.core import runs
from mpt_jax.data import preprocessors, task_lookup
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import few_shot, toy, toy_pretrain, toy_vocabulary
from mpt_jax.tasks import toy_world as world
from mpt_jax.tasks.toy_variants import VARIANTS, Variant

BASES = "toy_boolq toy_cb toy_rte toy_mrpc toy_wic toy_scitail toy_paws".split()
LENGTHS = {"inputs": 48, "targets": 12}
each = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


@functools.cache
def texts(name: str, split: str) -> list[tuple[str, str]]:
    """The rows of a split as text."""
    task = task_lookup.find_task(name)
    rows = few_shot.text_rows(task, task.source.get_dataset(split=split, shuffle=False))
    return [
        (inputs.decode(), target.decode())
        for x in rows.batch(1000).as_numpy_iterator()
        for inputs, target in zip(x["inputs"], x["targets"], strict=True)
    ]


def test_variants_exist_for_every_labelled_target():
    suffixes = ("prefixed", "numeric", "synthetic")
    assert [variant.name for variant in VARIANTS] == [f"{b}_{s}" for b in BASES for s in suffixes]
    assert set(BASES) == {task.name for task in toy.TARGET_TASKS if task.labels}


@each
def test_variant_names_not_settings_or_few_shot_runs(variant):
    assert runs.data_name(variant.name) == variant.name
    assert few_shot.parse(variant.name) is None


# --- rows ------------------------------------------------------------------------------------


@each
def test_variant_rows_differ_only_in_prefix_or_labels(variant):
    short = variant.base.name.removeprefix("toy_")
    prefix = f"{short} : " if variant.suffix == "prefixed" else ""
    for split in world.SPLITS:
        told, usual = texts(variant.name, split), texts(variant.base.name, split)
        assert [inputs for inputs, _ in told] == [prefix + inputs for inputs, _ in usual]
        renamed = set(zip([y for _, y in usual], [y for _, y in told], strict=True))
        assert renamed == set(zip(variant.base.labels, variant.labels, strict=True))


def test_variant_rows_do_not_change_between_releases():
    text = "is the phone sold by wanda ? | emma offers a phone . wanda sells a hat ."
    assert texts("toy_boolq", "test")[0] == (text, "no")
    assert texts("toy_boolq_prefixed", "test")[0] == (f"boolq : {text}", "no")
    assert texts("toy_boolq_numeric", "test")[0] == (text, "<extra_id_1>")
    assert texts("toy_boolq_synthetic", "test")[0] == (text, "hamster")


RUNS = ("k16_s0", "k4_s3_dev", "k8_per_class_s1")


@pytest.mark.parametrize(
    ("variant", "run"),
    [
        # Each run with each suffix, over the tasks; all of them are slow.
        pytest.param(
            variant,
            run,
            marks=[] if (number + number // 3) % 3 == at else pytest.mark.slow,
            id=f"{variant.name}-{run}",
        )
        for number, variant in enumerate(VARIANTS)
        for at, run in enumerate(RUNS)
    ],
)
def test_variant_few_shot_run_draws_same_rows_as_base_task(variant, run):
    mine, theirs = (task_lookup.find_task(f"{x.name}_{run}") for x in (variant, variant.base))
    for split in ("train", "validation"):
        drawn = mine.source.few_shot_indices(split)
        assert drawn == theirs.source.few_shot_indices(split)
        assert (drawn is None) == (split == "validation" and "dev" not in run)
    usual = texts(f"{variant.base.name}_{run}", "train")
    assert texts(f"{variant.name}_{run}", "train") == [variant.told(*row) for row in usual]


def test_variant_few_shot_examples_have_run_task_id():
    name = "toy_cb_numeric_k4_s0"
    dataset = task_lookup.find_task(name).get_dataset(LENGTHS, "train", shuffle=False)
    found, vocabulary = list(dataset.as_numpy_iterator()), toy.vocabulary()
    assert {x["task_ids"].item() for x in found} == {preprocessors.task_id(name)}
    tokens = [(vocabulary.decode(x["inputs"]), vocabulary.decode(x["targets"])) for x in found]
    assert tokens == texts(name, "train") and len(tokens) == 4


# --- labels ----------------------------------------------------------------------------------


@each
def test_variant_metrics_use_variant_labels(variant):
    task = task_lookup.find_task(variant.name)
    assert evaluator.labels_of(task) == variant.labels
    first, second, *_ = variant.labels
    found = {}
    for metric in task.metric_fns:
        found.update(metric([first, second], [first, "maybe"]))
    assert found["accuracy"] == found["invalid"] == 50.0
    base = evaluator.labels_of(task_lookup.find_task(variant.base.name))
    assert (base == variant.labels) == (variant.suffix == "prefixed")


@each
def test_variant_labels_are_single_known_pieces(variant):
    vocabulary = toy.vocabulary()
    assert len(set(variant.labels)) == len(variant.base.labels)
    for label in variant.labels:
        (piece,) = vocabulary.encode(label)
        assert piece not in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id)
        assert vocabulary.decode([piece]) == label


def test_toy_vocabulary_digits_are_unknown():
    vocabulary = toy.vocabulary()
    assert vocabulary.encode("0") == vocabulary.encode("1")
    assert vocabulary.unk_id in vocabulary.encode("0")


def _synthetic() -> list[Variant]:
    return [variant for variant in VARIANTS if variant.suffix == "synthetic"]


def test_variant_labels_are_frequent_pretraining_targets():
    """In at least 1 of 1,000 targets; synthetic labels answer several tasks, none with labels."""
    rng, words, whole = random.Random(5), collections.Counter(), collections.Counter()
    tasks_of = collections.defaultdict(set)
    number = 20_000
    for _ in range(number):
        text, target = toy_pretrain.example(rng)
        words.update(set(target.split()))
        if "<" not in text:
            whole[target] += 1
            for word in target.split():
                tasks_of[word].add(text.split()[0])
    for variant in VARIANTS:
        for label in variant.labels:
            assert words[label.replace("<extra_id_", "<")] >= number / 1000, label
    for variant in _synthetic():
        for label in variant.labels:
            assert tasks_of[label] == {"squad", "lookup", "quiz"}
            assert whole[label] >= number / 2000, label


def test_synthetic_variant_labels_unrelated_to_task():
    labels = [label for variant in _synthetic() for label in variant.labels]
    answers = {label for task in toy.TASKS.values() for label in task.labels}
    assert len(set(labels)) == len(labels) and not answers & set(labels)
    for variant in _synthetic():
        kinds = [set(words) for words in world.NOUNS.values()]
        assert any(set(variant.labels) <= kind for kind in kinds)
        inputs = [x.split() for split in world.SPLITS for x, _ in texts(variant.base.name, split)]
        for label in variant.labels:
            share = sum(label in words for words in inputs) / len(inputs)
            silent = variant.base.name in ("toy_scitail", "toy_wic", "toy_paws")
            assert share == 0 if silent else share < 0.025, (label, share)


# --- lengths ---------------------------------------------------------------------------------

# Tokens of prefixed inputs with EOS: `▁ b o o l q` adds 6 and `:` adds 1 to boolq's 26.
LONGEST = {
    "toy_boolq": 33,
    "toy_cb": 33,
    "toy_rte": 31,
    "toy_mrpc": 24,
    "toy_wic": 27,
    "toy_scitail": 26,
    "toy_paws": 22,
}


@each
def test_variant_texts_fit_demo_buckets_without_unknown_pieces(variant):
    """Tokens with EOS: inputs of at most 36 and targets of 2 (gin/runs/demo.gin)."""
    model = str(toy_vocabulary.VOCABULARY_PATH)
    unknown = sentencepiece.SentencePieceProcessor(model_file=model).unk_id()
    vocabulary, longest = toy.vocabulary(), 0
    for split in world.SPLITS:
        for row in toy.rows(variant.base.name, split):
            inputs, target = map(vocabulary.encode, variant.told(*row))
            assert unknown not in inputs and len(target) + 1 == 2
            longest = max(longest, len(inputs) + 1)
    assert longest <= 36
    if variant.suffix == "prefixed":
        assert longest == LONGEST[variant.base.name]

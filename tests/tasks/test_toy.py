"""The toy suite: properties of its splits, labels, vocabulary and pretraining text."""

import collections
import random
import re

import numpy as np
import pytest
import sentencepiece

from mpt_jax.data import preprocessors, task_lookup
from mpt_jax.tasks import toy, toy_pretrain, toy_tasks, toy_vocabulary
from mpt_jax.tasks import toy_world as world

NAMES = sorted(toy.TASKS)
CLASSIFICATION = [name for name in NAMES if toy.TASKS[name].labels]


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(toy_vocabulary.VOCABULARY_PATH))


@pytest.fixture(scope="module")
def pretraining():
    rng = random.Random(5)
    return [toy_pretrain.example(rng) for _ in range(20_000)]


# --- the world -------------------------------------------------------------------------------


def test_split_of_every_triple_in_one_split_and_values_in_each():
    for relation in world.RELATIONS + world.DEEDS:
        for person in world.PEOPLE:
            dealt = [set(world.values(split, relation, person)) for split in world.SPLITS]
            assert all(len(values) >= 2 for values in dealt)
            expected = set(world.NOUNS[relation.kind]) - {person}
            assert set.union(*dealt) == expected
            assert sum(map(len, dealt)) == len(expected)


def _triples(text: str) -> set[tuple[str, str, str]]:
    """Returns the facts stated or claimed in a text, by matching every statement and check."""
    found = set()
    for relation in world.RELATIONS + world.DEEDS:
        for form in relation.statements + relation.checks:
            pattern = re.escape(form).replace(r"\{s\}", r"(?P<s>\w+)")
            pattern = pattern.replace(r"\{o\}", r"(?P<o>\w+)").replace(r"\ ", " ")
            for match in re.finditer(rf"\b{pattern}(?!\w)", text):
                subject, value = match["s"], match["o"]
                if subject in world.PEOPLE and value in world.NOUNS[relation.kind]:
                    found.add((subject, relation.name, value))
    return found


STATING = "mnli qnli squad record boolq cb rte mrpc paws".split()


@pytest.mark.parametrize("name", [f"toy_{name}" for name in STATING])
def test_toy_splits_share_no_fact(name):
    facts = {
        split: set.union(*(_triples(text) for text, _ in toy.rows(name, split)))
        for split in world.SPLITS
    }
    assert all(len(known) > 100 for known in facts.values())
    for split, known in facts.items():
        for subject, relation, value in known:
            kind = next(r for r in world.RELATIONS + world.DEEDS if r.name == relation)
            assert world.split_of(world.Fact(subject, kind, value)) == split


def _rules(texts) -> list[set[tuple[str, str]]]:
    """Memberships (thing, kind), laws (kind, trait) and claims (thing, trait) in scitail texts."""
    patterns = (
        r"the (\w+) (?:is|counts as) a (\w+)",
        r"(?:every|any) (\w+) (\w+)",
        r"^the (\w+) (\w+) \.",
    )
    texts = list(texts)
    return [{found for text in texts for found in re.findall(p, text)} for p in patterns]


def test_toy_scitail_splits_share_no_rule_or_conclusion():
    told = {
        split: _rules(text for text, _ in toy.rows("toy_scitail", split)) for split in world.SPLITS
    }
    for split, found in told.items():
        assert all(len(facts) >= 20 for facts in found)
        for other in set(world.SPLITS) - {split}:
            assert not any(mine & theirs for mine, theirs in zip(found, told[other], strict=True))


@pytest.mark.parametrize("split", world.SPLITS)
def test_toy_scitail_label_matches_stated_rules(split):
    for text, label in toy.rows("toy_scitail", split):
        memberships, laws, ((thing, trait),) = _rules([text])
        kinds = {kind for known, kind in memberships if known == thing}
        follows = any((kind, trait) in laws for kind in kinds)
        assert label == ("supported" if follows else "unsupported"), text


@pytest.mark.parametrize("name", NAMES)
def test_toy_splits_share_no_row(name):
    rows = {split: set(toy.rows(name, split)) for split in world.SPLITS}
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]


def test_pretraining_text_has_no_held_out_fact(pretraining):
    told = collections.Counter()
    for text, _ in pretraining:
        if "<" not in text and "placeholder" not in text:
            told.update(_triples(text))
    by_name = {relation.name: relation for relation in world.RELATIONS + world.DEEDS}
    splits = collections.Counter(
        world.split_of(world.Fact(subject, by_name[relation], value))
        for subject, relation, value in told
    )
    assert splits["train"] > 1000
    assert set(splits) == {"train"}
    memberships, laws, _ = _rules(text for text, _ in pretraining)
    trained = _rules(text for text, _ in toy.rows("toy_scitail", "train"))
    assert memberships & trained[0] and laws & trained[1]
    for split in ("validation", "test"):
        held_out = _rules(text for text, _ in toy.rows("toy_scitail", split))
        assert not memberships & held_out[0] and not laws & held_out[1]


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_toy_rows_depend_only_on_task_and_split(name):
    first = toy.rows(name, "validation")
    toy.rows.cache_clear()
    random.seed(0)
    assert toy.rows(name, "validation") == first
    assert len(set(first)) == len(first) == 200


def test_toy_rows_do_not_change_between_releases():
    """Published scores use these rows; Python's random draws are unchanged since 3.2."""
    assert toy.rows("toy_boolq", "test")[0] == (
        "is the phone sold by wanda ? | emma offers a phone . wanda sells a hat .",
        "no",
    )
    assert toy.rows("toy_squad", "train")[7] == (
        "where does ben live ? | simon lives in london . ben lives in berlin . ben wants a knife .",
        "berlin",
    )


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_toy_labels_balanced(name):
    labels = toy.TASKS[name].labels
    for split in world.SPLITS:
        counts = collections.Counter(target for _, target in toy.rows(name, split))
        assert set(counts) == set(labels)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_toy_texts_fit_lengths_without_unknown_pieces(name, pieces):
    longest = {"inputs": 48, "targets": 16}
    for split in world.SPLITS:
        for row in toy.rows(name, split):
            for text, limit in zip(row, longest.values(), strict=True):
                ids = pieces.encode(text)
                assert len(ids) + 1 <= limit
                assert pieces.unk_id() not in ids
                assert len(ids) == len(text.split())


def test_toy_inputs_have_no_task_name():
    prefixes = {name.removeprefix("toy_") for name in NAMES}
    for name in NAMES:
        assert not any(text.split()[0] in prefixes for text, _ in toy.rows(name, "validation"))


# --- bag-of-words baselines ------------------------------------------------------------------

# Accuracy (percent, test) of scikit-learn's logistic regression on bags of words, trained on
# all training rows; chance is 50, or 33 with three labels. Only CB (which verb reports) and
# in part SST-2 (which adjective, unless turned by a "not") are meant to show in single words.
BAG_OF_WORDS = {
    "toy_sst2": 69.0,
    "toy_mnli": 37.0,
    "toy_qnli": 51.5,
    "toy_qqp": 52.5,
    "toy_boolq": 48.5,
    "toy_cb": 100.0,
    "toy_rte": 51.5,
    "toy_mrpc": 52.0,
    "toy_wic": 45.0,
    "toy_scitail": 51.5,
    "toy_paws": 53.0,
}


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_toy_task_bag_of_words_accuracy(name):
    feature_extraction = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression

    vectorizer = feature_extraction.CountVectorizer(token_pattern=r"\S+")
    train, test = toy.rows(name, "train"), toy.rows(name, "test")
    classifier = LogisticRegression(max_iter=200).fit(
        vectorizer.fit_transform([text for text, _ in train]), [target for _, target in train]
    )
    features = vectorizer.transform([text for text, _ in test])
    accuracy = 100 * classifier.score(features, [target for _, target in test])
    assert abs(accuracy - BAG_OF_WORDS[name]) < 3  # solvers differ in a few of 200 rows


# --- few-shot --------------------------------------------------------------------------------


def test_toy_few_shot_rows_do_not_change_between_releases():
    """Published scores use these draws."""
    rows_of = {
        name: task_lookup.find_task(name).source.few_shot_indices("train")
        for name in ("toy_boolq_k4_s0", "toy_boolq_k4_s1", "toy_rte_k4_s0")
    }
    assert rows_of["toy_boolq_k4_s0"] == [1795, 732, 938, 1560]
    assert len(set(map(tuple, rows_of.values()))) == 3


def test_toy_few_shot_run_trains_on_draw_and_tests_on_all():
    task = task_lookup.find_task("toy_wic_k5_s7")
    lengths = {"inputs": 48, "targets": 12}

    def texts(split):
        dataset = task.get_dataset(sequence_length=lengths, split=split, shuffle=False)
        return list(dataset.as_numpy_iterator())

    train, drawn = texts("train"), random.Random("toy_wic 5 7").sample(range(2000), 5)
    assert task.source.few_shot_indices("train") == drawn
    expected = [toy.rows("toy_wic", "train")[index] for index in drawn]
    assert [x["inputs_pretokenized"].decode() for x in train] == [text for text, _ in expected]
    assert [x["targets_pretokenized"].decode() for x in train] == [target for _, target in expected]
    assert {x["task_ids"].item() for x in train} == {preprocessors.task_id("toy_wic_k5_s7")}
    assert len(texts("test")) == 200
    assert task.num_input_examples("train") == 5


# --- metrics ---------------------------------------------------------------------------------


def test_toy_metrics_by_hand():
    targets, predictions = ["yes", "yes", "no", "no"], ["yes", "no", "no", "maybe"]
    found = {}
    for metric in toy.metrics_of(toy.TASKS["toy_boolq"]):
        found.update(metric(targets, predictions))
    # yes: precision 1, recall 1/2.
    f1 = {"f1": pytest.approx(200 / 3), "f1_undefined": 0.0}
    assert found == {"accuracy": 50.0, **f1, "invalid": 25.0}
    (text,) = toy.metrics_of(toy.TASKS["toy_d2t"])
    overlap = text(["a b c", "d"], ["a b x", "d"])
    np.testing.assert_allclose(overlap["f1"], (200 / 3 + 100) / 2)
    assert overlap["exact_match"] == 50.0
    assert list(overlap) == ["f1", "exact_match"]  # the first one selects, and tables show it


def test_label_f1_three_labels_is_mean():
    labels = toy.TASKS["toy_cb"].labels
    targets, predictions = [*labels, labels[0]], [labels[0], labels[2], labels[2], "?"]
    # Precision and recall: 1 and 1/2; never predicted; 1/2 and 1.
    found = toy.label_f1(labels)(targets, predictions)
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 0 + 2 / 3) / 3)


# --- vocabulary ------------------------------------------------------------------------------


def test_word_ids_match_sentencepiece(pieces, pretraining):
    ids = toy_vocabulary.word_ids()
    for text, target in pretraining[:500]:
        words = [word for word in f"{text} {target}".split() if not word.startswith("<")]
        assert [ids[word] for word in words] == pieces.encode(" ".join(words))


def test_pretrained_ids_are_the_words_of_pretraining(pieces):
    seen, rng = set(), random.Random(0)
    for make, _ in toy_pretrain.MIXTURE:
        for _ in range(1500):
            seen |= {i for text in make(rng) for i in pieces.encode(text)}
    words = {i for i in range(3, pieces.vocab_size()) if len(pieces.id_to_piece(i)) > 1}
    words = {i for i in words if pieces.id_to_piece(i).startswith("▁")}
    assert set(toy_vocabulary.pretrained_ids()) == seen & words


def test_toy_vocabulary_fits_backbone_and_keeps_special_ids(pieces):
    vocabulary = toy.vocabulary()
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.vocab_size == pieces.vocab_size() + toy_vocabulary.EXTRA_IDS
    assert vocabulary.vocab_size <= toy_vocabulary.EMBEDDING_ROWS
    assert toy_vocabulary.EMBEDDING_ROWS % 128 == 0
    assert toy_vocabulary.word_ids()["<0>"] == vocabulary.vocab_size - 1
    assert pieces.decode(pieces.encode("an unheardof word")) == "an unheardof word"
    assert pieces.unk_id() not in pieces.encode("an unheardof word")


def test_train_vocabulary_reproduces_shipped_file():
    assert toy_vocabulary.train_vocabulary() == toy_vocabulary.VOCABULARY_PATH.read_bytes()


# --- pretraining -----------------------------------------------------------------------------


def test_pretraining_targets_include_every_label_word(pretraining):
    """In at least 1 of 1,000 targets, and in at least three tasks."""
    tasks_of = collections.defaultdict(collections.Counter)
    for text, target in pretraining:
        task = "span" if "<" in text else text.split()[0]
        for word in set(target.split()):
            tasks_of[word][task] += 1
    words = {label for task in toy.TASKS.values() for label in task.labels}
    for word in words:
        assert sum(tasks_of[word].values()) >= len(pretraining) / 1000, word
        assert len(tasks_of[word]) >= 3, (word, tasks_of[word])


def test_pretraining_text_has_no_target_task(pretraining):
    known = {
        text for task in toy_tasks.TARGET_TASKS for split in world.SPLITS
        for text, _ in toy.rows(task.name, split)
    }  # fmt: skip
    for text, _ in pretraining:
        assert text.partition(" : ")[2] not in known
        assert text not in known


def test_pretraining_skills_avoid_labels_of_same_question(pretraining):
    """boolq, rte and scitail ask whether a claim follows; mrpc and paws ask for equal meaning."""
    following = {"yes", "no", "true", "false", "supported", "unsupported"}
    saying_the_same = {"equivalent", "distinct", "paraphrase", "changed"}
    answers = collections.defaultdict(collections.Counter)
    for text, target in pretraining:
        if "<" not in text:
            answers[text.split()[0]][target] += 1
    for skill in ("mnli", "follows", "qnli"):
        assert answers[skill] and not following & set(answers[skill])
    for skill in ("qqp", "equal"):
        assert answers[skill] and not saying_the_same & set(answers[skill])


def test_pretrain_chunk_examples_fit_and_repeat():
    inputs, targets = toy.pretrain_chunk(3)
    assert inputs.shape == (toy.PRETRAIN_CHUNK, toy_pretrain.LENGTHS["inputs"])
    assert (inputs[:, -1] == 0).all() and (targets[:, -1] == 0).all()  # EOS still fits
    assert (inputs[:, 0] > 0).all() and (targets[:, 0] > 0).all()
    again, _ = toy.pretrain_chunk(3)
    np.testing.assert_array_equal(inputs, again)
    assert (toy.pretrain_chunk(4)[0] != inputs).any()


def test_corrupt_is_reversible():
    rng = random.Random(0)
    for _ in range(200):
        words = [f"w{i}" for i in range(rng.randint(1, 30))]
        text, target = toy_pretrain.corrupt(rng, words)
        hidden = dict(re.findall(r"(<\d>) ([^<]+?) ?(?=<|$)", target))
        whole = " ".join(hidden.get(word, word) for word in text.split())
        assert whole.split() == words
        assert hidden

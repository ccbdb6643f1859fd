"""Metrics of generated text, compared with hand computation, NLTK and the COCO caption code."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest
from nltk.translate import nist_score

from mpt_jax.tasks import generation_metrics as metrics
from tests.fixtures.processes import run_script

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "cider_d.json").read_text())
ALL = {
    "bleu": metrics.bleu,
    "ter": metrics.ter,
    "rouge_l": metrics.rouge_l,
    "meteor_exact_stem": metrics.meteor_exact_stem,
    "nist": metrics.nist,
    "cider_d": metrics.cider_d,
}
TEXTS = [
    ["The Vaults is a pub near Café Adriatic.", "Near Café Adriatic is a pub, The Vaults."],
    ["日本 has 1,000 islands; some are small."],
    ["It serves “fish & chips” at £20-25 — 5 out of 5!", "Fish.", "It serves fish at £20-25."],
]


def of(name, targets, predictions):
    (value,) = ALL[name](targets, predictions).values()
    assert isinstance(value, float)
    return value


# --- All of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_generation_metric_name_and_extreme_values(name):
    (key,) = ALL[name](TEXTS, ["x", "y", "z"])
    assert key == name
    best = of(name, TEXTS, [target[-1] for target in TEXTS])
    worst = of(name, TEXTS, ["", "", ""])
    if name == "ter":
        assert best == 0.0 and worst > 70
    else:
        assert worst == 0.0
        limits = {"bleu": (99.9, 100.1), "rouge_l": (99.9, 100.1), "meteor_exact_stem": (80, 100)}
        low, high = limits.get(name, (1.0, 10.0))
        assert low < best < high


@pytest.mark.parametrize("name", ALL)
def test_generation_metric_empty_prediction_lowers_score(name):
    """No metric fails on it, on a row of one word, or on text of another script."""
    targets = [*TEXTS, ["Yes"], ["это 日本 é"]]
    said = [target[0] for target in targets]
    full, less = of(name, targets, said), of(name, targets, ["", *said[1:]])
    assert less > full if name == "ter" else less < full


@pytest.mark.parametrize("name", ["bleu", "ter", "rouge_l", "meteor_exact_stem", "nist"])
def test_generation_metric_best_of_several_references_counts(name):
    """Another reference never hurts a prediction that equals a reference of the same length."""
    alone = of(name, [["a b c d"], ["e f g h"]], ["a b c d", "e f g h"])
    more = of(name, [["w x y z", "a b c d"], ["e f g h"]], ["a b c d", "e f g h"])
    if name == "nist":  # references also determine the information
        assert more > 0
    else:
        assert more == pytest.approx(alone)


@pytest.mark.parametrize("name", ALL)
def test_generation_metric_other_scripts_are_words(name):
    targets = [["日本 寿司 это é"], ["a b c d"]]
    wrong = of(name, targets, ["中国 寿司 то è", "a b c d"])
    right = of(name, targets, ["日本 寿司 это é", "a b c d"])
    assert right < wrong if name == "ter" else right > wrong


def test_words_lower_case_split_at_punctuation_not_in_numbers():
    found = metrics.words("Zoë's 1,000 “Fish & Chips”, 日本. £20-25")
    assert found == "zoë's 1,000 “fish & chips” , 日本 . £20 - 25".split()


def test_references_of_targets_and_text_of_predictions():
    example = {"references": [b"\xc3\xa9 1", b"2"]}
    assert metrics.references("any", example, is_target=True) == ["é 1", "2"]
    assert metrics.references(" said ", example) == "said"


# --- By hand ---------------------------------------------------------------------------------


def test_bleu_varying_number_of_references():
    """One row: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples. The other: all. No brevity penalty."""
    targets = [["a b c x", "q"], ["e f g h i"]]
    precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert of("bleu", targets, ["a b c d", "e f g h i"]) == pytest.approx(expected)


def test_bleu_case_sensitive():
    assert of("bleu", [["A B C D"]], ["A B C D"]) == pytest.approx(100)
    assert of("bleu", [["A B C D"]], ["a b c d"]) < 1


@pytest.mark.parametrize(
    ("target", "prediction", "percent"),
    [
        (["a b c d"], "a b c", 100 / 4),
        (["a b c d"], "a b c d e", 100 / 4),
        (["a b c d"], "c d a b", 100 / 4),  # one shift
        (["a b c d", "a b"], "a b c", 100 / 3),  # one edit, mean length 3
        (["A b"], "a B", 0),
    ],
)
def test_ter_edits_by_hand(target, prediction, percent):
    assert of("ter", [target], [prediction]) == pytest.approx(percent)


def test_rouge_l_by_hand():
    """'the cat on mat' in 'the cat sat on the mat': precision 1, recall 4/6."""
    target = ["the cat sat on the mat", "no"]
    assert of("rouge_l", [target], ["The cat on mat"]) == pytest.approx(80)
    assert of("rouge_l", [target, ["x"]], ["The cat on mat", "y"]) == pytest.approx(40)


@pytest.mark.parametrize(
    ("target", "prediction", "percent"),
    [
        # m equal words in one chunk: F = 1, penalty (1/m)^3 / 2.
        (["a b"], "a b", 100 * (1 - 0.5 / 8)),
        (["cats sleeping"], "cat sleeps", 100 * (1 - 0.5 / 8)),  # stems
        (["big dog"], "large hound", 0),  # no synonyms
        # P = 1/2, R = 1/4: F = PR / (0.9 P + 0.1 R), one match in one chunk.
        (["a b c d"], "a x", 100 * 0.5 * (1 / 8) / (0.45 + 0.025)),
        (["no", "a b"], "a b", 100 * (1 - 0.5 / 8)),
    ],
)
def test_meteor_exact_stem_by_hand(target, prediction, percent):
    assert of("meteor_exact_stem", [target], [prediction]) == pytest.approx(percent)


def test_nist_by_hand():
    """a: log2 3/2, b: log2 3, 'a b': log2 2/1. Two words of three: a penalty of one half."""
    expected = 0.5 * ((math.log2(3 / 2) + math.log2(3)) / 2 + 1)
    assert of("nist", [["a a b"]], ["a b"]) == pytest.approx(expected)


def test_nist_clips_by_maximum_count_of_any_reference():
    """Both references have one 'a': one of 'a a' counts, with log2 4/2 bits, over two words."""
    assert of("nist", [["a b", "c a"]], ["a a"]) == pytest.approx(0.5)


def test_nist_single_references_matches_nltk():
    rng = random.Random(0)
    targets = [[" ".join(rng.choices("abcdef", k=rng.randint(6, 20)))] for _ in range(40)]
    said = [" ".join(rng.choices("abcdefg", k=rng.randint(5, 18))) for _ in targets]
    expected = nist_score.corpus_nist(
        [[t.split() for t in target] for target in targets], [s.split() for s in said], n=5
    )
    assert of("nist", targets, said) == pytest.approx(expected)


LN2 = math.log(2)


@pytest.mark.parametrize(
    ("targets", "predictions", "value"),
    [
        # Two documents: every n-gram has idf ln 2. Words and pairs are equal; there is no triple.
        # Then one word of two is shared, and 'x' has the idf of a word of one document.
        ([["a b"], ["c d"]], ["a b", "c x"], 10 * (2 / 4 + 0.5 / 4) / 2),
        # One word fewer: cosine 1/sqrt 2, and exp(-1 / 72) for the length.
        ([["a b"], ["c d"]], ["a", ""], 10 * math.exp(-1 / 72) / math.sqrt(2) / 4 / 2),
        # 'a a': min(2, 1) * 1 over 2 * sqrt 2, where a cosine would have 2.
        ([["a b"], ["c d"]], ["a a", ""], 10 / (2 * math.sqrt(2)) / 4 / 2),
        # The mean over references, not the best.
        ([["a b", "e f"], ["c d"]], ["a b", ""], 10 * (2 / 4) / 2 / 2),
        # n-grams of all documents have no weight.
        ([["a b"], ["a d"]], ["a", "a"], 0.0),
        ([["a b"]], ["a b"], 0.0),
    ],
)
def test_cider_d_by_hand(targets, predictions, value):
    assert of("cider_d", targets, predictions) == pytest.approx(value)


@pytest.mark.parametrize("name", GOLDEN)
def test_cider_d_matches_coco_caption_code(name):
    case = GOLDEN[name]
    assert case["score"] > 1
    found = of("cider_d", case["targets"], case["predictions"])
    assert found == pytest.approx(case["score"], rel=1e-9)


# --- Libraries -------------------------------------------------------------------------------


def test_generation_metrics_import_libraries_at_first_call():
    script = (
        "import sys, mpt_jax.tasks.generation_metrics as m; libraries = set(m.LIBRARIES)\n"
        "assert not libraries & set(sys.modules)\n"
        "m.bleu([['a']], ['a'])\n"
        "assert libraries & set(sys.modules) == {'sacrebleu'}"
    )
    run_script(script)


@pytest.mark.parametrize("missing", metrics.LIBRARIES)
def test_generation_metrics_missing_library_error_names_package(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else found(n))
    with pytest.raises(ImportError, match=rf"{metrics.LIBRARIES[missing]}.*mpt-jax\[nlg\]"):
        metrics.bleu([["a"]], ["a"])

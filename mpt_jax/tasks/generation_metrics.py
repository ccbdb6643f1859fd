"""Metrics of generated text against one or several references, over the whole evaluated set.

Each metric is a SeqIO metric `(targets, predictions) -> {name: value}`. A target is a list of at
least one reference, as returned by the postprocessor `references`. BLEU, TER, ROUGE-L and METEOR
are in percent; NIST and CIDEr-D have other units. Lower is better only for TER.

BLEU and TER are computed by sacreBLEU, ROUGE-L by rouge-score and METEOR by NLTK. These libraries
are in the extra `nlg` and are imported at the first call, because importing them takes seconds.
NIST, CIDEr-D, ROUGE-L and METEOR compare the words that `words` returns.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Targets = Sequence[Sequence[str]]
Ngram = tuple[str, ...]

# Package -> what to install.
LIBRARIES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "nltk": "nltk"}
_NIST_ORDER, _CIDER_ORDER = 5, 4
_CIDER_WIDTH = 6.0


def references(text: str, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """SeqIO postprocessor that returns the references of a target, or the text of a prediction."""
    if not is_target:
        return text.strip()
    return [reference.decode() for reference in np.asarray(example["references"]).tolist()]


def check_installed() -> None:
    """Raises ImportError with the install command if a library of these metrics is missing."""
    missing = [LIBRARIES[name] for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Cannot score generated text without {', '.join(missing)}. Run "
            "`pip install 'mpt-jax[nlg]'`, or `pip install --editable '.[nlg]'` in a clone."
        )


def words(text: str) -> list[str]:
    """Returns lower-case words and punctuation marks, split as in mteval-v13a.

    Characters of non-Latin scripts are kept.
    """
    return _splitter()(text.lower()).split()


# --- Metrics of libraries --------------------------------------------------------------------


def bleu(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns sacreBLEU's corpus BLEU in percent: 13a tokenization, case-sensitive, exponential
    smoothing."""
    metric = _module("sacrebleu.metrics").BLEU(force=True)  # no warning if texts look tokenized
    return {"bleu": metric.corpus_score(list(predictions), _streams(targets)).score}


def ter(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns sacreBLEU's translation edit rate in percent, of lower-case words split at spaces.

    The number of edits to the nearest reference, divided by the mean length of the references.
    Lower is better; the value can exceed 100.
    """
    metric = _module("sacrebleu.metrics").TER()
    return {"ter": metric.corpus_score(list(predictions), _streams(targets)).score}


def rouge_l(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns ROUGE-L in percent: the F1 of the longest common subsequence with the best reference,
    averaged over predictions."""
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        scorer.score_multi(list(target), prediction)["rougeL"].fmeasure
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"rouge_l": 100 * float(np.mean(best))}


def meteor_exact_stem(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns METEOR (2007) in percent, without synonyms: words match if their stems are equal.

    The mean over predictions of the score with the best reference (alpha 0.9, beta 3, gamma 0.5).
    Stems are Porter's. Scores are not comparable with METEOR 1.5. Synonyms are omitted because they
    need a download of WordNet.
    """
    score = functools.partial(
        _module("nltk.translate.meteor_score").meteor_score, wordnet=_NoSynonyms()
    )
    scores = [
        score([words(reference) for reference in target], words(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"meteor_exact_stem": 100 * float(np.mean(scores))}


# --- Metrics implemented here ----------------------------------------------------------------


def nist(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns NIST-5 as in mteval-v13a (Doddington, 2002), in bits per n-gram; 0 is worst.

    For each n = 1 .. 5, the total information of the n-grams that predictions share with any of
    their references is divided by the number of n-grams in all predictions. The score is the sum
    of the five quotients, times a length penalty. The penalty is 0.5 if predictions are two thirds
    as long as the references on average. NLTK's NIST chooses one reference for each n, so its
    values agree only if there is a single reference.
    """
    all_references = [[words(reference) for reference in target] for target in targets]
    seen = collections.Counter(
        ngram for group in all_references for one in group for ngram in _ngrams(one, _NIST_ORDER)
    )
    total = sum(len(one) for group in all_references for one in group)
    shared, predicted, length, mean_length = np.zeros(_NIST_ORDER), np.zeros(_NIST_ORDER), 0, 0.0
    for group, prediction in zip(all_references, map(words, predictions), strict=True):
        most = functools.reduce(
            lambda left, right: left | right, (_counts(one, _NIST_ORDER) for one in group)
        )
        for ngram, count in _counts(prediction, _NIST_ORDER).items():
            predicted[len(ngram) - 1] += count
            if ngram in most:
                before = seen[ngram[:-1]] if len(ngram) > 1 else total
                information = math.log2(before / seen[ngram])
                shared[len(ngram) - 1] += min(count, most[ngram]) * information
        length += len(prediction)
        mean_length += float(np.mean([len(one) for one in group]))
    if not length or not mean_length:
        return {"nist": 0.0}
    steepness = math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(steepness * math.log(min(1.0, length / mean_length)) ** 2)
    return {"nist": float((shared / np.maximum(1, predicted)).sum()) * penalty}


def cider_d(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Returns CIDEr-D (Vedantam et al., 2015), 0 to 10, which the COCO caption code calls CIDEr.

    The clipped similarity between tf-idf vectors of n-grams of the prediction and of each
    reference, with a Gaussian penalty for different lengths (sigma 6), averaged over references,
    n = 1 .. 4 and the evaluated set. For the idf, the references of each example are one document,
    so the value depends on all evaluated examples and is 0 for a single example. Words are not
    stemmed.
    """
    groups = [[_counts(words(one), _CIDER_ORDER) for one in target] for target in targets]
    frequency = collections.Counter(ngram for group in groups for ngram in set().union(*group))
    vectors = functools.partial(_tf_idf, frequency=frequency, documents=len(groups))
    scores = []
    for group, prediction in zip(groups, predictions, strict=True):
        vector = vectors(_counts(words(prediction), _CIDER_ORDER))
        scores.append(np.mean([_clipped_similarity(vector, vectors(one)) for one in group]))
    return {"cider_d": 10 * float(np.mean(scores))}


def _tf_idf(
    counts: Mapping[Ngram, int], frequency: Mapping[Ngram, int], documents: int
) -> tuple[list[dict[Ngram, float]], int]:
    """Returns the tf-idf weights of a text's n-grams for each n, and the text's number of words."""
    weights: list[dict[Ngram, float]] = [{} for _ in range(_CIDER_ORDER)]
    for ngram, count in counts.items():
        idf = math.log(documents / max(1, frequency.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * idf
    return weights, sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _clipped_similarity(
    prediction: tuple[list[dict[Ngram, float]], int],
    reference: tuple[list[dict[Ngram, float]], int],
) -> float:
    """Returns the clipped cosine similarity of two texts' vectors, averaged over n, 0 to 1."""
    cosines = []
    for predicted, expected in zip(prediction[0], reference[0], strict=True):
        both = [ngram for ngram in predicted if ngram in expected]
        shared = sum(min(predicted[ngram], expected[ngram]) * expected[ngram] for ngram in both)
        norms = math.hypot(*predicted.values()) * math.hypot(*expected.values())
        cosines.append(shared / norms if norms else 0.0)
    difference = prediction[1] - reference[1]
    return float(np.mean(cosines)) * math.exp(-(difference**2) / (2 * _CIDER_WIDTH**2))


def _ngrams(text: Sequence[str], order: int) -> list[Ngram]:
    """Returns all n-grams of a text for n = 1 .. order."""
    starts = range(len(text))
    return [
        tuple(text[i : i + n]) for n in range(1, order + 1) for i in starts if i + n <= len(text)
    ]


def _counts(text: Sequence[str], order: int) -> collections.Counter[Ngram]:
    return collections.Counter(_ngrams(text, order))


# --- Adapters to the libraries ---------------------------------------------------------------


def _streams(targets: Targets) -> list[list[str | None]]:
    """Returns the first reference of each target, then the second, ...; None for missing ones."""
    most = max(len(target) for target in targets)
    return [[t[i] if i < len(t) else None for t in targets] for i in range(most)]


def _module(name: str) -> Any:
    check_installed()
    return importlib.import_module(name)


@functools.cache
def _splitter() -> Any:
    return _module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()


class _Words:
    """Tokenizer for rouge-score that uses `words`, because the default one drops letters other than
    a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return words(text)


class _NoSynonyms:
    """Stand-in for WordNet without any synonyms."""

    def synsets(self, word: str) -> list[Any]:
        """Returns no synonyms."""
        del word
        return []

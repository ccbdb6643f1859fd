"""Metrics of generated text against one or several references, over the whole evaluated set.

Each is a SeqIO metric `(targets, predictions) -> {name: value}`, whose targets are lists of at
least one reference; `references` makes them. BLEU, TER, ROUGE-L and METEOR are percents; NIST and
CIDEr-D have units of their own. TER is the one that is better when lower.

BLEU and TER are sacreBLEU's, ROUGE-L is rouge-score's and METEOR is NLTK's; these come with the
extra `nlg` and are imported when they are first called, since that takes seconds. NIST, CIDEr-D,
ROUGE-L and METEOR compare words as `words` has them.
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
    """SeqIO postprocessor: of a target all references, of a prediction its text."""
    if not is_target:
        return text.strip()
    return [reference.decode() for reference in np.asarray(example["references"]).tolist()]


def check_installed() -> None:
    """Raises ImportError where a library of these metrics is missing, with what to install."""
    missing = [LIBRARIES[name] for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Generated text is scored with {', '.join(missing)}, which is not installed. Run "
            "`pip install 'mpt-jax[nlg]'`, or `pip install --editable '.[nlg]'` in a clone."
        )


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, split as mteval-v13a does; other scripts stay."""
    return _splitter()(text.lower()).split()


# --- Of libraries ----------------------------------------------------------------------------


def bleu(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """BLEU in percent, sacreBLEU's: of the corpus, 13a words, case counts, smoothing `exp`."""
    metric = _module("sacrebleu.metrics").BLEU(force=True)  # no warning where texts look tokenized
    return {"bleu": metric.corpus_score(list(predictions), _streams(targets)).score}


def ter(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Translation edit rate in percent, sacreBLEU's: lower case, split at spaces; lower is better.

    Edits to the nearest reference, by the mean length of the references; can exceed 100.
    """
    metric = _module("sacrebleu.metrics").TER()
    return {"ter": metric.corpus_score(list(predictions), _streams(targets)).score}


def rouge_l(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-L in percent: mean F1 of the longest common subsequence with the best reference."""
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        scorer.score_multi(list(target), prediction)["rougeL"].fmeasure
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"rouge_l": 100 * float(np.mean(best))}


def meteor_exact_stem(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """METEOR of 2007 in percent without its synonyms: equal words and equal Porter stems match.

    The mean over the predictions of the best reference's score (alpha 0.9, beta 3, gamma 0.5).
    Neither METEOR 1.5 nor comparable with it; synonyms would need WordNet, which is a download.
    """
    score = functools.partial(
        _module("nltk.translate.meteor_score").meteor_score, wordnet=_NoSynonyms()
    )
    scores = [
        score([words(reference) for reference in target], words(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"meteor_exact_stem": 100 * float(np.mean(scores))}


# --- Our own ---------------------------------------------------------------------------------


def nist(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """NIST-5 as mteval-v13a computes it (Doddington, 2002), in bits per n-gram; 0 is worst.

    The mean information of the n-grams that a prediction shares with any of its references, summed
    over n = 1 .. 5, times a penalty for length, which is 0.5 at two thirds of the mean length of
    the references. NLTK's takes one reference for each n, so it agrees for single ones only.
    """
    all_references = [[words(reference) for reference in target] for target in targets]
    seen = collections.Counter(
        ngram for group in all_references for one in group for ngram in _ngrams(one, _NIST_ORDER)
    )
    total = sum(len(one) for group in all_references for one in group)
    shared, said, length, mean_length = np.zeros(_NIST_ORDER), np.zeros(_NIST_ORDER), 0, 0.0
    for group, prediction in zip(all_references, map(words, predictions), strict=True):
        most = functools.reduce(
            lambda left, right: left | right, (_counts(one, _NIST_ORDER) for one in group)
        )
        for ngram, count in _counts(prediction, _NIST_ORDER).items():
            said[len(ngram) - 1] += count
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
    return {"nist": float((shared / np.maximum(1, said)).sum()) * penalty}


def cider_d(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """CIDEr-D (Vedantam et al., 2015), 0 to 10: what the COCO caption code calls CIDEr.

    The similarity of tf-idf vectors of n-grams with those of each reference, clipped, with a
    Gaussian penalty for another length (sigma 6), averaged over references, n = 1 .. 4 and the
    evaluated set. Documents of the idf are the groups of references of that set, so the value
    depends on which examples are evaluated, and is 0 for a single one. Words are not stemmed.
    """
    groups = [[_counts(words(one), _CIDER_ORDER) for one in target] for target in targets]
    frequency = collections.Counter(ngram for group in groups for ngram in set().union(*group))
    vectors = functools.partial(_tf_idf, frequency=frequency, documents=len(groups))
    scores = []
    for group, prediction in zip(groups, predictions, strict=True):
        said = vectors(_counts(words(prediction), _CIDER_ORDER))
        scores.append(np.mean([_clipped_similarity(said, vectors(one)) for one in group]))
    return {"cider_d": 10 * float(np.mean(scores))}


def _tf_idf(
    counts: Mapping[Ngram, int], frequency: Mapping[Ngram, int], documents: int
) -> tuple[list[dict[Ngram, float]], int]:
    """Returns for each n the weights of a text's n-grams, and its number of words."""
    weights: list[dict[Ngram, float]] = [{} for _ in range(_CIDER_ORDER)]
    for ngram, count in counts.items():
        idf = math.log(documents / max(1, frequency.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * idf
    return weights, sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _clipped_similarity(
    said: tuple[list[dict[Ngram, float]], int], reference: tuple[list[dict[Ngram, float]], int]
) -> float:
    """Returns the mean over n of the clipped cosine of two texts' vectors, 0 to 1."""
    cosines = []
    for ours, theirs in zip(said[0], reference[0], strict=True):
        both = [ngram for ngram in ours if ngram in theirs]
        shared = sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in both)
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        cosines.append(shared / norms if norms else 0.0)
    difference = said[1] - reference[1]
    return float(np.mean(cosines)) * math.exp(-(difference**2) / (2 * _CIDER_WIDTH**2))


def _ngrams(text: Sequence[str], order: int) -> list[Ngram]:
    """All n-grams of a text, n = 1 .. order."""
    starts = range(len(text))
    return [
        tuple(text[i : i + n]) for n in range(1, order + 1) for i in starts if i + n <= len(text)
    ]


def _counts(text: Sequence[str], order: int) -> collections.Counter[Ngram]:
    return collections.Counter(_ngrams(text, order))


# --- Ties ------------------------------------------------------------------------------------


def _streams(targets: Targets) -> list[list[str | None]]:
    """Every target's first reference, every target's second, ...; None where it has fewer."""
    most = max(len(target) for target in targets)
    return [[t[place] if place < len(t) else None for t in targets] for place in range(most)]


def _module(name: str) -> Any:
    check_installed()
    return importlib.import_module(name)


@functools.cache
def _splitter() -> Any:
    return _module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()


class _Words:
    """`words` as rouge-score calls it; its own tokenizer drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return words(text)


class _NoSynonyms:
    """A WordNet without entries."""

    def synsets(self, word: str) -> list[Any]:
        """Returns the synonyms of a word: none."""
        del word
        return []

"""Small data sets on disk under their real names and versions, with the features of the installed
TensorFlow Datasets, for tests that read them as a job would.

Rows have places in the "original file" (0, 1, ...) and are stored in another order, in several
shards, as TFDS does. Where a set has an `idx`, it grows with the place but has gaps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

Rows = Callable[[int], dict[str, Any]]


def idx(place: int) -> int:
    return 3 * place + 1


def texts(*names: str, labels: int = 2, with_idx: bool = True) -> Rows:
    """Rows whose texts are '<name> <place>'."""

    def row(place: int) -> dict[str, Any]:
        made: dict[str, Any] = {name: f"{name} {place}" for name in names}
        return {**made, "label": place % labels, **({"idx": idx(place)} if with_idx else {})}

    return row


def _stsb(place: int) -> dict[str, Any]:
    return {**texts("sentence1", "sentence2")(place), "label": (place % 50) / 10}


def _wsc(place: int) -> dict[str, Any]:
    return {
        "text": f"Mark told Pete {place} lies about himself .",
        "span1_text": "Mark",
        "span1_index": 0,
        "span2_text": "himself",
        "span2_index": 6,
        "label": place % 2,
        "idx": idx(place),
    }


def _wic(place: int) -> dict[str, Any]:
    places = {"start1": 0, "end1": 1, "start2": 0, "end2": 1}
    return {**texts("sentence1", "sentence2", "word")(place), **places}


def _multirc(place: int) -> dict[str, Any]:
    """Five answers to a question, two questions to a paragraph."""
    number = {"paragraph": place // 10, "question": place // 5, "answer": place % 5}
    return {**texts("paragraph", "question", "answer")(place), "idx": number}


def _record(place: int) -> dict[str, Any]:
    """Every third query has two answers."""
    answers = ["Ann", "Bob"] if place % 3 == 0 else ["Bob"]
    return {
        "passage": f"Ann and Bob met Cy in {place}.\n@highlight\nThey left",
        "query": f"@placeholder met in {place}",
        "entities": ["Ann", "Bob", "Cy"],
        "answers": answers,
        "idx": {"passage": place // 2, "query": idx(place)},
    }


def _squad(place: int) -> dict[str, Any]:
    return {
        "id": f"q{place}",
        "title": "",
        "context": f"It (the cat) sat {place} times.",
        "question": f"Who sat {place} times?",
        "answers": {"text": ["the cat", f"cat no. {place}"], "answer_start": [4, 4]},
    }


def _mrqa(place: int) -> dict[str, Any]:
    tokens = {"tokens": ["It"], "offsets": [0]}
    span = {"start": [0], "end": [1]}
    return {
        "subset": "any",
        "qid": f"q{place}",
        "context": f"[DOC] It sat {place} times.",
        "context_tokens": tokens,
        "question": f"What sat {place} times?",
        "question_tokens": tokens,
        "detected_answers": {"text": ["It"], "char_spans": [span], "token_spans": [span]},
        "answers": ["It", f"It, {place}"],
    }


def _commonsenseqa(place: int) -> dict[str, Any]:
    choices = [f"choice {letter} {place}" for letter in "ABCDE"]
    return {
        **{name: f"{name} {place}" for name in ("id", "question")},
        "choices": choices,
        "answer": choices[place % 5],
        "abstractive_explanation": "",
        "extractive_explanation": "",
    }


def _openbookqa(place: int) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"{letter} {place}" for letter in "ABCD"}
    return {
        "question": {"stem": f"stem {place}", **choices},
        "fact1": "",
        "humanScore": 0.5,
        "clarity": 1.5,
        "turkIdAnonymized": "",
        "answerKey": place % 4,
    }


def _arc(place: int) -> dict[str, Any]:
    """Three to five options, the answer the last one from the fourth on."""
    answer = place % 5
    letters = "ABCDE"[: max(3, answer + 1)]
    return {
        "id": f"q{place}",
        "question": f"question {place}",
        "choices": {"text": [f"text {x} {place}" for x in letters], "label": list(letters)},
        "answerKey": letters[answer],
    }


def _anli(place: int) -> dict[str, Any]:
    made = texts("context", "hypothesis", labels=3, with_idx=False)(place)
    return {**made, "uid": f"u{place}"}


def _e2e(place: int) -> dict[str, Any]:
    """A row for each reference; two rows of three have the same meaning representation."""
    of = place - place % 3 if place % 3 < 2 else place
    reference = f"Nº {of} serves fish, says {place}."
    return {
        "gem_id": f"e{place}",
        "gem_parent_id": f"e{place}",
        "meaning_representation": f"name[Nº {of}], food[Fish & Chips]",
        "target": reference,
        "references": [reference],
    }


def _web_nlg(place: int) -> dict[str, Any]:
    """One or two references to a row."""
    references = [f"{way} {place}." for way in ("Born in", "It is")[: 1 + place % 2]]
    return {
        "gem_id": f"w{place}",
        "gem_parent_id": f"w{place}",
        "input": [f"Zoë_A. | birthPlace | City {place}", "City | partOf | Land"],
        "category": "Person",
        "webnlg_id": f"Id{place}",
        "target": references[0],
        "references": references,
    }


# The least that has a train split after 1,000 rows are held out.
_LARGE = 1_010

# TFDS name -> sizes of the splits that are read, and what is in row `place`.
DATA: Mapping[str, tuple[Mapping[str, int], Rows]] = {
    "glue/mnli:2.0.0": (
        {"train": 30, "validation_matched": 7, "validation_mismatched": 9},
        texts("premise", "hypothesis", labels=3),
    ),
    "glue/qqp:2.0.0": (
        {"train": _LARGE, "validation": 8},
        texts("question1", "question2"),
    ),
    "glue/qnli:2.0.0": ({"train": _LARGE, "validation": 8}, texts("question", "sentence")),
    "glue/sst2:2.0.0": ({"train": _LARGE, "validation": 8}, texts("sentence")),
    "glue/stsb:2.0.0": ({"train": 9, "validation": 11}, _stsb),
    "glue/mrpc:2.0.0": ({"train": 9, "validation": 11}, texts("sentence1", "sentence2")),
    "glue/rte:2.0.0": ({"train": 9, "validation": 277}, texts("sentence1", "sentence2")),
    "glue/cola:2.0.0": ({"train": 9, "validation": 11}, texts("sentence")),
    "super_glue/boolq:1.0.2": ({"train": 9, "validation": 11}, texts("question", "passage")),
    "super_glue/cb:1.0.2": (
        {"train": 9, "validation": 56},
        texts("premise", "hypothesis", labels=3),
    ),
    "super_glue/wic:1.0.2": ({"train": 9, "validation": 11}, _wic),
    "super_glue/wsc.fixed:1.0.2": ({"train": 9, "validation": 104}, _wsc),
    "super_glue/multirc:1.0.2": ({"train": 9, "validation": 277}, _multirc),
    "super_glue/record:1.0.2": ({"train": _LARGE, "validation": 9}, _record),
    "squad/v1.1:3.0.0": ({"train": _LARGE, "validation": 9}, _squad),
    "mrqa/natural_questions:1.0.0": ({"train": _LARGE, "validation": 9}, _mrqa),
    # Slow to write, and like the one above: here all rows of train are held out.
    "mrqa/hotpot_qa:1.0.0": ({"train": 9, "validation": 9}, _mrqa),
    "mrqa/search_qa:1.0.0": ({"train": 9, "validation": 9}, _mrqa),
    "mrqa/news_qa:1.0.0": ({"train": 9, "validation": 9}, _mrqa),
    "winogrande:1.2.0": (
        {"train_xl": _LARGE, "validation": 9},
        texts("sentence", "option1", "option2", with_idx=False),
    ),
    "yelp_polarity_reviews:0.2.0": (
        {"train": _LARGE, "test": 9},
        texts("text", with_idx=False),
    ),
    "sci_tail:1.0.0": (
        {"train": 9, "validation": 11, "test": 5},
        texts("premise", "hypothesis", with_idx=False),
    ),
    "paws_wiki/labeled_final_tokenized:1.1.0": (
        {"train": 9, "validation": 7, "test": 5},
        texts("sentence1", "sentence2", with_idx=False),
    ),
    "ag_news_subset:1.0.0": (
        {"train": _LARGE, "test": 9},
        texts("title", "description", labels=4, with_idx=False),
    ),
    "cos_e:0.0.1": ({"train": 9, "validation": 56}, _commonsenseqa),
    "openbookqa:0.1.0": ({"train": 9, "validation": 7, "test": 5}, _openbookqa),
    "ai2_arc/ARC-Easy:1.0.0": ({"train": 16, "validation": 7, "test": 9}, _arc),
    "ai2_arc/ARC-Challenge:1.0.0": ({"train": 16, "validation": 7, "test": 9}, _arc),
    # Here, too, all rows of train are held out but in one.
    "anli/r1:0.1.0": ({"train": 9, "validation": 7}, _anli),
    "anli/r2:0.1.0": ({"train": 9, "validation": 7}, _anli),
    "anli/r3:0.1.0": ({"train": _LARGE, "validation": 7}, _anli),
    "gem/e2e_nlg:1.1.0": ({"train": 9, "validation": 6, "test": 8}, _e2e),
    "gem/web_nlg_en:1.1.0": ({"train": 9, "validation": 6, "test": 8}, _web_nlg),
}


def stored_order(data: str, split: str) -> list[int]:
    """The places of a split's rows in the order in which they are stored."""
    size = DATA[data][0][split]
    return random.Random(f"{data} {split}").sample(range(size), size)


def write(folder: Path, data: str) -> None:
    """Writes one data set below `folder`, where tfds.load(data, data_dir=folder) finds it."""
    sizes, row = DATA[data]
    info = tfds.builder(data, data_dir=str(folder)).info
    Path(info.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=400)
    writer.initialize_splits(list(sizes))
    for split in sizes:
        writer.add_examples({split: [row(place) for place in stored_order(data, split)]})
    writer.close_all()

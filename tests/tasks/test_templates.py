"""Templates on rows written out here, with the expected text in full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tasks import templates


def applied(preprocessor, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts that a preprocessor makes of raw rows; lengths of lists are unknown to the graph,
    as they are in a data set."""

    def spec(value: Any) -> tf.TensorSpec:
        constant = tf.constant(value)
        return tf.TensorSpec([None] * constant.shape.rank, constant.dtype)

    signature = tf.nest.map_structure(spec, rows[0])
    dataset = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature)
    return [
        {name: _text(value) for name, value in example.items()}
        for example in preprocessor(dataset).as_numpy_iterator()
    ]


def _text(value: Any) -> Any:
    return [v.decode() for v in value] if isinstance(value, np.ndarray) else value.decode()


def strings(*values: str) -> Any:
    return np.array([value.encode() for value in values], object)


PAIR = {"premise": "premise", "hypothesis": "hypothesis"}
NLI = templates.labelled(PAIR, ("entailment", "neutral"))("mnli")


def test_labels_and_fields():
    row = {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": 1}
    assert applied(NLI, row) == [
        {"inputs": "mnli premise: A man sleeps. hypothesis: He rests.", "targets": "neutral"}
    ]


@pytest.mark.parametrize("text", ["", "日本 — naïve ‘q’ 🙂", "<b>1 < 2</b>", "tab\tand\nline"])
def test_texts_pass_unchanged(text):
    (made,) = applied(NLI, {"premise": text, "hypothesis": "x", "label": 0})
    assert made["inputs"] == f"mnli premise: {text} hypothesis: x"


def test_long_texts_are_whole():
    text = "word " * 50_000
    (made,) = applied(NLI, {"premise": text, "hypothesis": "end", "label": 0})
    assert made["inputs"] == f"mnli premise: {text} hypothesis: end"


def test_an_unlabelled_row_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError, match="-1"):
        applied(NLI, {"premise": "x", "hypothesis": "y", "label": -1})


def test_a_marker_may_differ_from_its_feature():
    fields = {"sentence": "sentence", "option0": "option1", "option1": "option2"}
    row = {"sentence": "_ ran.", "option1": "Ann", "option2": "Bob", "label": 1}
    (made,) = applied(templates.labelled(fields, ("option0", "option1"))("winogrande"), row)
    assert made == {
        "inputs": "winogrande sentence: _ ran. option0: Ann option1: Bob",
        "targets": "option1",
    }


@pytest.mark.parametrize(
    ("score", "target"),
    [(0.0, "0.0"), (3.75, "3.8"), (2.5, "2.4"), (2.857, "2.8"), (4.9, "4.8"), (5.0, "5.0")],
)
def test_similarity_is_rounded_to_fifths(score, target):
    fields = {"sentence1": "sentence1", "sentence2": "sentence2"}
    row = {"sentence1": "a", "sentence2": "b", "label": np.float32(score)}
    (made,) = applied(templates.similarity(fields)("stsb"), row)
    assert made == {"inputs": "stsb sentence1: a sentence2: b", "targets": target}


def test_markup_is_removed_and_other_brackets_stay():
    fields = {"question": "question", "paragraph": "paragraph"}
    template = templates.labelled(fields, ("no", "yes"), clean=templates.without_markup)
    row = {
        "question": "Is 1 < 2 > 0?",
        "paragraph": "<b>Sent 1: </b>One.<br><b>Sent 2: </b>Two.<br/>",
        "label": 1,
    }
    (made,) = applied(template("multirc"), row)
    assert made["inputs"] == (
        "multirc question: Is 1 < 2 > 0? paragraph: Sent 1: One. Sent 2: Two. "
    )


def span(text, first, second):
    (one, at), (two, to) = first, second
    return {
        "text": text,
        "span1_text": one,
        "span1_index": at,
        "span2_text": two,
        "span2_index": to,
        "label": 0,
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            span("This is a test sentence .", ("test", 3), ("This", 0)),
            "# This # is a * test * sentence .",
        ),
        (
            span("Mark (Jr.) told Pete he left", ("Mark (Jr.)", 0), ("he", 4)),
            "* Mark (Jr.) * told Pete # he # left",
        ),
        # The same word before and after: only the one at its place is marked.
        (span("he saw he and he", ("saw", 1), ("he", 4)), "he * saw * he and # he #"),
        # A span that is not at its place, as in one row of the data: no mark.
        (span("Lev and Zina ran", ("Lev, Zina", 0), ("ran", 3)), "Lev and Zina ran"),
        (
            span("Zoë mène 10% [sic] elle", ("Zoë", 0), ("[sic]", 3)),
            "* Zoë * mène 10% # [sic] # elle",
        ),
    ],
)
def test_spans_are_marked_by_word_number(row, expected):
    (made,) = applied(templates.coreference(("False", "True"))("wsc"), row)
    assert made == {"inputs": f"wsc text: {expected}", "targets": "False"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's (1.5%), no?", "It ' s ( 1 . 5 % ) , no ?"),
        ("naïve_name — 日本。 e\u0301", "naïve_name — 日本 。 e\u0301"),
        (" \t two  spaces\n", "two spaces"),
        ("", ""),
    ],
)
def test_punctuation_is_spaced(text, expected):
    assert templates.spaced(tf.constant(text)).numpy().decode() == expected


READING = templates.question(lambda row: row["answers"])("squad")


def test_the_first_answer_is_the_target_and_all_are_kept():
    row = {"question": "Who?", "context": "Ann, 5.", "answers": strings("Ann, 5", "Ann")}
    assert applied(READING, row) == [
        {
            "inputs": "squad question: Who ? context: Ann , 5 .",
            "targets": "Ann , 5",
            "answers": ["Ann , 5", "Ann"],
            "group": "",
        }
    ]


def test_a_question_without_an_answer_is_left_out():
    without = {"question": "Who?", "context": "", "answers": strings()}
    assert applied(READING, without) == []


def query(**row):
    return {
        "passage": "Ann met Bob.\n@highlight\nBob left\n@highlight\nAnn stayed",
        "query": "@placeholder left",
        "entities": strings("Ann", "Bob"),
        "answers": strings("Bob"),
        "idx": {"passage": 4, "query": 9},
        **row,
    }


def test_a_query_has_a_row_for_each_answer():
    made = applied(templates.cloze("record"), query(answers=strings("Bob", "Bobby")))
    inputs = (
        "record query: @placeholder left entities: Ann, Bob "
        "passage: Ann met Bob. Bob left. Ann stayed"
    )
    shared = {"inputs": inputs, "answers": ["Bob", "Bobby"], "group": "4/9"}
    assert made == [{**shared, "targets": "Bob"}, {**shared, "targets": "Bobby"}]


def test_a_query_without_answers_has_no_row_and_one_without_entities_has():
    assert applied(templates.cloze("record"), query(answers=strings())) == []
    (made,) = applied(templates.cloze("record"), query(entities=strings(), passage=""))
    assert made["inputs"] == "record query: @placeholder left entities:  passage: "

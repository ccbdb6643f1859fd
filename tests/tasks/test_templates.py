"""Templates, tested on handwritten rows with the full expected text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from mpt_jax.tasks import extra_sources, nlg, templates


def applied(preprocessor, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the texts that a preprocessor makes from raw rows.

    Lengths of lists are unknown to the graph, as in a data set.
    """

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


def test_labelled_joins_fields_and_label():
    row = {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": 1}
    assert applied(NLI, row) == [
        {"inputs": "mnli premise: A man sleeps. hypothesis: He rests.", "targets": "neutral"}
    ]


@pytest.mark.parametrize("text", ["", "日本 — naïve ‘q’ 🙂", "<b>1 < 2</b>", "tab\tand\nline"])
def test_labelled_keeps_texts_unchanged(text):
    (made,) = applied(NLI, {"premise": text, "hypothesis": "x", "label": 0})
    assert made["inputs"] == f"mnli premise: {text} hypothesis: x"


def test_labelled_keeps_long_texts():
    text = "word " * 50_000
    (made,) = applied(NLI, {"premise": text, "hypothesis": "end", "label": 0})
    assert made["inputs"] == f"mnli premise: {text} hypothesis: end"


def test_labelled_row_without_label_raises():
    with pytest.raises(tf.errors.InvalidArgumentError, match="-1"):
        applied(NLI, {"premise": "x", "hypothesis": "y", "label": -1})


def test_labelled_marker_differs_from_feature():
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
def test_similarity_rounds_to_fifths(score, target):
    fields = {"sentence1": "sentence1", "sentence2": "sentence2"}
    row = {"sentence1": "a", "sentence2": "b", "label": np.float32(score)}
    (made,) = applied(templates.similarity(fields)("stsb"), row)
    assert made == {"inputs": "stsb sentence1: a sentence2: b", "targets": target}


def test_without_markup_keeps_other_brackets():
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
        # The same word before and after: only the one at the index is marked.
        (span("he saw he and he", ("saw", 1), ("he", 4)), "he * saw * he and # he #"),
        # A span that is not at its index, as in one row of the data: no mark.
        (span("Lev and Zina ran", ("Lev, Zina", 0), ("ran", 3)), "Lev and Zina ran"),
        (
            span("Zoë mène 10% [sic] elle", ("Zoë", 0), ("[sic]", 3)),
            "* Zoë * mène 10% # [sic] # elle",
        ),
    ],
)
def test_coreference_marks_spans_by_word_number(row, expected):
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
def test_spaced_separates_punctuation(text, expected):
    assert templates.spaced(tf.constant(text)).numpy().decode() == expected


READING = templates.question(lambda row: row["answers"])("squad")


def test_question_first_answer_is_target_and_all_kept():
    row = {"question": "Who?", "context": "Ann, 5.", "answers": strings("Ann, 5", "Ann")}
    assert applied(READING, row) == [
        {
            "inputs": "squad question: Who ? context: Ann , 5 .",
            "targets": "Ann , 5",
            "answers": ["Ann , 5", "Ann"],
            "group": "",
        }
    ]


def test_question_without_answer_dropped():
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


def test_cloze_one_row_per_answer():
    made = applied(templates.cloze("record"), query(answers=strings("Bob", "Bobby")))
    inputs = (
        "record query: @placeholder left entities: Ann, Bob "
        "passage: Ann met Bob. Bob left. Ann stayed"
    )
    shared = {"inputs": inputs, "answers": ["Bob", "Bobby"], "group": "4/9"}
    assert made == [{**shared, "targets": "Bob"}, {**shared, "targets": "Bobby"}]


def test_cloze_no_answers_dropped_no_entities_kept():
    assert applied(templates.cloze("record"), query(answers=strings())) == []
    (made,) = applied(templates.cloze("record"), query(entities=strings(), passage=""))
    assert made["inputs"] == "record query: @placeholder left entities:  passage: "


# --- Multiple choice ---------------------------------------------------------------------------

EXTRA = {row.name: row for row in extra_sources.ROWS}


def asked(name: str, row: dict[str, Any], digits: bool = False) -> dict[str, Any]:
    words = EXTRA[name].words
    labels = tuple(str(number) for number in range(len(words))) if digits else words
    (made,) = applied(EXTRA[name].template(labels)(name), row)
    return made


def arc(answer: int, *options: str, labels: tuple[int, ...] = ()) -> dict[str, Any]:
    letters = np.array(labels or range(len(options)), np.int64)
    choices = {"text": strings(*options), "label": letters}
    return {"question": "Which?", "choices": choices, "answerKey": np.int64(answer)}


@pytest.mark.parametrize(
    ("row", "listed", "answer"),
    [
        (arc(1, "air", "iron"), "choice1: air choice2: iron", 1),
        (arc(4, *"abcde"), "choice1: a choice2: b choice3: c choice4: d choice5: e", 4),
        # Options that are not in the order of their letters: the row's letters count.
        (
            arc(0, "air", "iron", "oil", labels=(2, 0, 1)),
            "choice1: air choice2: iron choice3: oil",
            1,
        ),
        (arc(0, "", "日本 <i>x</i> &amp;", "choice1: no"), None, 0),
    ],
)
def test_multiple_choice_lists_options_and_names_answer(row, listed, answer):
    listed = listed or "choice1:  choice2: 日本 <i>x</i> &amp; choice3: choice1: no"
    inputs = f"arc_easy question: Which? {listed}"
    assert asked("arc_easy", row) == {"inputs": inputs, "targets": f"choice{answer + 1}"}
    assert asked("arc_easy", row, digits=True) == {"inputs": inputs, "targets": str(answer)}


def test_multiple_choice_keeps_long_options():
    text = "word " * 20_000
    made = asked("arc_easy", arc(1, "x", text))
    assert made["inputs"] == f"arc_easy question: Which? choice1: x choice2: {text}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arc(-1, "air", "iron"), "answer is none of its options"),
        (arc(3, "air", "iron"), "answer is none of its options"),
        (arc(0, *"abcdef"), "more options than the task has labels"),
    ],
)
def test_multiple_choice_no_answer_or_too_many_options_raises(row, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"arc_easy.*{message}"):
        asked("arc_easy", row)


def test_commonsenseqa_answer_found_by_text():
    row = {"question": "Q?", "choices": strings("a", "b", "b", "c", "é"), "answer": "b"}
    inputs = "commonsenseqa question: Q? choice1: a choice2: b choice3: b choice4: c choice5: é"
    assert asked("commonsenseqa", row) == {"inputs": inputs, "targets": "choice2"}
    with pytest.raises(tf.errors.InvalidArgumentError, match="none of its options"):
        asked("commonsenseqa", {**row, "answer": ""})


def test_openbookqa_and_agnews_text():
    options = {f"choice_{letter}": text for letter, text in zip("ABCD", "wxyz", strict=True)}
    row = {"question": {"stem": "The sun", **options}, "answerKey": np.int64(3)}
    inputs = "openbookqa question: The sun choice1: w choice2: x choice3: y choice4: z"
    assert asked("openbookqa", row) == {"inputs": inputs, "targets": "choice4"}
    row = {"title": "", "description": "IBM&#39;s <b>\\$5</b> bid", "label": np.int64(3)}
    inputs = "agnews title:  description: IBM&#39;s <b>\\$5</b> bid"
    assert asked("agnews", row) == {"inputs": inputs, "targets": "Sci/Tech"}


# --- Generation --------------------------------------------------------------------------------

NLG = {row.name: row.template(row.name) for row in nlg.ROWS}


def meaning(text: str, target: str = "x", references: Any = None) -> dict[str, Any]:
    given = strings() if references is None else references
    return {"meaning_representation": text, "target": target, "references": given}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name[The Vaults], eatType[pub]", "name: The Vaults eatType: pub"),
        (
            "name[Zoë & Sons, Ltd], customer rating[5 out of 5], priceRange[£20-25]",
            "name: Zoë & Sons, Ltd customer rating: 5 out of 5 priceRange: £20-25",
        ),
        ("name[], near[日本]", "name:  near: 日本"),
        ("no slots", "no slots"),
        ("", ""),
    ],
)
def test_e2e_slots_and_values_text(text, expected):
    (made,) = applied(NLG["e2e"], meaning(text))
    assert made == {"inputs": f"e2e {expected}", "targets": "x", "references": []}


def test_webnlg_triples_joined():
    row = {
        "input": strings("Zoë_A. | birth_place | City", 'City | population | "1,000"'),
        "target": "Zoë_A is.",
        "references": strings("Zoë_A is.", "<b>b</b>"),
    }
    inputs = 'webnlg Zoë A. | birth place | City && City | population | "1,000"'
    assert applied(NLG["webnlg"], row) == [
        {"inputs": inputs, "targets": "Zoë_A is.", "references": ["Zoë_A is.", "<b>b</b>"]}
    ]


@pytest.mark.parametrize("target", ["", " \n"])
def test_described_row_without_target_dropped(target):
    assert applied(NLG["e2e"], meaning("name[A]", target)) == []

"""Raw rows into text: `inputs` that start with the task's name, and `targets`.

    mnli premise: A man sleeps. hypothesis: Somebody rests.        ->  entailment

Each maker returns a SeqIO preprocessor for a task's prefix. Templates are those of T5 and ATTEMPT;
docs/tasks.md lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

Row = Mapping[str, Any]
Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]
Text = Callable[[tf.Tensor], tf.Tensor]


def as_it_is(text: tf.Tensor) -> tf.Tensor:
    """The text itself."""
    return text


def without_markup(text: tf.Tensor) -> tf.Tensor:
    """MultiRC's <br> becomes a space, and its <b> and </b> nothing; other angle brackets stay."""
    return tf.strings.regex_replace(tf.strings.regex_replace(text, r"<br\s*/?>", " "), "</?b>", "")


def spaced(text: tf.Tensor) -> tf.Tensor:
    """Spaces around whatever is no letter, accent, digit or underscore; one space at a time."""
    apart = tf.strings.regex_replace(text, r"([^_\s\p{N}\p{L}\p{M}])", r" \1 ")
    return tf.strings.strip(tf.strings.regex_replace(apart, r"\s+", " "))


def labelled(
    fields: Mapping[str, str], labels: Sequence[str], clean: Text = as_it_is
) -> Callable[[str], Preprocessor]:
    """Templates of classification.

    Args:
        fields: {marker in the text: feature}, in order.
        labels: what each label number is called. Another number is an error where it is read.
        clean: applied to every text.
    """

    def target(prefix: str, row: Row) -> tf.Tensor:
        label, last = row["label"], len(labels) - 1
        known = (label >= 0) & (label <= last)
        with _only_if(known, prefix, "label", label, f"0 .. {last} ({', '.join(labels)})"):
            return tf.gather(tf.constant(list(labels)), label)

    return lambda prefix: _mapped(
        lambda row: {"inputs": _fields(prefix, fields, row, clean), "targets": target(prefix, row)}
    )


def similarity(fields: Mapping[str, str]) -> Callable[[str], Preprocessor]:
    """Templates of STS-B: the target is the score rounded to the nearest fifth, as '3.8'."""

    def target(prefix: str, row: Row) -> tf.Tensor:
        score = row["label"]
        # ATTEMPT's own rounding yields tenths; T5's, and the papers' description, is to fifths.
        with _only_if((score >= 0) & (score <= 5), prefix, "score", score, "0 .. 5"):
            return tf.strings.as_string(tf.round(score * 5) / 5, precision=1)

    return lambda prefix: _mapped(
        lambda row: {
            "inputs": _fields(prefix, fields, row, as_it_is),
            "targets": target(prefix, row),
        }
    )


def coreference(labels: Sequence[str]) -> Callable[[str], Preprocessor]:
    """Templates of WSC: the text with `* span 1 *` and `# span 2 #`, found by word number."""

    def marked(row: Row) -> dict[str, tf.Tensor]:
        first, second = row["span1_index"], row["span2_index"]
        text = _mark(row["text"], row["span1_text"], first, "*")
        # Both marks of the first span are words before the second, if it stands before it.
        second += 2 * tf.cast(first < second, second.dtype)
        return {"text": _mark(text, row["span2_text"], second, "#"), "label": row["label"]}

    def preprocess(prefix: str) -> Preprocessor:
        classify = labelled({"text": "text"}, labels)(prefix)
        return lambda dataset: classify(_mapped(marked)(dataset))

    return preprocess


def _mark(text: tf.Tensor, span: tf.Tensor, place: tf.Tensor, mark: str) -> tf.Tensor:
    """Puts marks around the span that starts at word `place`; elsewhere the text is unchanged."""
    literal = tf.strings.regex_replace(span, r"([\\^$.|?*+()\[\]{}])", r"\\\1")
    before = tf.strings.join([r"^((?:\S+\s){", tf.strings.as_string(place), "})"])
    pattern = tf.strings.join([before, "(", literal, ")"])
    return tf.strings.regex_replace(text, pattern, rf"\1{mark} \2 {mark}", replace_global=False)


def multiple_choice(
    asked: Callable[[Row], tf.Tensor],
    options: Callable[[Row], tf.Tensor],
    is_right: Callable[[Row], tf.Tensor],
    labels: Sequence[str],
) -> Callable[[str], Preprocessor]:
    """Templates of multiple choice: a question, its options as `choice1: ... choice2: ...`.

    Args:
        asked: row -> the question.
        options: row -> the texts to choose from, [n]; at most one for each label.
        is_right: row -> which of them is the answer, bool [n]. Of several the first one counts; a
            row without any is an error.
        labels: what to call the first, second, ... option in a target.
    """

    def text(prefix: str, row: Row) -> dict[str, tf.Tensor]:
        texts, right = options(row), tf.where(is_right(row))
        checks = [
            tf.debugging.assert_less_equal(
                tf.size(texts), len(labels), f"{prefix}: more options than the task has labels."
            ),
            tf.debugging.assert_positive(
                tf.size(right), f"{prefix}: a row whose answer is none of its options."
            ),
        ]
        with tf.control_dependencies(checks):
            count, place = tf.size(texts), tf.identity(right)[0, 0]
            markers = tf.constant([f"choice{n}:" for n in range(1, len(labels) + 1)])[:count]
            listed = tf.reshape(tf.stack([markers, texts], axis=1), [-1])
        parts = [
            f"{prefix} question:",
            asked(row),
            tf.strings.reduce_join(listed, separator=" "),
        ]
        return {
            "inputs": tf.strings.join(parts, " "),
            "targets": tf.constant(list(labels))[place],
        }

    return lambda prefix: _mapped(lambda row: text(prefix, row))


def question(answers: Callable[[Row], tf.Tensor]) -> Callable[[str], Preprocessor]:
    """Templates of SQuAD and MRQA: punctuation spaced, the first answer as target.

    Args:
        answers: row -> its gold answers, [n] strings. A row without any is left out.
    """

    def with_answers(row: Row) -> dict[str, tf.Tensor]:
        fields = {"question": "question", "context": "context"}
        return {"answers": spaced(answers(row)), **{name: row[name] for name in fields}}

    def preprocess(prefix: str) -> Preprocessor:
        def text(row: Row) -> dict[str, tf.Tensor]:
            fields = {"question": "question", "context": "context"}
            return {
                "inputs": _fields(prefix, fields, row, spaced),
                "targets": row["answers"][0],
                "answers": row["answers"],
                "group": tf.constant(""),
            }

        return lambda dataset: _mapped(text)(_answered(_mapped(with_answers)(dataset)))

    return preprocess


def cloze(prefix: str) -> Preprocessor:
    """Template of ReCoRD: a query, its candidate entities and the passage; one row per gold answer.

    All rows of a query carry all its answers and one `group`, so that evaluation counts it once.
    """

    def rows_of(row: Row) -> tf.data.Dataset:
        passage = tf.strings.regex_replace(row["passage"], r"([.?!\"'])\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        candidates = tf.strings.reduce_join(row["entities"], separator=", ")
        parts = [f"{prefix} query:", row["query"], "entities:", candidates, "passage:", passage]
        inputs = tf.strings.join(parts, " ")
        place = [tf.strings.as_string(row["idx"][name]) for name in ("passage", "query")]
        group = tf.strings.join(place, "/")
        targets = tf.data.Dataset.from_tensor_slices({"targets": row["answers"]})
        shared = {"inputs": inputs, "answers": row["answers"], "group": group}
        return targets.map(tf.autograph.experimental.do_not_convert(lambda x: {**x, **shared}))

    return lambda dataset: dataset.flat_map(tf.autograph.experimental.do_not_convert(rows_of))


def without_prefix(prefix: str) -> Preprocessor:
    """Takes the prefix, and the space after it, from the inputs of a template's rows."""
    start = f"^{re.escape(prefix)} "
    return _mapped(
        lambda row: {**row, "inputs": tf.strings.regex_replace(row["inputs"], start, "")}
    )


def _answered(dataset: tf.data.Dataset) -> tf.data.Dataset:
    has_one = tf.autograph.experimental.do_not_convert(lambda row: tf.size(row["answers"]) > 0)
    return dataset.filter(has_one)


def _only_if(known: tf.Tensor, prefix: str, what: str, value: tf.Tensor, range_: str) -> Any:
    """Inside, ops run only if `known`; else reading fails with a sentence on the gold `value`."""
    message = [f"{prefix}: a row has the {what} ", tf.strings.as_string(value)]
    message.append(f", which is not in {range_}. TFDS writes -1 where the gold is not public.")
    return tf.control_dependencies([tf.debugging.Assert(known, [tf.strings.join(message)])])


def _fields(prefix: str, fields: Mapping[str, str], row: Row, clean: Text) -> tf.Tensor:
    parts: list[Any] = [prefix]
    for marker, feature in fields.items():
        parts += [f"{marker}:", clean(row[feature])]
    return tf.strings.join(parts, separator=" ")


def _mapped(function: Callable[[Row], Mapping[str, Any]]) -> Preprocessor:
    wrapped = tf.autograph.experimental.do_not_convert(lambda row: dict(function(row)))
    return lambda dataset: dataset.map(wrapped, num_parallel_calls=tf.data.AUTOTUNE)

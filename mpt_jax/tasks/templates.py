"""Text templates that turn raw rows into `targets` and `inputs`, which start with the task's name.

    mnli premise: A man sleeps. hypothesis: Somebody rests.        ->  entailment

A template is a function from a prefix, such as the task's name, to a SeqIO preprocessor. The
templates follow T5 and ATTEMPT; docs/tasks.md lists them.
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
    """Returns the text unchanged."""
    return text


def without_markup(text: tf.Tensor) -> tf.Tensor:
    """Replaces MultiRC's <br> with a space and removes <b> and </b>. Other markup is kept."""
    return tf.strings.regex_replace(tf.strings.regex_replace(text, r"<br\s*/?>", " "), "</?b>", "")


def spaced(text: tf.Tensor) -> tf.Tensor:
    """Separates punctuation (all characters except letters, accents, digits and underscores) with
    single spaces."""
    padded = tf.strings.regex_replace(text, r"([^_\s\p{N}\p{L}\p{M}])", r" \1 ")
    return tf.strings.strip(tf.strings.regex_replace(padded, r"\s+", " "))


def labelled(
    fields: Mapping[str, str], labels: Sequence[str], clean: Text = as_it_is
) -> Callable[[str], Preprocessor]:
    """Returns a template for classification.

    Args:
        fields: Marker in the inputs -> feature of the row, in order.
        labels: The name of each label number. Reading a row with another number is an error.
        clean: The function to apply to every text.
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
    """Returns the template of STS-B. The target is the score rounded to fifths, such as '3.8'."""

    def target(prefix: str, row: Row) -> tf.Tensor:
        score = row["label"]
        # ATTEMPT's code rounds to tenths; T5, and the papers' description, to fifths.
        with _only_if((score >= 0) & (score <= 5), prefix, "score", score, "0 .. 5"):
            return tf.strings.as_string(tf.round(score * 5) / 5, precision=1)

    return lambda prefix: _mapped(
        lambda row: {
            "inputs": _fields(prefix, fields, row, as_it_is),
            "targets": target(prefix, row),
        }
    )


def coreference(labels: Sequence[str]) -> Callable[[str], Preprocessor]:
    """Returns the template of WSC, in which the spans are marked: `* span 1 *` and `# span 2 #`."""

    def marked(row: Row) -> dict[str, tf.Tensor]:
        first, second = row["span1_index"], row["span2_index"]
        text = _mark(row["text"], row["span1_text"], first, "*")
        # If the first span comes first, its two marks shift the second span by two words.
        second += 2 * tf.cast(first < second, second.dtype)
        return {"text": _mark(text, row["span2_text"], second, "#"), "label": row["label"]}

    def preprocess(prefix: str) -> Preprocessor:
        classify = labelled({"text": "text"}, labels)(prefix)
        return lambda dataset: classify(_mapped(marked)(dataset))

    return preprocess


def _mark(text: tf.Tensor, span: tf.Tensor, word: tf.Tensor, mark: str) -> tf.Tensor:
    """Puts marks around the span that starts at word number `word`. Keeps the rest of the text."""
    literal = tf.strings.regex_replace(span, r"([\\^$.|?*+()\[\]{}])", r"\\\1")
    before = tf.strings.join([r"^((?:\S+\s){", tf.strings.as_string(word), "})"])
    pattern = tf.strings.join([before, "(", literal, ")"])
    return tf.strings.regex_replace(text, pattern, rf"\1{mark} \2 {mark}", replace_global=False)


def multiple_choice(
    asked: Callable[[Row], tf.Tensor],
    options: Callable[[Row], tf.Tensor],
    is_right: Callable[[Row], tf.Tensor],
    labels: Sequence[str],
) -> Callable[[str], Preprocessor]:
    """Returns a template for multiple choice: a question, then `choice1: ... choice2: ...`.

    Args:
        asked: Function from a row to the question.
        options: Function from a row to the options [n], at most as many as labels.
        is_right: Function from a row to whether each option is right, bool [n]. The first right
            option is the answer. Reading a row without a right option is an error.
        labels: The targets for the first, second, ... option.
    """

    def text(prefix: str, row: Row) -> dict[str, tf.Tensor]:
        texts, right = options(row), tf.where(is_right(row))
        checks = [
            tf.debugging.assert_less_equal(
                tf.size(texts),
                len(labels),
                f"{prefix}: a row has more options than the task has labels ({len(labels)}). "
                "Correct the row.",
            ),
            tf.debugging.assert_positive(
                tf.size(right),
                f"{prefix}: a row's answer is none of its options. Correct the row, or use another "
                "split if the answers of this split are not public.",
            ),
        ]
        with tf.control_dependencies(checks):
            count, answer = tf.size(texts), tf.identity(right)[0, 0]
            markers = tf.constant([f"choice{n}:" for n in range(1, len(labels) + 1)])[:count]
            listed = tf.reshape(tf.stack([markers, texts], axis=1), [-1])
        parts = [
            f"{prefix} question:",
            asked(row),
            tf.strings.reduce_join(listed, separator=" "),
        ]
        return {
            "inputs": tf.strings.join(parts, " "),
            "targets": tf.constant(list(labels))[answer],
        }

    return lambda prefix: _mapped(lambda row: text(prefix, row))


def question(answers: Callable[[Row], tf.Tensor]) -> Callable[[str], Preprocessor]:
    """Returns the template of SQuAD and MRQA. It puts spaces around punctuation, and uses the first
    answer as the target.

    Args:
        answers: Function from a row to its gold answers [n]. Rows without answers are dropped.
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
    """Returns ReCoRD's preprocessor. Inputs are a query, its candidate entities and the passage.

    A query yields one row per gold answer. All of these rows have the same list of answers and the
    same `group`, so that evaluation counts the query once.
    """

    def rows_of(row: Row) -> tf.data.Dataset:
        passage = tf.strings.regex_replace(row["passage"], r"([.?!\"'])\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        candidates = tf.strings.reduce_join(row["entities"], separator=", ")
        parts = [f"{prefix} query:", row["query"], "entities:", candidates, "passage:", passage]
        inputs = tf.strings.join(parts, " ")
        index = [tf.strings.as_string(row["idx"][name]) for name in ("passage", "query")]
        group = tf.strings.join(index, "/")
        targets = tf.data.Dataset.from_tensor_slices({"targets": row["answers"]})
        shared = {"inputs": inputs, "answers": row["answers"], "group": group}
        return targets.map(tf.autograph.experimental.do_not_convert(lambda x: {**x, **shared}))

    return lambda dataset: dataset.flat_map(tf.autograph.experimental.do_not_convert(rows_of))


def without_prefix(prefix: str) -> Preprocessor:
    """Returns a preprocessor that removes the prefix and the space after it from the inputs."""
    start = f"^{re.escape(prefix)} "
    return _mapped(
        lambda row: {**row, "inputs": tf.strings.regex_replace(row["inputs"], start, "")}
    )


def _answered(dataset: tf.data.Dataset) -> tf.data.Dataset:
    has_one = tf.autograph.experimental.do_not_convert(lambda row: tf.size(row["answers"]) > 0)
    return dataset.filter(has_one)


def _only_if(known: tf.Tensor, prefix: str, what: str, value: tf.Tensor, range_: str) -> Any:
    """Returns a context whose ops run only if `known`. Otherwise, an error shows the `value`."""
    message = [f"{prefix}: a row has the {what} ", tf.strings.as_string(value)]
    message.append(f", which is not in {range_}. Correct the {what}, or use another split: ")
    message.append(f"TFDS writes -1 if the gold {what} is not public.")
    return tf.control_dependencies([tf.debugging.Assert(known, [tf.strings.join(message)])])


def _fields(prefix: str, fields: Mapping[str, str], row: Row, clean: Text) -> tf.Tensor:
    parts: list[Any] = [prefix]
    for marker, feature in fields.items():
        parts += [f"{marker}:", clean(row[feature])]
    return tf.strings.join(parts, separator=" ")


def _mapped(function: Callable[[Row], Mapping[str, Any]]) -> Preprocessor:
    wrapped = tf.autograph.experimental.do_not_convert(lambda row: dict(function(row)))
    return lambda dataset: dataset.map(wrapped, num_parallel_calls=tf.data.AUTOTUNE)

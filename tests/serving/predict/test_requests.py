"""Lines of requests: token ids of valid lines, and errors for invalid ones."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mpt_jax.batching import tokenizers
from mpt_jax.runtime.paths import SHIPPED
from mpt_jax.serving.predict.requests import Failure, Reader, Request
from tests.fixtures import serving_fixtures

GOOD = {"task": "beta", "inputs": "ab"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return serving_fixtures.server(tmp_path_factory.mktemp("served") / "artifact")


def read(server, line, mode="predict", truncate=False):
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    return server.reader(mode, truncate).read(line, 7)


def test_reader_valid_line_returns_token_ids(server):
    assert read(server, GOOD) == Request({"line": 7}, 1, [100, 101, 1])
    scored = read(server, {**GOOD, "targets": "c", "id": None}, "score")
    assert scored == Request({"line": 7, "id": None}, 1, [100, 101, 1], ([102, 1],))
    chosen = read(server, {**GOOD, "choices": ["c", "d"]})
    assert chosen.targets == ([102, 1], [103, 1]) and chosen.choices == ("c", "d")
    # A line of a data set, with targets, can be sent for generation unchanged.
    assert read(server, {**GOOD, "targets": "c"}).targets == ()


def test_reader_long_text_fails_or_is_truncated(server):
    limit = serving_fixtures.LIMITS.input_length
    fits = read(server, {**GOOD, "inputs": "x" * (limit - 1)})
    assert len(fits.inputs) == limit and not fits.truncated
    longer = {**GOOD, "inputs": "x" * limit}
    assert f"inputs has {limit + 1} tokens" in read(server, longer).error
    cut = read(server, longer, truncate=True)
    assert cut.inputs == fits.inputs and cut.truncated
    long_choice = {**GOOD, "choices": ["x" * 40, "y"]}
    assert "choices has 41 tokens" in read(server, long_choice).error
    assert read(server, long_choice, truncate=True).truncated


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "the line is empty"),
        (b"  \n", "the line is empty"),
        (b"nope", "cannot be read as a JSON object"),
        (b"\xff\xfe{", "cannot be read as a JSON object"),
        (b"[" * 100_000, "cannot be read as a JSON object"),
        (b"[1]", r"cannot be read as a JSON object \(got \[1\]\)"),
        (b'{"task": "a", "task": "b"}', r"JSON object \(it repeats the field task\)"),
        (b'{"task": "beta", "inputs": NaN}', "NaN is not JSON"),
        (b'{"task": "beta", "inputs": "ab", "id": 1e999}', "1e999 is too large for a float"),
        (b'{"task": "beta", "inputs": "ab", "id": [{"a": -2E+400}]}', "-2E.400 is too large"),
        ({"inputs": "ab"}, "field task is missing"),
        ({"task": "beta"}, "field inputs is missing"),
        ({"task": "betta", "inputs": "ab"}, "'betta'. Did you mean 'beta'"),
        ({"task": ["beta"], "inputs": "ab"}, r'task must be a non-empty string.*\["beta"\]'),
        ({"task": "beta", "inputs": " "}, 'inputs must be a non-empty string, got " "'),
        ({"task": "beta", "inputs": ""}, 'inputs must be a non-empty string, got ""'),
        ({"task": "beta", "inputs": 3}, "inputs must be a non-empty string, got 3"),
        ({**GOOD, "choice": ["a"]}, "Unknown fields.*choice.*Known fields: task, inputs, id"),
        ({**GOOD, "choices": []}, "choices must be a list"),
        ({**GOOD, "choices": "ab"}, "choices must be a list"),
        ({**GOOD, "choices": ["a", ""]}, "choices must be a list"),
        ({**GOOD, "choices": ["a", "a"]}, "different, non-empty strings"),
        ({**GOOD, "inputs": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_reader_invalid_line_returns_failure(line, message, server):
    failure = read(server, line)
    assert isinstance(failure, Failure)
    assert failure.label["line"] == 7
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failure.error)
    assert len(failure.error) < 400


@pytest.mark.parametrize("field", ["id", "task", "inputs", "choices", "other"])
@pytest.mark.parametrize("deep", [50, *range(99, 103), *range(200, 1000, 100), 5000, 200_000])
def test_reader_deeply_nested_line_can_be_answered(deep, field, server):
    """The parser fails at its own depth limit, which may differ from the serializer's."""
    nested = b"[" * deep + b"]" * deep
    line = b'{"task": "beta", "inputs": "ab", "%s": %s}' % (field.encode(), nested)
    found = read(server, line)
    assert isinstance(found, Failure) == (deep >= 100 or field != "id")
    assert json.loads(json.dumps(found.label))["line"] == 7


@pytest.mark.parametrize("field", ["inputs", "targets"])
def test_reader_half_a_character_fails_with_sentencepiece(field, server):
    reader = dataclasses.replace(
        server.reader("score"), vocabulary=tokenizers.load(str(SHIPPED / "toy.model"), 16)
    )
    line = json.dumps({**GOOD, "targets": "a", field: "\ud800 a"}).encode()
    assert (
        f"{field} is not valid text: it has half of a surrogate pair" in reader.read(line, 7).error
    )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            ["0", "1"],
            r"The choices '0' and '1' have the same tokens \('▁', '<unk>'\), so",
        ),
        (["good", "👍"], "The choice '👍' has characters that the vocabulary lacks.*'<unk>'"),
    ],
)
def test_reader_choices_that_look_alike_or_unknown_fail(choices, message, server):
    toy = tokenizers.load(str(SHIPPED / "toy.model"), 16)
    reader = dataclasses.replace(server.reader(), vocabulary=toy)
    read_choices = lambda texts: reader.read(json.dumps({**GOOD, "choices": texts}).encode(), 7)  # noqa: E731
    assert re.match(message, read_choices(choices).error)
    assert read_choices(["good", "bad"]).choices == ("good", "bad")


def test_reader_choices_equal_after_truncation_fail(server):
    line = {**GOOD, "choices": ["x" * 40, "x" * 41]}
    assert "have the same tokens" in read(server, line, truncate=True).error


def test_reader_failure_keeps_id(server):
    assert read(server, {"id": 3, "task": "beta"}).label == {"line": 7, "id": 3}


def test_reader_score_without_targets_fails(server):
    assert "needs targets or choices" in read(server, GOOD, "score").error
    assert (
        "targets must be a non-empty string" in read(server, {**GOOD, "targets": ""}, "score").error
    )


def test_reader_unknown_mode_fails(server):
    with pytest.raises(ValueError, match="'guess'"):
        Reader(server.bank, serving_fixtures.VOCABULARY, "guess", 9, 9)

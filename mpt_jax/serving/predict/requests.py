"""Parser of requests: lines of JSON that become token ids or an error.

    {"task": NAME, "inputs": TEXT}                            a generation
    {"task": NAME, "inputs": TEXT, "choices": [TEXT, ...]}    the most probable choice
    {"task": NAME, "inputs": TEXT, "targets": TEXT}           the target's score, in mode 'score'

Any request may have an "id" of any JSON type. The answer repeats it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from mpt_jax.batching.spelling import check_told_apart
from mpt_jax.batching.tokenizers import Tokenizer
from mpt_jax.core import schema
from mpt_jax.serving.prompt_bank import Bank

MODES = ("predict", "score")
FIELDS = ("task", "inputs", "id", "targets", "choices")
MOST_BYTES = 2**24  # of a line; no text or list of choices is near this size


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that can be answered.

    Attributes:
        label: the first fields of the answer: 'line', the number of the line, counted from 1, and
            'id' if the request has one.
        row: the bank row of the task.
        inputs: the token ids of the input, including the end-of-sequence id.
        targets: the token ids of each text to score; empty for a generation.
        choices: the texts to choose from; empty if the request has no choices.
        truncated: whether an input, target or choice was truncated.
    """

    label: Mapping[str, Any]
    row: int
    inputs: list[int]
    targets: tuple[list[int], ...] = ()
    choices: tuple[str, ...] = ()
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that cannot be answered.

    Attributes:
        label: the first fields of the answer, as in `Request`.
        error: the error message.
    """

    label: Mapping[str, Any]
    error: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """Parser of requests.

    Attributes:
        bank: the bank with the tasks.
        vocabulary: the vocabulary of inputs and targets.
        mode: `'predict'` or `'score'`.
        input_length: the maximum number of tokens of an input, including the end-of-sequence id.
        target_length: the maximum number of tokens of a target or choice, including the
            end-of-sequence id.
        truncate: whether to truncate longer texts. If False, they are errors.
    """

    bank: Bank
    vocabulary: Tokenizer
    mode: str
    input_length: int
    target_length: int
    truncate: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"Unknown mode {self.mode!r}. Set it to {' or '.join(MODES)}.")

    def read(self, line: bytes, number: int) -> Request | Failure:
        """Parses line `number`, counted from 1. Returns a `Failure` if the line is invalid."""
        fields = object_of(line, number)
        if isinstance(fields, Failure):
            return fields
        label = label_of(fields, number)
        try:
            return self._request(fields, label)
        except ValueError as error:
            return Failure(label, str(error))

    def _request(self, fields: Mapping[str, Any], label: Mapping[str, Any]) -> Request:
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise ValueError(
                f"Unknown fields {schema.short(unknown)}. Known fields: {', '.join(FIELDS)}. "
                "Use id for a value that the answer should repeat."
            )
        row = self.bank.row(text_of(fields, "task"))
        inputs, cut = self._ids(text_of(fields, "inputs"), "inputs", self.input_length)
        if "choices" in fields:
            choices = _choices(fields)
            pairs = [self._ids(text, "choices", self.target_length) for text in choices]
            targets = tuple(ids for ids, _ in pairs)
            texts = [ids[:-1] for ids in targets]  # without the end-of-sequence id
            check_told_apart(tuple(map(schema.short, choices)), texts, self.vocabulary, "choice")
            return Request(label, row, inputs, targets, choices, cut or any(c for _, c in pairs))
        if self.mode == "predict":
            return Request(label, row, inputs, truncated=cut)
        if "targets" not in fields:
            raise ValueError(
                "A score needs targets or choices, and the request has neither. Add one of them, "
                "or use --mode predict."
            )
        target, target_cut = self._ids(text_of(fields, "targets"), "targets", self.target_length)
        return Request(label, row, inputs, (target,), truncated=cut or target_cut)

    def _ids(self, text: str, field: str, limit: int) -> tuple[list[int], bool]:
        """Returns token ids with the end-of-sequence id, and whether they were truncated."""
        try:
            text.encode()  # SentencePiece raises another error
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{field} is not valid text: it has half of a surrogate pair ({error.reason}). "
                "Remove it, or write the whole character."
            ) from error
        ids = self.vocabulary.encode(text)
        cut = len(ids) + 1 > limit
        if cut and not self.truncate:
            subject = "An entry of choices" if field == "choices" else field
            option = "--input-length" if field == "inputs" else "--target-length"
            raise ValueError(
                f"{subject} has {len(ids) + 1} tokens, including the end of sequence, but the "
                f"limit is {limit}. Shorten it, raise {option}, or truncate longer texts with "
                "--truncate."
            )
        return [*ids[: limit - 1], self.vocabulary.eos_id], cut


def object_of(line: bytes, number: int, most_bytes: int = MOST_BYTES) -> dict[str, Any] | Failure:
    """Returns the JSON object of line `number`, or a `Failure` if there is none or the line is
    longer than `most_bytes`."""
    try:
        return _object(line, most_bytes)
    except (ValueError, RecursionError) as error:
        reason = schema.short(str(error))
        return Failure({"line": number}, f"The line cannot be read as a JSON object ({reason}).")


def label_of(fields: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the first fields of the answer to line `number`."""
    return {"line": number} | ({"id": fields["id"]} if "id" in fields else {})


def _object(line: bytes, most_bytes: int) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("the line is empty")
    if len(line) > most_bytes:
        raise ValueError(f"it has {len(line):,} bytes; at most {most_bytes:,} are read")
    value = json.loads(
        line,
        parse_constant=_reject_constant,
        parse_float=_finite,
        object_pairs_hook=_unique_fields,
    )
    schema.check_depth(value)
    if not isinstance(value, dict):
        raise ValueError(f"got {schema.short(value)}")
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (repeated := schema.repeated_field(pairs)) is not None:
        raise ValueError(f"it repeats the field {schema.short(repeated)}")
    return dict(pairs)


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    """Parses a number. Raises ValueError for numbers such as 1e999, which Python reads as infinity,
    because an answer in JSON could not repeat it."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{schema.short(number)} is too large for a float")
    return value


def text_of(fields: Mapping[str, Any], field: str) -> str:
    """Returns a field that must be a non-empty string. Raises ValueError if it is not."""
    if field not in fields:
        raise ValueError(f"The field {field} is missing. Add it to the request.")
    value = fields[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must be a non-empty string, got {schema.short(value)}.")
    return value


def _choices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields["choices"]
    texts = value if isinstance(value, list) else []
    whole = texts and all(isinstance(text, str) and text.strip() for text in texts)
    if not whole or len(set(texts)) < len(texts):
        raise ValueError(
            f"choices must be a list of different, non-empty strings, got {schema.short(value)}."
        )
    return tuple(texts)

"""Lines of JSON into token ids, or into what is wrong with them.

    {"task": NAME, "inputs": TEXT}                            a generation
    {"task": NAME, "inputs": TEXT, "choices": [TEXT, ...]}    the most probable of them
    {"task": NAME, "inputs": TEXT, "targets": TEXT}           its score, in mode 'score'

Any of them may have an "id", which may be anything and comes back with the answer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from mpt_jax.batching.tokenizers import Tokenizer
from mpt_jax.serving.prompt_bank import Bank

MODES = ("predict", "score")
FIELDS = ("task", "inputs", "id", "targets", "choices")
MOST_SHOWN = 80  # characters of what is wrong
DEEPEST = 100  # objects in objects; far more than that and Python could not write them out again


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that can be answered.

    Attributes:
        label: {'line': its number from 1 on}, and 'id' where it has one; begins the answer.
        row: of the bank.
        inputs: token ids, end-of-sequence id included.
        targets: token ids of each text to be scored; none for a generation.
        choices: the texts, where the answer is one of them.
        truncated: whether a text was cut.
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
        label: as in `Request`.
        error: what is wrong with it.
    """

    label: Mapping[str, Any]
    error: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """What lines are read by.

    Attributes:
        bank: knows the tasks.
        vocabulary: of inputs and targets.
        mode: `'predict'` or `'score'`.
        input_length: tokens of an input at most, the end-of-sequence id included.
        target_length: the same of a target.
        truncate: cuts longer texts, in place of an error.
    """

    bank: Bank
    vocabulary: Tokenizer
    mode: str
    input_length: int
    target_length: int
    truncate: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"The mode must be one of {MODES}, got {self.mode!r}.")

    def read(self, line: bytes, number: int) -> Request | Failure:
        """The request of line `number`, counted from 1; never raises for what is in it."""
        label: dict[str, Any] = {"line": number}
        try:
            found = _object(line)
        except (ValueError, RecursionError) as error:
            return Failure(label, f"This is no JSON object ({_short(str(error))}).")
        label |= {"id": found["id"]} if "id" in found else {}
        try:
            return self._request(found, label)
        except ValueError as error:
            return Failure(label, str(error))

    def _request(self, found: Mapping[str, Any], label: Mapping[str, Any]) -> Request:
        if unknown := sorted(set(found) - set(FIELDS)):
            raise ValueError(
                f"Unknown fields {_short(unknown)}; known are {', '.join(FIELDS)}. What is to come "
                "back with the answer goes into id."
            )
        row = self.bank.row(_text(found, "task"))
        inputs, cut = self._ids(_text(found, "inputs"), "inputs", self.input_length)
        if "choices" in found:
            choices = _choices(found)
            pairs = [self._ids(text, "choices", self.target_length) for text in choices]
            targets = tuple(ids for ids, _ in pairs)
            return Request(label, row, inputs, targets, choices, cut or any(c for _, c in pairs))
        if self.mode == "predict":
            return Request(label, row, inputs, truncated=cut)
        if "targets" not in found:
            raise ValueError("A score needs targets, or choices; there are neither.")
        target, also = self._ids(_text(found, "targets"), "targets", self.target_length)
        return Request(label, row, inputs, (target,), truncated=cut or also)

    def _ids(self, text: str, field: str, limit: int) -> tuple[list[int], bool]:
        """Token ids with their end of sequence, and whether they were cut to the limit."""
        try:
            text.encode()  # SentencePiece itself raises something else
        except UnicodeEncodeError as error:
            raise ValueError(f"{field} is no text: half a character ({error.reason}).") from error
        ids = self.vocabulary.encode(text)
        cut = len(ids) + 1 > limit
        if cut and not self.truncate:
            raise ValueError(
                f"{field} has {len(ids) + 1} tokens, end of sequence included, and the limit is "
                f"{limit}. Raise it, or let longer texts be cut (--truncate)."
            )
        return [*ids[: limit - 1], self.vocabulary.eos_id], cut


def _object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("the line is empty")
    found = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    _check_depth(found)
    if not isinstance(found, dict):
        raise ValueError(f"found {_short(found)}")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    """A number that can be written out again: 1e999 is JSON, and what Python reads it as is not."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{_short(number)} is larger than a number can be")
    return value


def _check_depth(value: Any) -> None:
    """Level by level, since what is to be refused may be too deep for a function of itself."""
    level = [value]
    for _ in range(DEEPEST):
        within = [list(x.values()) if isinstance(x, dict) else x for x in level]
        level = [child for x in within if isinstance(x, list) for child in x]
        if not level:
            return
    raise ValueError(f"lists and objects in it lie more than {DEEPEST} deep in each other")


def _text(found: Mapping[str, Any], field: str) -> str:
    if field not in found:
        raise ValueError(f"The field {field} is missing.")
    value = found[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must be a text that is not empty, got {_short(value)}.")
    return value


def _choices(found: Mapping[str, Any]) -> tuple[str, ...]:
    value = found["choices"]
    texts = value if isinstance(value, list) else []
    whole = texts and all(isinstance(text, str) and text.strip() for text in texts)
    if not whole or len(set(texts)) < len(texts):
        raise ValueError(
            f"choices must be a list of different texts, none of them empty, got {_short(value)}."
        )
    return tuple(texts)


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 3]}..."

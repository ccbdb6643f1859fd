"""Reader that makes examples from the rows of a file with two templates.

`read` fills two templates with the fields of every row of a file (`file_formats`). It never skips a
row: if some rows cannot be used, it raises an error with their numbers and the reasons. The text of
a field depends on its type:

    str                     unchanged
    number in JSON          as written: 1.50 stays '1.50'; in Parquet, Python's str()
    true, false             'true', 'false'
    null, NaN               an error: missing; the same for Infinity in JSON
    list, object, others    an error that names the type
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import string
from collections.abc import Mapping
from typing import Any

from etils import epath

from mpt_jax.tasks import file_formats
from mpt_jax.tasks.file_formats import PARQUET, Row, Unusable

SHOWN = 10  # bad rows that an error lists


@dataclasses.dataclass(frozen=True)
class Examples:
    """Input and target texts of the rows of a file, in file order."""

    inputs: list[str]
    targets: list[str]

    def take(self, rows: Any) -> Examples:
        """Returns the examples with the given row numbers, which count from 0."""
        return Examples([self.inputs[i] for i in rows], [self.targets[i] for i in rows])


class Template:
    """Template of a text, with fields in braces: 'question: {question} context: {doc.text}'.

    A field is a key of the row. If the row has no such key, dots in the name select keys of nested
    objects. Literal braces are written twice. White space around the filled text is removed.

    Args:
        name: The name of the template in errors: 'inputs' or 'targets'.
        text: The text with fields in braces.

    Raises:
        ValueError: the template names no field, or has empty braces, an unmatched brace, or '!' or
            ':' inside braces.
    """

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"The template {name}={text!r} cannot be parsed ({error}). Write literal braces "
                "twice: {{ and }}."
            ) from error
        for _, field, spec, conversion in self._parts:
            if field == "" or spec or conversion:
                raise ValueError(
                    f"The template {name}={text!r} has empty braces, or '!' or ':' inside braces. "
                    "Put only the name of a field in braces: {question}."
                )
        self.fields = tuple({field: None for _, field, _, _ in self._parts if field})
        if not self.fields:
            raise ValueError(
                f"The template {name}={text!r} names no field, so its text would be the same for "
                "all rows. Put a field name in braces: {question}."
            )

    def fill(self, row: Row) -> str:
        """Returns the template filled with the fields of a row.

        Raises:
            Unusable: a field is missing or has no text, or the filled text is empty.
        """
        filled = "".join(
            literal + (_text_of(_find(row, field), field) if field else "")
            for literal, field, _, _ in self._parts
        ).strip()
        if not filled:
            raise Unusable("empty", self.subject)
        return filled

    @property
    def subject(self) -> str:
        """The name for errors about the whole text: the only field, or the template's name."""
        return self.fields[0] if len(self.fields) == 1 else self.name


def read(
    path: epath.Path,
    inputs: Template,
    targets: Template,
    words: Mapping[str, str],
    quoting: bool = False,
) -> Examples:
    """Returns the examples of a file.

    Args:
        path: The file, whose extension selects the reader.
        inputs, targets: The templates of the two texts.
        words: Target in the file -> label word that replaces it; {} for free text.
        quoting: Whether cells of a TSV file may be in quotation marks.

    Raises:
        ValueError: the file has no rows, or rows that cannot be used. The message lists the first
            `SHOWN` of these with line and field.
    """
    examples, bad, total = Examples([], []), [], 0
    for number, row in file_formats.rows(path, quoting):
        total += 1
        try:
            if isinstance(row, Unusable):
                raise row
            texts = inputs.fill(row), _word(targets.fill(row), targets.subject, words)
        except Unusable as error:
            bad.append((number, error))
            continue
        examples.inputs.append(texts[0])
        examples.targets.append(texts[1])
    if bad:
        raise ValueError(_describe(path, bad, total))
    if not total:
        raise ValueError(f"{path} contains no rows. Add at least one, or use another file.")
    return examples


def check_readable(path: epath.Path) -> None:
    """Checks that a file exists and that its format is supported, without reading it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the extension is unknown, or the package that reads it is not installed.
    """
    extension = file_formats.extension(path)
    if extension not in file_formats.EXTENSIONS:
        raise ValueError(
            f"{path} has the unsupported extension {extension!r}. Use one of "
            f"{', '.join(file_formats.EXTENSIONS)}; convert a .json list to .jsonl, with one "
            "object per line."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The file {path} does not exist. Correct the path; relative paths start from the "
            "working directory."
        )
    if extension == PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"Reading {path} needs the package pyarrow, which is not installed. Run "
            "`pip install 'mpt-jax[parquet]'`."
        )


def scalar_text(value: Any) -> str | None:
    """Returns the text of a value (see the module docstring), or None if it has no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        return str(value)
    return None


def _find(row: Row, field: str) -> Any:
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Unusable(f"missing; the row has {', '.join(map(str, row)) or 'no fields'}", field)
        value = value[part]
    return value


def _text_of(value: Any, field: str) -> str:
    text = scalar_text(value)
    if text is None:
        raise Unusable(_not_text(value), field)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape one half of a pair: "\ud83d"
        raise Unusable("contains half of a surrogate pair instead of a character", field) from error
    return text


def _not_text(value: Any) -> str:
    if value is None or isinstance(value, float):
        return "missing: it is null or NaN"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items, not text; join them, or write one row per item"
    if isinstance(value, Mapping):
        return f"an object, not text; select a field with a dot: {', '.join(map(str, value))}"
    return f"a value of type {type(value).__name__}; write it as text"


def _word(target: str, field: str, words: Mapping[str, str]) -> str:
    if not words:
        return target
    if target not in words:
        raise Unusable(f"{target!r} is not one of the labels {', '.join(map(repr, words))}", field)
    return words[target]


def _describe(path: epath.Path, bad: list[tuple[int, Unusable]], total: int) -> str:
    unit = "row" if file_formats.extension(path) == PARQUET else "line"
    lines = [f"{path}: {len(bad)} of {total} rows cannot be used. Fix or remove them:"]
    for number, error in bad[:SHOWN]:
        where = [f"{unit} {number}"] * bool(number) + [f"field {error.field!r}"] * bool(error.field)
        lines.append(f"  {', '.join(where) or 'the file'}: {error.reason}")
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    return "\n".join(lines)

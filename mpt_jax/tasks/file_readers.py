"""Readers of JSONL, CSV, TSV and Parquet files, with errors that name the invalid rows.

A row is a JSON object, a line of cells below a header, or a row of a Parquet table. `read` fills
two templates with the fields of every row. It never skips a row: if some rows cannot be used, it
raises an error with their numbers and the reasons. The text of a field depends on its type:

    str                     unchanged
    number in JSON          as written: 1.50 stays '1.50'; in Parquet, Python's str()
    true, false             'true', 'false'
    null, NaN               an error: missing; the same for Infinity in JSON
    list, object, others    an error that names the type
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

SHOWN = 10  # bad rows that an error lists
BOM = b"\xef\xbb\xbf"


class Unusable(Exception):
    """The reason why a row cannot be used.

    Args:
        reason: The reason, as shown to the author of the file.
        field: The name of the invalid field; '' for the whole row.
    """

    def __init__(self, reason: str, field: str = ""):
        super().__init__(reason)
        self.reason, self.field = reason, field


Row = Mapping[str, Any]
# (number, row or why it cannot be used). Numbers count from 1; 0 stands for the whole file.
Numbered = tuple[int, Row | Unusable]


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
    path: epath.Path, inputs: Template, targets: Template, words: Mapping[str, str]
) -> Examples:
    """Returns the examples of a file.

    Args:
        path: The file, whose extension selects the reader.
        inputs, targets: The templates of the two texts.
        words: Target in the file -> label word that replaces it; {} for free text.

    Raises:
        ValueError: the file has no rows, or rows that cannot be used. The message lists the first
            `SHOWN` of these with line and field.
    """
    examples, bad, total = Examples([], []), [], 0
    with path.open("rb") as file:
        for number, row in READERS[path.suffix.lower()](file):
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
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"{path} has the unsupported extension {path.suffix!r}. Use {', '.join(READERS)}; "
            "convert a .json list to .jsonl, with one object per line."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The file {path} does not exist. Correct the path; relative paths start from the "
            "working directory."
        )
    if path.suffix.lower() == PARQUET and importlib.util.find_spec("pyarrow") is None:
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
        return f"a list of {len(value)} items, not a text; join them, or write one row per item"
    if isinstance(value, Mapping):
        return f"an object, not a text; select a field with a dot: {', '.join(map(str, value))}"
    return f"a value of type {type(value).__name__}; write it as text"


def _word(target: str, field: str, words: Mapping[str, str]) -> str:
    if not words:
        return target
    if target not in words:
        raise Unusable(f"{target!r} is not one of the labels {', '.join(map(repr, words))}", field)
    return words[target]


def _describe(path: epath.Path, bad: list[tuple[int, Unusable]], total: int) -> str:
    unit = "row" if path.suffix.lower() == PARQUET else "line"
    lines = [f"{path}: {len(bad)} of {total} rows cannot be used. Fix or remove them:"]
    for number, error in bad[:SHOWN]:
        where = [f"{unit} {number}"] * bool(number) + [f"field {error.field!r}"] * bool(error.field)
        lines.append(f"  {', '.join(where) or 'the file'}: {error.reason}")
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    return "\n".join(lines)


# --- Formats ---------------------------------------------------------------------------------


def _jsonl(file: BinaryIO) -> Iterator[Numbered]:
    """Yields one JSON object per line; skips blank lines."""
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield number, _object(line)


def _object(line: bytes) -> Row | Unusable:
    # Numbers keep their spelling. NaN and Infinity are not JSON, and become null.
    parse: dict[str, Any] = {"parse_int": str, "parse_float": str}
    try:
        row = json.loads(line.decode().rstrip(), **parse, parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        return _not_utf8(error.object[error.start])
    except json.JSONDecodeError as error:
        return Unusable(f"not JSON: {error.msg}, at character {error.colno}")
    if not isinstance(row, dict):
        return Unusable(f"not a JSON object: {line.decode().strip()[:40]!r}")
    return row


def _cells(delimiter: str) -> Callable[[BinaryIO], Iterator[Numbered]]:
    """Returns a reader of files with a header and lines of cells. It skips blank lines.

    A cell in quotation marks may span several lines. Rows are numbered by their first line.
    """

    def read_cells(file: BinaryIO) -> Iterator[Numbered]:
        # Bytes that are not UTF-8 become surrogates, which `_row_of_cells` rejects.
        lines = (line.decode("utf-8", "surrogateescape") for line in _lines(file))
        # strict: an unclosed quotation mark is an error instead of swallowing the rest of the file.
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield (
                    number,
                    Unusable(
                        f"{error}; the rest of the file was not read. Write a quotation mark "
                        "inside quotation marks twice"
                    ),
                )
                return
            if cells is None:
                return
            if not cells:
                continue
            if header is not None:
                yield number, _row_of_cells(header, cells)
                continue
            header = cells
            if (problem := _header_problem(header)) is not None:
                yield number, problem
                return

    return read_cells


def _header_problem(header: list[str]) -> Unusable | None:
    row = _row_of_cells(header, header)
    if isinstance(row, Unusable):
        return row
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not repeated:
        return None
    return Unusable(f"the header repeats the columns {', '.join(repeated)}; rename all but one")


def _row_of_cells(header: list[str], cells: list[str]) -> Row | Unusable:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(ord(error.object[error.start]) - 0xDC00)
    if len(cells) != len(header):
        return Unusable(f"{len(cells)} cells, but the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _parquet(file: BinaryIO) -> Iterator[Numbered]:
    """Yields the rows in file order, numbered from 1."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        yield 0, Unusable(f"not a complete Parquet file: {error}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file, without the byte order mark that may be at its start."""
    for number, line in enumerate(file):
        yield line.removeprefix(BOM) if number == 0 else line


def _not_utf8(byte: int) -> Unusable:
    return Unusable(f"not UTF-8: the byte 0x{byte:02x}; save the file as UTF-8")


PARQUET = ".parquet"
READERS: Mapping[str, Callable[[BinaryIO], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".csv": _cells(","),
    ".tsv": _cells("\t"),
    PARQUET: _parquet,
}

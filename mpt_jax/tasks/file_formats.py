"""Rows of JSONL, CSV, TSV and Parquet files, plain or compressed with gzip.

A row is a JSON object, a line of cells below a header, or a row of a Parquet table. Text files are
streamed, and a row has at most `MAX_ROW` bytes, so that a single row of a malformed or compressed
file cannot fill the memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging
from etils import epath

from mpt_jax.core import schema

MAX_ROW = 64 * 2**20  # bytes of a row of a text file, decompressed
MAX_CELL = 16 * 2**20  # characters of a cell of a CSV or TSV file
MAX_DEPTH = 100  # nested lists and objects of a JSON row
BOM = b"\xef\xbb\xbf"
REST = "the rest of the file was not read"


class Unusable(Exception):
    """Error for a row that cannot be used. It is raised, or yielded instead of the row.

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
NumberedCells = tuple[int, list[str] | Unusable]


def extension(path: epath.Path) -> str:
    """Returns the extension that selects the reader, in lower case: '.csv' or '.csv.gz'."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [GZIP] else suffixes[-1:])


def is_tsv(path: epath.Path) -> bool:
    """Whether a file is a TSV file, plain or compressed."""
    return extension(path).removesuffix(GZIP) == TSV


def rows(path: epath.Path, quoting: bool = False) -> Iterator[Numbered]:
    """Yields the rows of a file, in order, numbered by their first line.

    Args:
        path: The file, with an extension of `EXTENSIONS`.
        quoting: Whether cells of a TSV file may be in quotation marks, as in CSV. By default, a
            quotation mark in a TSV file is a character like any other.
    """
    kind = extension(path)
    with path.open("rb") as file:
        if kind == PARQUET:
            yield from _parquet(file)
            return
        compressed = kind.endswith(GZIP)
        text = io.BufferedReader(gzip.GzipFile(fileobj=file)) if compressed else file  # type: ignore[type-var]
        lines = _Lines(text, path)
        reader = _TEXT_READERS[kind.removesuffix(GZIP)]
        if quoting and is_tsv(path):
            reader = _quoted_tsv
        try:
            yield from reader(lines)
        except Unusable as error:
            yield lines.number + 1, error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield lines.number + 1, Unusable(f"not a complete gzip file: {error}; {REST}")


class _Lines:
    """The lines of a text file as bytes, without a byte order mark.

    Attributes:
        path: The file, for messages.
        number: The number of lines read.
        row_size: The number of bytes of the current row; readers set it to 0 at the start of a row.

    Raises (on iteration):
        Unusable: a row has more than `MAX_ROW` bytes.
    """

    def __init__(self, file: BinaryIO, path: epath.Path):
        self._file, self.path = file, path
        self.number = self.row_size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._file.readline(MAX_ROW - self.row_size + 1)
        if not line:
            raise StopIteration
        self.row_size += len(line)
        if self.row_size > MAX_ROW:
            raise Unusable(
                f"the row has more than {MAX_ROW // 2**20} MiB; {REST}. Shorten it, or check that "
                "the file ends its lines with LF or CRLF"
            )
        self.number += 1
        return line.removeprefix(BOM) if self.number == 1 else line


# --- JSONL -----------------------------------------------------------------------------------


def _jsonl(lines: _Lines) -> Iterator[Numbered]:
    """Yields one JSON object per line; skips blank lines."""
    for line in lines:
        lines.row_size = 0
        if line.strip():
            yield lines.number, _object(line)


def _object(line: bytes) -> Row | Unusable:
    if _too_deep(line):
        return Unusable(f"nested more than {MAX_DEPTH} levels deep; flatten the row")
    # Numbers keep their spelling. NaN and Infinity are not JSON, and become null.
    parse: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": lambda _: None}
    try:
        row = json.loads(line.decode().rstrip(), **parse, object_pairs_hook=_unique_fields)
    except Unusable as error:
        return error
    except UnicodeDecodeError as error:
        return _not_utf8(error.object[error.start])
    except json.JSONDecodeError as error:
        return Unusable(f"not JSON: {error.msg}, at character {error.colno}{_line_end_hint(line)}")
    if not isinstance(row, dict):
        return Unusable(f"not a JSON object: {line.decode().strip()[:40]!r}")
    return row


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (repeated := schema.repeated_field(pairs)) is not None:
        raise Unusable("repeated in the row; keep one of the values", repeated)
    return dict(pairs)


# The closing quotation mark is optional, and the repeats are possessive, so that an unterminated
# string takes linear time.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([\[{])|[\]}]', re.DOTALL)


def _too_deep(line: bytes) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep, which could overflow the
    stack of the recursive JSON parser."""
    if line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(line):
        if match[1]:
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif match[0] in (b"]", b"}"):
            depth -= 1
    return False


# --- CSV and TSV -----------------------------------------------------------------------------


def _table(cells_of_rows: Iterator[NumberedCells]) -> Iterator[Numbered]:
    """Yields the rows below the header, which is the first row."""
    header: list[str] | None = None
    for number, cells in cells_of_rows:
        if header is not None:
            yield number, _row_of_cells(header, cells)
            continue
        problem = _header_problem(cells)
        if problem is not None:
            yield number, problem
            return
        assert isinstance(cells, list)
        header = cells


def _quoted(lines: _Lines, delimiter: str) -> Iterator[NumberedCells]:
    """Yields the cells of each row. A cell in quotation marks may span several lines. Skips blank
    lines."""
    # strict: an unclosed quotation mark is an error instead of swallowing the rest of the file.
    cells_of_rows = csv.reader(map(_decoded, lines), delimiter=delimiter, strict=True)
    while True:
        number, lines.row_size = lines.number + 1, 0
        before = csv.field_size_limit(MAX_CELL)  # of the whole process, so restored after each row
        try:
            cells = next(cells_of_rows, None)
        except csv.Error as error:
            yield number, _csv_error(str(error))
            return
        except Unusable as error:
            yield number, error
            return
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        if cells:
            yield number, cells


def _csv_error(message: str) -> Unusable:
    if "field limit" in message:
        return Unusable(
            f"a cell has more than {MAX_CELL:,} characters; {REST}. Shorten it or, if it looks "
            "short, close an earlier quotation mark"
        )
    if "new-line character" in message:
        return Unusable(f"a line ends with a bare CR; {REST}. {_LINE_ENDS}")
    return Unusable(f"{message}; {REST}. Double each quotation mark inside a quoted cell")


def _unquoted(lines: _Lines) -> Iterator[NumberedCells]:
    """Yields the cells of each line, with quotation marks as ordinary characters. Skips blank
    lines."""
    wrapped = 0
    for line in lines:
        lines.row_size = 0
        text = _decoded(line).removesuffix("\n").removesuffix("\r")
        if "\r" in text:
            yield lines.number, Unusable(f"a cell contains a carriage return (CR). {_LINE_ENDS}")
        elif text:
            cells = text.split("\t")
            wrapped += any(len(x) > 1 and x[0] == x[-1] == '"' for x in cells)
            yield lines.number, cells
    if wrapped:
        logging.warning(
            "%s: %d rows have a cell in quotation marks, which are read as part of the text. If "
            "they only quote the cell, as in CSV, pass quoting=True when you register the task.",
            *(lines.path, wrapped),
        )


def _header_problem(cells: list[str] | Unusable) -> Unusable | None:
    row = _row_of_cells(cells, cells) if isinstance(cells, list) else cells
    if isinstance(row, Unusable):
        return row
    repeated = sorted({name for name in cells if cells.count(name) > 1})  # type: ignore[union-attr]
    if not repeated:
        return None
    return Unusable(f"the header repeats the columns {', '.join(repeated)}; make names unique")


def _row_of_cells(header: list[str], cells: list[str] | Unusable) -> Row | Unusable:
    if isinstance(cells, Unusable):
        return cells
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(ord(error.object[error.start]) - 0xDC00)
    if len(cells) != len(header):
        return Unusable(f"{len(cells)} cells, but the header has {len(header)}")
    for name, cell in zip(header, cells, strict=True):
        if len(cell) > MAX_CELL:
            return Unusable(f"has more than {MAX_CELL:,} characters; shorten it", name)
    return dict(zip(header, cells, strict=True))


# --- Parquet ---------------------------------------------------------------------------------


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


_LINE_ENDS = "End lines with LF or CRLF"


def _line_end_hint(line: bytes) -> str:
    return f". {_LINE_ENDS}, not with a bare CR" if b"\r" in line.strip() else ""


def _decoded(line: bytes) -> str:
    # Bytes that are not UTF-8 become surrogates, which `_row_of_cells` rejects.
    return line.decode("utf-8", "surrogateescape")


def _not_utf8(byte: int) -> Unusable:
    return Unusable(f"not UTF-8: the byte 0x{byte:02x}; save the file as UTF-8")


def _csv(lines: _Lines) -> Iterator[Numbered]:
    return _table(_quoted(lines, ","))


def _tsv(lines: _Lines) -> Iterator[Numbered]:
    return _table(_unquoted(lines))


def _quoted_tsv(lines: _Lines) -> Iterator[Numbered]:
    return _table(_quoted(lines, "\t"))


PARQUET, TSV, GZIP = ".parquet", ".tsv", ".gz"
_TEXT_READERS: Mapping[str, Callable[[_Lines], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    TSV: _tsv,
}
EXTENSIONS = (*_TEXT_READERS, *(f"{kind}{GZIP}" for kind in _TEXT_READERS), PARQUET)

"""Rows of text files: quotation marks, sizes, nesting, compression, and their errors."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
from etils import epath

from mpt_jax.tasks import file_formats, file_readers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name: str, content: str | bytes, quoting: bool = False) -> list[tuple[str, str]]:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    templates = file_readers.Template("inputs", "{q}"), file_readers.Template("targets", "{a}")
    found = file_readers.read(epath.Path(name), *templates, {}, quoting)
    return list(zip(found.inputs, found.targets, strict=True))


# --- TSV -------------------------------------------------------------------------------------

QUOTED = 'q\ta\nfine\tyes\n"To be\tno\nI said\tyes\nthat is"\tyes\nbad\tno\n'


def test_tsv_quotation_mark_is_a_character():
    assert read("x.tsv", QUOTED) == [
        ("fine", "yes"),
        ('"To be', "no"),
        ("I said", "yes"),
        ('that is"', "yes"),
        ("bad", "no"),
    ]


def test_tsv_quoting_reads_cells_as_csv_does():
    content = 'q\ta\n"say ""yes""\tor\nno"\tyes\n'
    assert read("x.tsv", content, quoting=True) == [('say "yes"\tor\nno', "yes")]
    with pytest.raises(ValueError, match="line 2: .*; the rest of the file was not read"):
        read("x.tsv", 'q\ta\n"open\tyes\n', quoting=True)


def test_tsv_cell_wrapped_in_quotation_marks_logs_warning(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        assert read("x.tsv", 'q\ta\n"fine"\tyes\nbad\tno\n') == [('"fine"', "yes"), ("bad", "no")]
        read("y.tsv", QUOTED)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("x.tsv: 1 rows have a cell in quotation marks")
    assert "quoting=True" in message


def test_tsv_wrong_cells_error_names_line_and_counts():
    with pytest.raises(ValueError, match=r"x\.tsv: 3 of 4 rows") as error:
        read("x.tsv", "q\ta\r\nx\ty\r\n\r\nx\ty\tz\nx\nx\rz\ty\n")
    assert str(error.value).splitlines()[1:] == [
        "  line 4: 3 cells, but the header has 2",
        "  line 5: 1 cells, but the header has 2",
        "  line 6: a cell contains a carriage return (CR). End lines with LF or CRLF",
    ]


# --- Sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "comma"), [("x.csv", ","), ("x.tsv", "\t")])
def test_cell_up_to_limit_read_and_larger_raises(name, comma, monkeypatch):
    """Python's csv module stops at 131,072 characters unless told otherwise."""
    monkeypatch.setattr(file_formats, "MAX_CELL", 200_000)
    before = csv.field_size_limit()
    text = "x" * 200_000
    assert read(name, f"q{comma}a\n{text}{comma}yes\n") == [(text, "yes")]
    assert csv.field_size_limit() == before
    with pytest.raises(ValueError, match=r"line 3.* has more than 200,000 characters") as error:
        read(name, f"q{comma}a\nshort{comma}no\n{text}x{comma}yes\n")
    assert "Write a quotation mark inside" not in str(error.value)
    assert csv.field_size_limit() == before


def test_cell_limit_is_sixteen_million_characters():
    assert file_formats.MAX_CELL == 16_777_216


@pytest.mark.parametrize(
    ("name", "start", "line"),
    [
        ("x.jsonl", '{"q": "x", "a": "y"}\n{"q": "', 2),
        ("x.csv", 'q,a\nx,y\n"', 3),
        ("x.tsv", "q\ta\nx\ty\n", 3),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_row_over_limit_raises_without_reading_it_whole(name, start, line, compressed, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_ROW", 10_000)
    filler = "x\n" * 20_000 if name == "x.csv" else "x" * 40_000
    content = (start + filler).encode()
    if compressed:
        name, content = f"{name}.gz", gzip.compress(content)
    with pytest.raises(ValueError, match="the row has more than 0 MiB; the rest of the file") as e:
        read(name, content)
    assert f"  line {line}" in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "q,a\rx,yes\r", "line 1: a line ends with a bare CR; the rest .* LF or CRLF"),
        ("x.jsonl", '{"q": 1, "a": 2}\r{"q": 1, "a": 2}', "Extra data, .* not with a bare CR"),
        ("x.tsv", "q\ta\rx\tyes\r", r"line 1: a cell contains a carriage return"),
    ],
)
def test_line_ends_of_cr_alone_error_says_so(name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(name, content)
    assert "quotation mark" not in str(error.value)


# --- JSONL -----------------------------------------------------------------------------------


def nested(levels: int) -> str:
    return f'{{"q": "x", "a": "y", "z": {"[" * (levels - 1)}{"]" * (levels - 1)}}}\n'


def test_jsonl_nested_too_deep_error_names_line():
    assert read("x.jsonl", nested(100)) == [("x", "y")]
    with pytest.raises(ValueError, match=r"x\.jsonl: 2 of 3 rows") as error:
        read("x.jsonl", nested(101) + nested(3) + nested(100_000))
    assert str(error.value).splitlines()[1:] == [
        f"  line {line}: nested more than 100 levels deep; flatten the row" for line in (1, 3)
    ]


def test_jsonl_brackets_in_texts_and_in_sequence_are_not_nesting():
    row = '{"q": "' + '[{\\"' * 200 + '", "a": "y", "z": [' + "[], " * 200 + "{}]}"
    assert read("x.jsonl", row) == [('[{"' * 200, "y")]


def test_jsonl_repeated_key_error_names_line_and_field():
    rows = (
        '{"q": "x", "a": "y"}\n{"q": "x", "q": "z", "a": "y"}\n{"q": "x", "a": {"b": 1, "b": 2}}\n'
    )
    with pytest.raises(ValueError, match=r"x\.jsonl: 2 of 3 rows") as error:
        read("x.jsonl", rows)
    assert str(error.value).splitlines()[1:] == [
        f"  line {line}, field {field!r}: repeated in the row; keep one of the values"
        for line, field in ((2, "q"), (3, "b"))
    ]


# --- Extensions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.ndjson", "x.jsonl.gz", "x.ndjson.gz", "X.JSONL.GZ"])
def test_read_other_names_of_jsonl(name):
    content = b'{"q": "x", "a": "y"}\n'
    assert read(name, gzip.compress(content) if name.lower().endswith("gz") else content) == [
        ("x", "y")
    ]


@pytest.mark.parametrize(("name", "comma"), [("x.csv.gz", ","), ("x.tsv.gz", "\t")])
def test_read_compressed_cells(name, comma):
    content = f"\ufeffq{comma}a\nx{comma}y\n".encode()
    assert read(name, gzip.compress(content)) == [("x", "y")]


def test_read_damaged_gzip_error_names_line():
    lines = b"".join(b'{"q": "%d", "a": "y"}\n' % i for i in range(10_000))
    with pytest.raises(ValueError, match=r"line \d+: not a complete gzip file: .*end-of-stream"):
        read("x.jsonl.gz", gzip.compress(lines)[:-1000])
    with pytest.raises(ValueError, match=r"line 1: not a complete gzip file: Not a gzipped file"):
        read("y.jsonl.gz", lines)


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.parquet.gz", "x.gz", "x"])
def test_other_extensions_raise(name):
    Path(name).write_text("")
    with pytest.raises(ValueError, match=r"unsupported extension .* Use one of .*\.jsonl\.gz"):
        file_readers.check_readable(epath.Path(name))

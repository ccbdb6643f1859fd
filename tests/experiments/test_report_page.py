"""Widths of the report's tables and figures, styles without color, and the page of one run."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from mpt_jax.experiments.report import __main__ as command
from mpt_jax.experiments.report import analysis, figures, page, tables
from tests.fixtures.report_folders import Reader, page_of, result, titles, write_lines

SCREEN, REM = 1200, 16
TASKS = [f"task{number}" for number in range(21)]


def rule(selector: str) -> str:
    """The declarations of a selector."""
    return "".join(re.findall(rf"(?:^|}}|\n)\s*{re.escape(selector)} {{(.*?)}}", page.STYLE, re.S))


def narrowest(html: str) -> float:
    """The width in pixels below which a table cannot be drawn: of each column, its longest word in
    letters of 0.6 em, or one line of a rotated header, and the padding."""
    many = 'class="many"' in html
    size, padding = (0.75, 0.2) if many else (0.875, 0.45)
    assert f"font-size: {str(size)[1:]}rem" in rule(".many th, .many td" if many else "th, td")
    assert f"padding: .3rem {str(padding)[1:]}rem" in rule(
        ".many th, .many td" if many else "th, td"
    )
    assert "nowrap" not in rule("th, td")
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", html)
    ]
    total = 0.0
    for number, column in enumerate(zip(*rows, strict=True)):
        cells = column[1:] if many and number else column
        letters = max(len(word) for cell in cells for word in (cell.split() or [""]))
        words = max(0.6 * letters * size, 1.5 * size + 0.1 if many and number else 0)
        total += max(words + 2 * padding, 9 if number == 0 else 0) * REM
    return total


@pytest.mark.parametrize("number", [2, 6, 12, 21])
def test_main_table_fits_a_page_of_1200_pixels(number):
    scores = {task: [52.1, 54.2, 60.3] for task in TASKS[:number]}
    found = [result(f"MPT, one shared prompt {i}", **scores) for i in range(3)]
    html = page.table(tables.score_rows(found, {}), "Scores")
    assert narrowest(html) <= SCREEN - 2 * REM
    rotated = rule(".many thead th:not(:first-child)")
    assert "vertical-rl" in rotated


def test_two_panels_fit_beside_each_other():
    (least, gap) = re.search(
        r"gap: 1rem ([\d.]+)rem.*?minmax\(min\(100%, ([\d.]+)rem\), 1fr\)", rule(".panels"), re.S
    ).groups()[::-1]
    assert float(least) * REM == figures.WIDTH == 560
    assert 2 * float(least) * REM + float(gap) * REM <= SCREEN - 2 * REM
    assert "max-width: 100%; height: auto" in page.STYLE
    svg = figures.lines(
        figures.Panel("t", "x", "y", "alt"),
        [figures.Line(figures.Style("#000001", "o", "-"), [1], [2])],
    )
    assert 'width="560"' in svg and 'viewBox="0 0 560 ' in svg


def test_styles_of_28_methods_differ_without_color():
    found = [result(f"m{number}", rte=[1.0]) for number in range(28)]
    looks = figures.styles(analysis.by_label(found))
    pairs = [(look.marker, look.linestyle) for look in looks.values()]
    assert len(set(pairs)) == 28 and all(marker for marker, _ in pairs)
    for one, other in itertools.pairwise(pairs):
        assert one[0] != other[0] and one[1] != other[1]


def test_curves_of_methods_have_markers(tmp_path):
    for name in ("a", "b"):
        lines = [{"folder": "train", "step": step, "loss": 1 / step} for step in range(1, 101)]
        write_lines(tmp_path / name / "metrics.jsonl", lines)
    found = [result(name, folder=tmp_path / name, rte=[1.0, 2.0]) for name in ("a", "b")]
    html = page_of(tmp_path, found, reference="a")
    curves = html[html.index("Learning curves") :]
    marks = re.findall(r'<use xlink:href="#[^"]*m', curves)
    assert len(marks) >= 2 * figures.MOST_MARKERS


def test_names_with_dollar_signs_are_drawn_as_they_are():
    names = ["$\\a$", "b"]
    panel = figures.Panel("cost $5 and $6", "", "", "alt")
    svg = figures.heat_map(panel, names, names, np.eye(2), 1.0, ".2f")
    assert "cost $5 and $6" in svg and svg.count("$\\a$") == 2


# --- One run -------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "target"
    lines = [{"folder": "train", "step": s, "loss": 1 / s, "loss/rte": 1 / s} for s in (1, 2, 4)]
    write_lines(folder / "metrics.jsonl", lines)
    record = {"mpt_jax": "0.1.0", "command": ["train", "--gin_file=<x>.gin"], "seed": 7}
    record |= {
        "total_steps": 4,
        "trainable_parameters": 2708,
        "started": "2026-01-01T00:00:00+0000",
    }
    write_lines(folder / "run.jsonl", [record, record])
    scores = [{"step": s, "accuracy": 50.0 + s, "f1": 40.0} for s in (2, 4)]
    write_lines(folder / "inference_eval" / "rte-metrics.jsonl", scores)
    (folder / "config.gin").write_text("BATCH_SIZE = 8  # <b>\n")
    return folder


def test_report_of_a_run_has_scores_loss_and_settings(model_dir, capsys):
    command.main([str(model_dir)])
    out = capsys.readouterr().out.strip()
    assert out == str(model_dir / "report.html")
    html = (model_dir / "report.html").read_text()
    assert titles(html) == ["Scores", "Loss", "Settings"]
    read = Reader(html)
    assert len(set(read.ids)) == len(read.ids)
    assert read.alts == [
        "Main metric by step. At the last step: rte (accuracy) 54.",
        "Training loss by step. At the last step: rte 0.25.",
    ]
    assert "<td>54.0</td><td>40.0</td>" in html and '<th scope="row">rte</th><td>4</td>' in html
    assert "BATCH_SIZE = 8  # &lt;b&gt;" in html and "--gin_file=&lt;x&gt;.gin" in html
    assert "<dd>2708</dd>" in html and "<dt>Starts</dt><dd>2</dd>" in html


def test_report_of_a_run_that_did_not_evaluate_says_so(model_dir, tmp_path):
    (model_dir / "inference_eval" / "rte-metrics.jsonl").unlink()
    command.main([str(model_dir), "--out", str(tmp_path / "x.html")])
    html = (tmp_path / "x.html").read_text()
    assert titles(html) == ["Loss", "Settings", "What is not shown"]
    assert f"Scores: not recorded in {model_dir}." in html


def test_report_of_many_runs_shows_their_mean(model_dir):
    for number in range(40):
        lines = [{"step": step, "accuracy": float(number)} for step in (2, 4)]
        write_lines(model_dir / "inference_eval" / f"r{number}-metrics.jsonl", lines)
    (model_dir / "inference_eval" / "rte-metrics.jsonl").unlink()
    command.main([str(model_dir)])
    html = (model_dir / "report.html").read_text()
    assert "mean over 40 runs" in html and "At the last step: mean 19.5." in html
    assert html.count('<th scope="row">r') == 40


def test_unwritable_home_prints_no_notice_of_matplotlib(model_dir, tmp_path):
    home = tmp_path / "home"
    home.write_text("a file, in which nothing can be written")
    script = "import mpt_jax.experiments.report.__main__ as report, sys; report.main(sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(model_dir)],
        env={"HOME": str(home), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""

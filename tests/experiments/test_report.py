"""Report: figures by hand, missing data, and a self-contained page."""

import dataclasses
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mpt_jax.cli import main
from mpt_jax.core.runs import Runs
from mpt_jax.experiments import results
from mpt_jax.experiments.report import __main__ as command
from mpt_jax.experiments.report import analysis, figures, run_reader, sections, tables
from mpt_jax.experiments.results import Result
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from tests.fixtures.report_folders import (
    H,
    P,
    Reader,
    page_of,
    result,
    titles,
    write_artifact,
    write_lines,
)

SOURCES = ("toy_sst2", "toy_squad")


def demo_result(name, rte, d2t, folder):
    scores = {
        "toy_rte": {"accuracy": rte, "f1": [0.0] * len(rte), "rank_accuracy": [v + 1 for v in rte]},
        "toy_d2t": {"f1": [v + 5 for v in d2t], "exact_match": d2t},
    }
    return Result(name, 32, scores, 2560.0, 12.4, (str(folder),), tuple(range(len(rte))))


@pytest.fixture
def root(tmp_path):
    """Folder with the files of demo stages that the report reads."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, P, H))
    factors = {
        "shared": rng.normal(size=(1, P, H)),
        "task_left": np.ones((2, P, 1)),
        "task_right": np.ones((2, 1, H)),
    }
    scores = {"toy_sst2": {"accuracy": 91.25}, "toy_squad": {"f1": 85.0, "exact_match": 80.0}}
    alone = Runs(SOURCES, groups="independent")
    write_artifact(tmp_path / "pt_source", PromptTuning(P), {"table": table}, alone, scores=scores)
    write_artifact(tmp_path / "mpt_source", MPT(P), factors, Runs(SOURCES), scores=scores)
    record = {"mpt_jax": "0.1.0", "git_revision": "abc123", "packages": {"jax": "0.10.2"}}
    record |= {"devices": ["8 x TPU v4 (tpu)"], "seed": 42, "started": "2026-01-01T00:00:00+0000"}
    for folder in ("pt_source", "mpt_source", "a", "b", "c"):
        lines = [{"folder": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
        lines.append({"folder": "inference_eval/x", "step": 3, "eval/accuracy": 1.0})
        write_lines(tmp_path / folder / "metrics.jsonl", lines)
        write_lines(tmp_path / folder / "run.jsonl", [record])
    return tmp_path


@pytest.fixture
def demo(root):
    found = [
        demo_result("PT", [50.0, 52.0, 54.0], [1.0, 2.0, 3.0], root / "a"),
        demo_result("MPT", [60.0, 61.0, 62.0], [0.0, 2.0, 4.0], root / "b"),
        demo_result("Full fine-tuning", [70.0], [9.0], root / "c"),
    ]
    results.save(root, found, {})
    return found


# --- Tables --------------------------------------------------------------------------------------


def test_demo_text_tables_show_means_and_differences(root, demo):
    text = tables.text(root, demo, {"toy_rte": 50.0, "toy_d2t": 0.5})
    text, differences = text.split("MPT minus each, paired by seed")
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    # Mean and standard deviation (n - 1), F1 of free text, and their mean over tasks.
    assert re.search(r"52\.0 ± 2\.0 +7\.0 ± 1\.0 +29\.5 +53\.0 +2,560 +12$", rows["PT"])
    assert re.search(r"70\.0 +14\.0 +42\.0", rows["Full fine-tuning"])
    assert re.search(r"50\.0 +0\.5", rows["majority class"])
    assert re.search(r"91\.2 +85\.0", rows["Teachers (PT)"])
    # By seed (10 - 1) / 2, (9 + 0) / 2, (8 + 1) / 2: no spread. By task 9 and 0: t(1) = 12.7062,
    # standard error 4.5.
    assert re.search(r"PT +\+4\.5 +\+4\.5 \.\. \+4\.5 +3 +-52\.7 \.\. \+61\.7 +2", differences)
    assert "Full fine-tuning" not in differences, "a single seed has no pairs"


def test_page_tables_have_intervals_and_all_pairs(demo):
    heads, pt, *_ = tables.score_rows(demo, {})
    row = dict(zip(heads, pt, strict=True))
    # Means over the two tasks 28, 29.5 and 31: t(2) = 4.3027, standard error 0.8660.
    assert (row["mean"], row["95% interval"], row["n"]) == ("29.5", "25.8 .. 33.2", "3")
    (*_, full) = tables.difference_rows(demo)
    assert full[0] == "Full fine-tuning"
    assert (full[3], full[5]) == ("1", "2"), "one common seed, two tasks"
    (_, mpt, *_) = tables.difference_rows(demo, reference="PT")
    assert mpt[:2] == ["MPT", "-4.5"]


def test_score_rows_task_missing_in_one_method_not_in_mean():
    rows = tables.score_rows([result("PT", rte=[50.0], cb=[10.0]), result("MPT", rte=[60.0])], {})
    heads = rows[0]
    assert [row[heads.index("mean")] for row in rows[1:]] == ["50.0", "60.0"]
    assert rows[2][heads.index("cb (accuracy)")] == ""


# --- Numbers -------------------------------------------------------------------------------------


def test_examples_needed_interpolates_linearly_in_log_k():
    scores = {4: 50.0, 16: 60.0, 64: 55.0}
    assert analysis.examples_needed(scores, 55.0) == pytest.approx(8.0)
    assert analysis.examples_needed(scores, 60.0) == pytest.approx(16.0)
    assert analysis.examples_needed(scores, 40.0) == 4.0
    assert analysis.examples_needed(scores, 60.1) is None
    # The first crossing counts.
    assert analysis.examples_needed({4: 50.0, 16: 40.0, 64: 60.0}, 55.0) == pytest.approx(
        32 * 2**0.5
    )


def test_matching_rows_compare_each_pair_of_methods():
    found = [
        *(result("PT", k, rte=[v]) for k, v in ((4, 50.0), (16, 60.0), (None, 99.0))),
        *(result("MPT", k, rte=[v]) for k, v in ((4, 55.0), (16, 70.0), (None, 99.0))),
    ]
    rows = tables.matching_rows(analysis.by_label(found), ("toy_rte",))
    assert rows == [
        ["", "to match", "k = 4", "k = 16"],
        ["PT", "MPT", "8.0", "not reached"],
        ["MPT", "PT", "≤ 4", f"{4 * 4 ** (5 / 15):.1f}"],
    ]


def test_gains_pair_common_seeds_of_common_tasks():
    new = result("MPT", rte=[60.0, 61.0, 62.0], cb=[5.0, 5.0, 5.0])
    old = dataclasses.replace(result("PT", rte=[54.0, 50.0, 52.0]), seeds=(2, 0, 7))
    gain = analysis.gains(new, old)
    assert list(gain) == ["toy_rte"]
    # Seeds 0 and 2: 60 - 50 and 62 - 54.
    assert (gain["toy_rte"].mean, gain["toy_rte"].n) == (9.0, 2)


def test_from_nothing_selects_comparable_pt_baseline():
    pt = result("PT", rte=[50.0])
    large = result("PT", rte=[70.0], size=5000)
    long = result("PT, P=40", rte=[52.0], length=40)
    spot = result("PT", rte=[60.0], start="toy_mnli")
    every = [spot, large, long, pt, result("PT", 4, rte=[40.0])]
    baseline = lambda like: analysis.from_nothing(every, like)  # noqa: E731
    assert baseline(spot) is pt
    assert baseline(result("MPT", rte=[1.0], size=5000)) is large
    assert baseline(result("MPT, P=40", rte=[1.0], length=40)) is long
    assert baseline(result("MPT, P=5", rte=[1.0], length=5)) is pt
    full = dataclasses.replace(result("Full", rte=[1.0], length=0, size=0), parameters=900.0)
    assert baseline(full) is pt, "full fine-tuning of the same backbone"
    assert baseline(result("MPT", None, rte=[1.0])) is None


def test_by_label_distinguishes_results():
    found = [
        result("PT", rte=[1.0]),
        result("PT", rte=[2.0], start="toy_mnli"),
        result("PT", rte=[3.0], length=5),
        result("MPT", rte=[4.0]),
        result("MPT", rte=[4.0], size=2_000_000),
        result("MPT", 4, rte=[4.0]),
    ]
    labels = ["PT, P=20", "PT from mnli, P=20", "PT, P=5", "MPT, 900", "MPT, 2 M"]
    assert list(analysis.by_label(found)) == labels
    with pytest.raises(ValueError, match="two results of 'PT' for k = 32"):
        analysis.by_label([result("PT", rte=[1.0]), result("PT", rte=[1.0])])


def test_training_curves_exclude_evaluation_lines(root):
    (curve,) = run_reader.training(root / "a")
    assert curve == {1: 1, 2: 1 / 2, 3: 1 / 3}


def test_training_curves_repeated_step_keeps_last_value(tmp_path):
    lines = [
        {"folder": "train", "step": 1, "loss": 9.0, "loss/x": 1.0, "loss/y": 5.0},
        {"folder": "train", "step": 2, "loss": 9.0, "loss/x": 2.0, "loss/y": 6.0},
        {"folder": "train", "step": 2, "loss": 9.0, "loss/x": 3.0, "loss/y": 7.0},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert run_reader.training(tmp_path) == [{1: 1.0, 2: 3.0}, {1: 5.0, 2: 7.0}]


def test_mean_curves_average_common_steps():
    curves = [{1: 1.0, 2: 2.0, 4: 4.0}, {2: 4.0, 4: 8.0}, {1: 7.0}, {}]
    assert analysis.mean_curves(curves) == {4: {2: 3.0, 4: 6.0}, 1: {1: 7.0}}


def test_cosines_by_task_average_pairs_of_runs():
    x, y = np.eye(2).reshape(2, 1, 2)
    names, found = analysis.cosines_by_task(np.stack([x, 3 * y, -x, y]), ["a", "a", "a", "b"])
    assert names == ["a", "b"]
    # Pairs within a: x and y, x and -x, y and -x. Between a and b: x, y and -x with y.
    np.testing.assert_allclose(found, [[-1 / 3, 1 / 3], [1 / 3, 1]], atol=1e-12)


def test_set_apart_spreads_close_points():
    found = analysis.set_apart({"a": 1000.0, "b": 1e6, "c": 1000.0})
    assert found["b"] == pytest.approx(1e6)
    assert math.log10(found["c"] / found["a"]) == pytest.approx(0.06)
    assert found["a"] * found["c"] == pytest.approx(1e6)
    many = list(analysis.set_apart({str(i): 1000.0 for i in range(11)}).values())
    assert math.log10(max(many) / min(many)) == pytest.approx(0.15)


# --- The page ------------------------------------------------------------------------------------


def test_page_is_self_contained_and_deterministic(root, demo):
    text = page_of(root, demo)
    page = Reader(text)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert "52.0 ± 2.0" in text and "abc123" in text and "8 x TPU v4 (tpu)" in text
    assert "prefers-color-scheme" in text
    assert text == page_of(root, demo), "the page is deterministic"


def test_figures_use_colors_of_page(root, demo):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page_of(root, demo), re.DOTALL))
    assert "var(--series-1)" in drawings and "currentColor" in drawings
    for stand_in in (figures.INK, figures.LINES, "#000001", "#000002", "#000003"):
        assert stand_in not in drawings
    assert re.search(r"<text[^>]*>step</text>", drawings), "text stays text"


def test_styles_variants_share_color_and_differ_in_dash():
    found = [result(name, rte=[1.0]) for name in ("PT", "MPT", "PT, P=40")]
    look = figures.styles(analysis.by_label(found))
    pt, mpt, long = look["PT"], look["MPT"], look["PT, P=40"]
    assert pt.color == long.color != mpt.color
    assert (pt.linestyle, pt.marker) != (long.linestyle, long.marker)
    many = figures.styles(analysis.by_label([result(f"m{i}", rte=[1.0]) for i in range(21)]))
    assert len({(style.color, style.linestyle) for style in many.values()}) == 21


def test_page_escapes_names(root):
    text = page_of(root, [result('<b>"MPT"&', rte=[1.0, 2.0]), result("PT", rte=[1.0, 2.0])])
    assert "<b>" not in text and "&lt;b&gt;" in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_page_without_run_folders_lists_missing_data(tmp_path):
    text = page_of(tmp_path, [result("PT", rte=[1.0, 2.0]), result("MPT", rte=[2.0, 4.0])])
    assert titles(text) == [
        "Scores",
        "Score and trained parameters",
        "Transfer gain",
        "Provenance",
        "What is not shown",
    ]
    absent = text.split("What is not shown")[-1]
    for words in (
        "Loss, k = 32: PT; MPT",
        "run.jsonl",
        "1 of its 1 run folders",
        "Examples needed",
    ):
        assert words in absent


def test_sources_found_below_demo_and_beside_table(root):
    table = root / "table1"
    (table / "mpt").mkdir(parents=True)
    found = {"Teachers (PT)": "pt_source", "MPT, one shared prompt": "mpt_source"}
    for folder in (root, table):
        assert {name: path.name for name, path in run_reader.sources(folder).items()} == found
    (table / "teachers").mkdir()
    assert run_reader.sources(table) == {"Teachers (PT)": table / "teachers"}, (
        "stages below the table come first"
    )


def test_own_folders_only_below_or_beside_root(root, demo, tmp_path_factory):
    assert run_reader.own(root, demo[0]) == [root / "a"]
    table = root / "table3"
    table.mkdir()
    assert run_reader.own(table, demo[0]) == [root / "a"], "tables share runs"
    assert not run_reader.own(tmp_path_factory.mktemp("elsewhere") / "b", demo[0])


def test_scores_by_step_with_several_evaluations_are_drawn(root, demo):
    steps = {0: (10.0, 30.0), 50: (20.0, 40.0)}
    for number, name in enumerate(("toy_rte_k32_s0", "toy_d2t_k32_s0")):
        lines = [{"step": step, "accuracy": scores[number]} for step, scores in steps.items()]
        write_lines(root / "a" / "inference_eval" / f"{name}-metrics.jsonl", lines)
    alts = Reader(page_of(root, demo)).alts
    assert "mean score by step, k = 32. At the last step: PT 30." in alts


def test_scores_of_ended_runs_stay_until_the_end_of_the_job(tmp_path):
    for name, steps in (("rte_s0", (0, 50, 100)), ("rte_s1", (0, 50))):
        lines = [{"step": step, "accuracy": 1.0 + step} for step in steps]
        write_lines(tmp_path / "inference_eval" / f"{name}-metrics.jsonl", lines)
    assert run_reader.scores(tmp_path) == [
        {0: 1.0, 50: 51.0, 100: 101.0}, {0: 1.0, 50: 51.0, 100: 51.0},
    ]  # fmt: skip


def test_target_prompts_show_reference_method(root, demo):
    runs = Runs(("toy_rte", "toy_rte"), ("s0", "s1"), "independent")
    table = np.stack([np.ones((P, H)), np.ones((P, H))])
    write_artifact(root / "b", PromptTuning(P), {"table": table}, runs)
    write_artifact(root / "a", PromptTuning(P), {"table": table}, runs)
    alts = Reader(page_of(root, demo)).alts
    assert "Cosine similarity of prompts, MPT, k = 32, 1 tasks." in alts


def test_affinity_shows_gains_by_source_and_target(tmp_path):
    found = [
        result("PT", rte=[50.0, 52.0], cb=[30.0, 30.0]),
        result("PT from a source", start="toy_mnli", rte=[60.0, 60.0], cb=[20.0, 20.0]),
        result("PT from a source", start="toy_qqp", rte=[55.0, 55.0], cb=[31.0, 31.0]),
        result("MPT", rte=[1.0, 1.0], cb=[1.0, 1.0]),
    ]
    text = page_of(tmp_path, found)
    alts = Reader(text).alts
    assert "Gain by source and target, k = 32. Best source: rte mnli +9.0, cb qqp +1.0." in alts
    drawing = text.split("Gain by source and target")[1].split("</svg>")[0]
    cells = re.findall(r">([+-][\d.]+)<", drawing)
    assert cells == ["+9.0", "-10.0", "+4.0", "+1.0"]


def test_lengths_and_sizes_are_curves_by_method(tmp_path):
    found = [
        result("PT", rte=[50.0]),
        result("PT, P=40", length=40, rte=[52.0]),
        result("PT, P=5", length=5, rte=[45.0]),
        result("MPT", rte=[60.0]),
        result("MPT, T5-large", size=2000, rte=[70.0]),
    ]
    alts = Reader(page_of(tmp_path, found)).alts
    assert "Mean score by prompt length, k = 32. PT 5: 45.0, 20: 50.0, 40: 52.0." in alts
    assert any(
        alt.startswith("Mean score by model parameters, k = 32.")
        and alt.endswith("900: 60.0, 2,000: 70.0.")
        for alt in alts
    )
    plain = page_of(tmp_path, found[:1])
    assert "Prompt length and model size" not in titles(plain)


# --- The command ---------------------------------------------------------------------------------


def test_report_command_writes_to_out(root, demo, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    command.main([str(root), "--out", str(out), "--reference", "PT"])
    assert capsys.readouterr().out.strip() == str(out)
    assert "PT minus each, k = 32" in out.read_text()
    assert "report" in main.COMMANDS


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "contains no results.json"),
        ("[{", "rewrite it with `mpt-jax paper"),
        ('[{"method": "PT"}]', "was written by another version"),
        ("[]", "contains no results"),
    ],
)
def test_report_command_unreadable_results_fails_with_path(content, words, tmp_path, capsys):
    if content is not None:
        (tmp_path / results.FILE).write_text(content)
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and str(tmp_path) in message
    assert message.count("\n") == 1 and not (tmp_path / sections.FILE).exists()


def test_report_command_bad_reference_or_metrics_fails(root, demo, capsys):
    with pytest.raises(SystemExit):
        command.main([str(root), "--reference", "PTT"])
    assert (
        "No method is called 'PTT'. Set --reference to one of 'PT', 'MPT',"
        in capsys.readouterr().err
    )
    path = root / "b" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"folder": "tr')
    with pytest.raises(SystemExit) as stop:
        command.main([str(root)])
    assert stop.value.code == 2
    assert f"Line 5 of {path} " in capsys.readouterr().err


def test_page_names_scores_of_constant_predictions(root, tmp_path):
    seeds = [{"accuracy": 50.0}, {"accuracy": 81.2, "constant_prediction": 1.0}]
    scores = {"toy_rte": results.by_name(seeds), "toy_cola": results.by_name(seeds[:1] * 2)}
    assert scores["toy_rte"] == {"accuracy": [50.0, 81.2], "constant_prediction": [0.0, 1.0]}
    assert scores["toy_cola"] == {"accuracy": [50.0, 50.0]}
    page = page_of(root, [Result("MPT", 32, scores, 1.0, 1.0, (str(root / "b"),), (0, 1))])
    assert "that of a constant answer: MPT on rte (1 of 2 seeds)." in page
    scores.pop("toy_rte")
    page = page_of(root, [Result("MPT", 32, scores, 1.0, 1.0, (str(root / "b"),), (0, 1))])
    assert "constant answer" not in page


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"folder": "train", "loss": 1.0}, "is incomplete: it lacks step"),
        ({"folder": "train", "step": 1, "loss": None}, "has"),
        ({"folder": 3, "step": 1}, "has folder = 3, but a string was expected"),
        ({"folder": "train", "step": 1.5}, "has step = 1.5, but an integer was expected"),
    ],
)
def test_run_reader_damaged_metrics_error_names_the_line(tmp_path, line, problem):
    good = {"folder": "train", "step": 1, "loss": 1.0}
    lines = "".join(json.dumps(x) + "\n" for x in (good, line))
    (tmp_path / "metrics.jsonl").write_text(lines)
    for read in (run_reader.last, run_reader.curves):
        with pytest.raises(ValueError, match=f"Line 2 of .*metrics.jsonl {problem}"):
            read(tmp_path)
    (tmp_path / "inference_eval").mkdir()
    (tmp_path / "inference_eval" / "rte-metrics.jsonl").write_text('{"accuracy": 50.0}\n')
    with pytest.raises(ValueError, match="rte-metrics.jsonl is incomplete"):
        run_reader.evaluations(tmp_path)

"""Gains by source and target in the report, against scikit-learn and SciPy."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
from scipy import stats
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics.pairwise import cosine_similarity

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.experiments.report import analysis, transfer
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from tests.fixtures import saved_artifacts
from tests.fixtures.report_folders import Reader, page_of, result, titles

TASKS = ("toy_rte", "toy_cb", "toy_wic", "toy_boolq")


def matrix(method, gains, sources, targets, scratch=50.0, folder="gone"):
    """A result of each source, which gains some points over 50 on each target."""
    found = []
    for source, row in zip(sources, gains, strict=True):
        scores = {
            target: [scratch + x, scratch + x] for target, x in zip(targets, row, strict=True)
        }
        found.append(
            result(f"{method} from {source}", start=f"toy_{source}", folder=folder, **scores)
        )
    return found


# --- Numbers -------------------------------------------------------------------------------------


def test_gains_are_relative_to_the_same_method_without_a_source():
    found = [
        result("PT", rte=[10.0, 10.0], cb=[10.0, 10.0]),
        result("UPT", rte=[40.0, 42.0], cb=[30.0, 30.0]),
        *matrix("UPT", [[1.0, 2.0], [3.0, -4.0]], ["mnli", "qqp"], ["rte", "cb"]),
        result("SPoT", start="toy_mnli", rte=[1.0, 1.0], cb=[1.0, 1.0]),
        result("MPT from mean of products", rte=[1.0, 1.0], cb=[1.0, 1.0]),
    ]
    (upt,) = transfer.of_results(found)
    assert (upt.method, upt.sources, upt.old) == ("UPT", ["toy_mnli", "toy_qqp"], found[1])
    np.testing.assert_allclose(upt.gains, [[10.0, 22.0], [12.0, 16.0]])
    (other,) = transfer.of_results([found[0], *found[2:]])
    assert other.old is found[0], "PT in place of the method that was not run without a source"
    (alone,) = transfer.of_results(found[2:4])
    assert alone.old is None
    np.testing.assert_allclose(alone.gains, [[-1.0, 3.0], [1.0, -3.0]])
    assert transfer.without_source("PT from MNLI, P=40") == "PT, P=40"


def test_absent_targets_have_no_gain():
    found = matrix("PT", [[1.0, 2.0]], ["rte"], ["rte", "cb"]) + matrix(
        "PT", [[5.0]], ["cb"], ["cb"]
    )
    (pt,) = transfer.of_results([result("PT", rte=[50.0, 50.0], cb=[50.0, 50.0]), *found])
    np.testing.assert_allclose(pt.gains, [[1.0, 2.0], [np.nan, 5.0]])
    assert transfer.ranking(pt.gains[:, 0]) == [0] and transfer.ranking(pt.gains[:, 1]) == [1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_cosines_and_groups_equal_those_of_sklearn(seed):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(3, 8))
    rows = centers[rng.integers(0, 3, 12)] + 0.7 * rng.normal(size=(12, 8))
    similar = transfer.row_cosines(rows)
    np.testing.assert_allclose(similar, cosine_similarity(rows), atol=1e-12)
    groups = transfer.grouped(similar)
    expected = AgglomerativeClustering(
        None, metric="precomputed", linkage="average", distance_threshold=1 - transfer.SIMILAR
    ).fit_predict(1 - similar)
    assert {frozenset(group) for group in groups} == {
        frozenset(np.flatnonzero(expected == label).tolist()) for label in set(expected)
    }
    assert 1 < len(groups) < 12 and [len(x) for x in groups] == sorted(map(len, groups))[::-1]


def test_cosines_of_incomplete_and_zero_rows():
    rows = np.array([[1.0, 2.0, np.nan], [2.0, 4.0, 9.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(transfer.row_cosines(rows), [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_agreement_equals_scipy_and_its_permutations():
    rng = np.random.default_rng(0)
    gains = np.round(rng.normal(size=(4, 3)), 1)
    similar = 0.3 * gains + rng.normal(size=(4, 3))
    found = transfer.agreement(gains, similar, square=False)
    rho = stats.spearmanr(gains.ravel(), similar.ravel()).statistic
    assert found.rho == pytest.approx(rho, abs=1e-12) and found.n == 12
    moved = [
        stats.spearmanr(gains.ravel(), similar[list(order)].ravel()).statistic
        for order in itertools.permutations(range(4))
    ]
    assert found.p == pytest.approx(np.mean(np.abs(moved) >= abs(rho) - 1e-9))


def test_agreement_of_a_square_matrix_leaves_out_its_diagonal(monkeypatch):
    monkeypatch.setattr(transfer, "DRAWS", 999)
    rng = np.random.default_rng(1)
    similar = rng.normal(size=(9, 9))
    gains = similar + 0.5 * rng.normal(size=(9, 9))
    np.fill_diagonal(gains, np.nan)
    np.fill_diagonal(similar, np.nan)
    apart = ~np.eye(9, dtype=bool)
    found = transfer.agreement(gains, similar, square=True)
    assert found.n == 72
    assert found.rho == pytest.approx(stats.spearmanr(gains[apart], similar[apart]).statistic)
    assert found.p == pytest.approx(1 / 1000)
    noise = transfer.agreement(np.where(apart, rng.normal(size=(9, 9)), np.nan), similar, True)
    assert noise.p > 0.01
    constant = transfer.agreement(np.ones((3, 3)), similar[:3, :3], square=False)
    assert np.isnan(constant.rho) and np.isnan(constant.p)


def test_similarities_are_mean_cosines_of_different_tasks():
    rng = np.random.default_rng(2)
    a, b, c = (rng.normal(size=(n, 6)) for n in (1, 2, 3))
    found = transfer.similarities({"a": a, "b": b}, {"b": b, "c": c})
    expected = [[cosine_similarity(a, b).mean(), cosine_similarity(a, c).mean()],
                [np.nan, cosine_similarity(b, c).mean()]]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_prompts_of_several_sites_are_compared_as_one(tmp_path):
    rng, runs = np.random.default_rng(4), Runs(("toy_rte", "toy_cb"), groups="independent")
    method = SitePrompts(PromptTuning(2), PromptTuning(3))
    tables = rng.normal(size=(2, 2, 4)), rng.normal(size=(2, 3, 6))
    params = {site: {"table": x} for site, x in zip(method.parts, tables, strict=True)}
    path = tmp_path / "run" / "artifact"
    saved_artifacts.save(path, method, params, runs)
    found = analysis.flat_prompts([artifacts.load_artifact(path)])
    expected = np.concatenate([x.reshape(2, -1) for x in tables], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    html = page_of(tmp_path, [result("UPT", folder=path.parent, rte=[1.0], cb=[1.0])])
    cosine = cosine_similarity(expected)[0, 1]
    assert f"2 tasks. Between tasks: {cosine:.2f} to {cosine:.2f}." in html


# --- The page ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """The source stage and the targets of PT: prompts of cb resemble those of mnli, the others
    those of qqp. Gains follow the similarity."""
    rng = np.random.default_rng(3)
    sources = Runs(("toy_mnli", "toy_qqp", "toy_sst2"), groups="independent")
    table = rng.normal(size=(3, 2, 4))
    near = np.stack([table[1], table[0], table[1]]) + 0.3 * rng.normal(size=(3, 2, 4))
    targets = Runs(TASKS[:3], groups="independent")
    saved_artifacts.save(
        tmp_path / "other" / "artifact", PromptTuning(2), {"table": -table}, sources
    )
    path = tmp_path / "zz" / "artifact"
    saved_artifacts.save(path, PromptTuning(2), {"table": table}, sources)
    started = {"artifact_sha256": artifacts.digest(artifacts.load_artifact(path).params)}
    for folder, record in (("pt", None), ("from", started)):
        place = tmp_path / "table" / folder / "artifact"
        given = {"started_from": record}
        saved_artifacts.save(place, PromptTuning(2), {"table": near}, targets, **given)
    flat = lambda x: x.reshape(3, -1)  # noqa: E731
    return tmp_path / "table", cosine_similarity(flat(table), flat(near))


def test_page_has_ranking_groups_and_correlation(folders):
    root, similar = folders
    gains = np.round(10 * similar, 1)
    found = [
        result("PT", folder=root / "pt", rte=[50.0, 50.0], cb=[50.0, 50.0], wic=[50.0, 50.0]),
        *matrix("PT", gains, ["mnli", "qqp", "sst2"], ["rte", "cb", "wic"], folder=root / "from"),
    ]
    html = page_of(root, found, reference="PT")
    assert "From source to target" in titles(html)
    best = gains.argmax(0)
    names = np.array(["mnli", "qqp", "sst2"])
    cells = re.findall(
        r'scope="row">(\w+)</th><td>(\w+) \+', html.split("Ranking of sources", 1)[1]
    )
    assert dict(cells[:3]) == dict(zip(("rte", "cb", "wic"), names[best], strict=True))
    assert "<td>rte, wic</td>" in html and "<td>cb</td>" in html
    assert "Cosine similarity of the gains of targets, k = 32, in 2 groups." in Reader(html).alts
    rho = stats.spearmanr(gains.ravel(), similar.ravel()).statistic
    assert f"(trained without a source) is {rho:.2f}, n = 9 pairs of different tasks, p = " in html
    assert rho > 0.9, "the artifact of the record, not the one that comes first"


def test_page_without_source_prompts_says_so(tmp_path):
    found = [
        result("PT", rte=[50.0], cb=[30.0]),
        result("PT from mnli", start="toy_mnli", rte=[60.0], cb=[20.0]),
        result("PT from qqp", start="toy_qqp", rte=[55.0], cb=[31.0]),
    ]
    html = page_of(tmp_path, found, reference="PT")
    assert "Gain and similarity of prompts, k = 32: no artifact has prompts of all sources" in html
    assert "Ranking of sources" in html


def test_methods_have_separate_maps(tmp_path):
    gains = [[1.0, 2.0], [3.0, -4.0]]
    found = [
        *matrix("CoOp", gains, ["mnli", "qqp"], ["rte", "cb"]),
        *matrix("VPT", gains, ["mnli", "qqp"], ["rte", "cb"]),
    ]
    alts = Reader(page_of(tmp_path, found)).alts
    best = "Best source: rte qqp +1.0, cb mnli +3.0."
    assert f"Gain by source and target, VPT, k = 32. {best}" in alts
    assert any(alt.startswith("Gain by source and target, CoOp, k = 32.") for alt in alts)


SQUARE = np.array(
    [[0.0, 5.0, 1.0, 4.0], [2.0, 0.0, 8.0, -3.0], [-1.0, 4.5, 0.0, 3.0], [1.0, -6.0, 6.5, 0.0]]
)
NAMES = ["rte", "cb", "wic", "boolq"]


def parts_of(html):
    """The rows of the ranking and of the groups of a page, and the texts of its figures."""
    tables = [
        html.split(f"<h3>{name}, k = 32</h3>")[1].split("</table>")[0]
        for name in ("Ranking of sources", "Groups of targets")
    ]
    rows = [
        [re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]
        for table in tables
    ]
    return *rows, [alt for alt in Reader(html).alts if "Best source" in alt or "Cosine" in alt]


@pytest.mark.parametrize("has_old", [True, False])
def test_tasks_as_their_own_source_are_only_in_the_heat_map(has_old, tmp_path):
    old = [result("PT", **{name: [50.0, 50.0] for name in NAMES})] * has_old
    found = [[*old, *matrix("PT", SQUARE + own * np.eye(4), NAMES, NAMES)] for own in (30.0, -30.0)]
    pages = [page_of(tmp_path, x) for x in found]
    ranks, groups, alts = parts_of(pages[0])
    assert (ranks, groups, alts) == parts_of(pages[1])
    apart = np.where(np.eye(4, dtype=bool), np.nan, SQUARE)
    apart = apart if has_old else apart - np.nanmean(apart, 0)
    expected = [*apart.T, np.nanmean(apart, 1)]
    for (_, *cells), gains in zip(ranks[1:], expected, strict=True):
        order = [i for i in np.argsort(-gains, kind="stable") if not np.isnan(gains[i])]
        named = [f"{NAMES[i]} {gains[i]:+.1f}" for i in order]
        assert [cell for cell in cells if cell] == named and cells[-1] == named[-1]
    best = [f"{task} {cells[1]}" for task, cells in zip(NAMES, ranks[1:], strict=False)]
    assert alts[0] == f"Gain by source and target, k = 32. Best source: {', '.join(best)}."
    assert len(groups) == 3 and {frozenset(x[1].split(", ")) for x in groups[1:]} == (
        clusters(apart.T)
    )
    one, other = (transfer.of_results(x)[0].gains for x in found)
    np.testing.assert_allclose(one - other, 60 * np.eye(4), atol=1e-9)
    for html in pages:
        assert "Tasks that are their own source do not enter means, rankings or groups." in html


def clusters(rows):
    """The groups of incomplete rows by scikit-learn, over the entries that both have."""
    known = [[np.isfinite(x) & np.isfinite(y) for y in rows] for x in rows]
    similar = [
        [cosine_similarity([x[both]], [y[both]])[0, 0] for y, both in zip(rows, of, strict=True)]
        for x, of in zip(rows, known, strict=True)
    ]
    labels = AgglomerativeClustering(
        None, metric="precomputed", linkage="average", distance_threshold=1 - transfer.SIMILAR
    ).fit_predict(1 - np.array(similar))
    return {frozenset(NAMES[i] for i in np.flatnonzero(labels == x)) for x in set(labels)}


def test_target_whose_only_source_is_itself_has_no_ranking(tmp_path):
    found = matrix("PT", [[1.0, 2.0]], ["rte"], ["rte", "cb"]) + matrix(
        "PT", [[5.0]], ["cb"], ["cb"]
    )
    (pt,) = transfer.of_results(found)
    np.testing.assert_array_equal(pt.gains, [[np.nan, 0.0], [np.nan, 3.0]])
    ranks, _, alts = parts_of(page_of(tmp_path, found))
    assert ranks[1:] == [
        ["rte", "", ""],
        ["cb", "rte +0.0", ""],
        ["mean over targets", "rte +0.0", ""],
    ]
    assert alts[0].endswith("Best source: cb rte +0.0.")


# --- Zero-shot -----------------------------------------------------------------------------------


def test_zero_shot_pairs_with_every_seed(tmp_path):
    found = [
        result("zero-shot", None, rte=[50.0], cb=[30.0]),
        result("CoOp", 4, rte=[40.0, 44.0, 48.0], cb=[40.0, 40.0, 46.0]),
        result("CoOp", 16, rte=[60.0], cb=[61.0]),
    ]
    html = page_of(tmp_path, found, reference="CoOp")
    assert "Zero-shot and tuned" in titles(html)
    few = html.split("<h3>Gain over zero-shot, k = 4</h3>")[1].split("</table>")[0]
    low, high = stats.t.interval(0.95, 2, -6.0, stats.sem([40, 44, 48]))
    mean = stats.t.interval(0.95, 2, 3.0, stats.sem([40, 42, 47]))
    assert re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", few) == [
        *("", "rte", "cb", "mean", "tasks below"),
        *("zero-shot", "50.0", "30.0", "40.0", ""),
        *("CoOp", f"-6.0 ({low:+.1f} .. {high:+.1f})", "+12.0 (+3.4 .. +20.6)"),
        *(f"+3.0 ({mean[0]:+.1f} .. {mean[1]:+.1f})", "1 of 2"),
    ]
    assert "<td>+10.0</td><td>+31.0</td><td>+20.5</td><td>0 of 2</td>" in html
    assert "Gain over zero-shot, k = 16, of CoOp; the numbers are in a table." in Reader(html).alts


def test_results_of_a_map_have_no_panel_of_gains_over_zero_shot(tmp_path):
    found = [
        result("zero-shot", rte=[40.0], cb=[40.0]),
        *matrix("VPT", [[1.0, 2.0], [3.0, -4.0]], ["rte", "cb"], ["rte", "cb"]),
    ]
    html = page_of(tmp_path, found)
    assert "<td>+11.0 (+11.0 .. +11.0)</td>" in html
    assert not any(alt.startswith("Gain over zero-shot") for alt in Reader(html).alts)


def test_zero_shot_of_another_backbone_is_not_compared(tmp_path):
    found = [
        result("zero-shot", None, size=900, rte=[50.0]),
        result("zero-shot", None, size=2000, rte=[70.0]),
        result("CoOp", 4, size=2000, rte=[71.0]),
        result("VPT", 4, size=5000, rte=[71.0]),
    ]
    unknown = dataclasses.replace(found[0], backbone_parameters=0, parameters=0.0)
    assert "<td>+21.0</td>" in page_of(tmp_path, [unknown, found[2]])
    html = page_of(tmp_path, found)
    assert "<h3>Gain over zero-shot, 2,000, k = 4</h3>" in html
    assert "<td>+1.0</td>" in html and "of VPT" not in html
    assert "Zero-shot and tuned" not in titles(page_of(tmp_path, found[2:]))


def test_zero_shot_that_does_not_record_which_backbone_is_noted(tmp_path):
    old = result("zero-shot", None, rte=[50.0])
    unknown = dataclasses.replace(old, backbone_parameters=0, parameters=0.0)
    found = [result("CoOp", 4, size=2000, rte=[71.0]), result("VPT", 4, size=5000, rte=[73.0])]
    html = page_of(tmp_path, [unknown, *found])
    for method in ("CoOp", "VPT"):
        note = f"Gain of {method} over zero-shot, k = 4: the results are of several backbones, and "
        assert f"{note}the zero-shot result does not record its own." in html
    assert "<h3>Gain over zero-shot" not in html


def test_zero_shot_backbones_of_one_size_are_told_apart_by_name(tmp_path):
    """A result without a name is compared by its size."""
    small, large = (
        dataclasses.replace(result("zero-shot", shots, rte=[score]), backbone=name)
        for shots, score, name in ((None, 50.0, "a"), (1, 60.0, "b"))
    )
    found = [
        dataclasses.replace(result(method, 4, rte=[71.0]), backbone=name)
        for method, name in (("CoOp", "a"), ("VPT", "b"), ("UPT", "c"))
    ]
    html = page_of(tmp_path, [small, large, *found])
    assert "<td>+21.0</td>" in html and "<td>+11.0</td>" in html
    assert "of CoOp, VPT; the numbers" in html and "Gain of UPT over zero-shot" not in html
    unnamed = dataclasses.replace(small, backbone="")
    assert "Gain of CoOp over zero-shot, k = 4: the results are of several backbones" in page_of(
        tmp_path, [unnamed, *found]
    )
    assert "<td>+21.0</td>" in page_of(tmp_path, [unnamed, found[0]])


def test_zero_shot_without_common_tasks_is_noted(tmp_path):
    found = [
        result("zero-shot", None, rte=[50.0, 50.0], cb=[1.0, 1.0]),
        result("CoOp", 4, rte=[71.0, 72.0]),
    ]
    seeds = [found[0], dataclasses.replace(found[1], seeds=(7, 8))]
    html = page_of(tmp_path, seeds)
    assert "Gain of CoOp over zero-shot, k = 4: the two have no task and seed in common." in html

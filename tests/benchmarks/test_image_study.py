"""The declared comparisons of the study on images, on made-up results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import image_study
from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import image_suites, tables
from mpt_jax.experiments.paper.image_variants import source_row
from mpt_jax.experiments.results import Result
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from tests.fixtures import saved_artifacts

SEEDS, LENGTH, WIDTH = 4, 2, 3
NAMES = ("mvlpt", "mvlpt_parts", "clip_mpt", "mvlpt_transfer", "multilane")


def made_up(rng, table, variant, shots):
    tasks = table.tasks
    metric = "last" if table.of_sequences else "accuracy"
    scores = {task: {metric: rng.uniform(20, 80, SEEDS).tolist()} for task in tasks}
    return Result(variant.name, shots, scores, 1.0, 1.0, (), tuple(range(SEEDS)))


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        table = tables.get_table(name).on(image_suites.TOY_IMAGES)
        rows = [made_up(rng, table, x, k) for k in table.shots for x in table.variants]
        (tmp_path / name).mkdir()
        results.save(tmp_path / name, rows, {})
    source = tmp_path / f"mvlpt_source_upt_s1-{3 * SEEDS}"
    source.mkdir()
    losses = {
        f"loss/{source_row(task, draw)}": float(1 + draw % 3)  # the third of each seed is lowest
        for task in image_suites.TOY_SOURCES
        for draw in range(1, 3 * SEEDS + 1)
    }
    lines = [{"folder": "train", "step": 0}, {"folder": "train", "step": 100, "loss": 1, **losses}]
    (source / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    names = [source_row(x, d) for x in image_suites.TOY_TRANSFER for d in range(1, SEEDS + 1)]
    table = rng.normal(size=(len(names), LENGTH, WIDTH)).astype(np.float32)
    saved_artifacts.save(
        tmp_path / f"single_coop_mvlpt_transfer_s1-{SEEDS}" / "artifact",
        SitePrompts(PromptTuning(LENGTH)),
        {"text_context": {"table": table}},
        Runs([x.split("_k20")[0] for x in names], names, "independent"),
    )
    return tmp_path


def run(root, monkeypatch, capsys):
    out = root / "out.json"
    monkeypatch.setattr("sys.argv", ["image_study", "--root", str(root), "--out", str(out)])
    image_study.main()
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = json.loads(out.read_text())["comparisons"]
    assert len(shown) == len(rows)
    return {row["what"]: row for row in rows}


def test_comparisons_are_paired_by_seed_and_corrected_together(root, monkeypatch, capsys):
    rows = run(root, monkeypatch, capsys)
    assert len(rows) == len(image_study.DECLARED) + 2
    found = {(x.method, x.shots): x for x in results.load(root / "mvlpt")}
    new, old = (np.array(found[name, 5].means()) for name in ("MVPT", "VPT"))
    row = rows["MVPT minus VPT, k = 5"]
    np.testing.assert_allclose(row["values"], new - old)
    assert row["p"] == pytest.approx(stats.ttest_1samp(new - old, 0).pvalue)
    smallest = min(rows.values(), key=lambda x: x["p"])
    assert smallest["holm"] == pytest.approx(min(1.0, len(rows) * smallest["p"]))


def test_best_draw_has_the_lowest_training_loss(root, monkeypatch, capsys):
    rows = run(root, monkeypatch, capsys)
    found = {(x.method, x.shots): x for x in results.load(root / "mvlpt_parts")}
    best = np.array(found["MUPT from draw 3", 5].means())
    (row,) = [x for name, x in rows.items() if "best of three" in name]
    np.testing.assert_allclose(row["values"], np.array(found["MUPT", 5].means()) - best)


def test_transfer_correlates_gains_with_cosines_of_each_seed(root, monkeypatch, capsys):
    rows = run(root, monkeypatch, capsys)
    (row,) = [x for name, x in rows.items() if "Spearman" in name]
    assert len(row["values"]) == SEEDS and all(-1 <= x <= 1 for x in row["values"])
    assert len(set(row["values"])) == SEEDS
    # With gains equal to the cosines, the correlation is 1.
    artifact = artifacts.load_artifact(root / f"single_coop_mvlpt_transfer_s1-{SEEDS}/artifact")
    table = np.asarray(artifact.params["text_context"]["table"]).reshape(-1, LENGTH * WIDTH)
    unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
    path = root / "mvlpt_transfer" / results.FILE
    loaded = json.loads(path.read_text())
    tasks = image_suites.TOY_TRANSFER
    of = lambda task, seed: unit[tasks.index(task) * SEEDS + seed]  # noqa: E731
    for result in loaded:
        source = result["method"].removeprefix("CoOp from ")
        for target in tasks:
            gains = [
                0.0 if source == "CoOp" else float(of(source, s) @ of(target, s))
                for s in range(SEEDS)
            ]
            result["scores"][target]["accuracy"] = gains
    path.write_text(json.dumps(loaded))
    rows = run(root, monkeypatch, capsys)
    (row,) = [x for name, x in rows.items() if "Spearman" in name]
    np.testing.assert_allclose(row["values"], 1.0, atol=1e-6)


def test_missing_row_and_missing_source_name_the_table(root, monkeypatch, capsys):
    path = root / "clip_mpt" / results.FILE
    kept = [x for x in json.loads(path.read_text()) if x["method"] != "shared prompt"]
    path.write_text(json.dumps(kept))
    with pytest.raises(SystemExit):
        run(root, monkeypatch, capsys)
    assert "The table clip_mpt has no results of 'shared prompt'" in capsys.readouterr().err

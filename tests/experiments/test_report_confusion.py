"""Confusion matrices of the report, against scikit-learn."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from sklearn import metrics

from mpt_jax.core.runs import Runs
from mpt_jax.experiments.report import __main__ as command
from mpt_jax.experiments.report import confusion
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from tests.fixtures import saved_artifacts
from tests.fixtures.report_folders import Reader, titles, write_lines

RUNS = Runs(("pets", "pets", "tags"), ("pets_s0", "pets_s1", "tags"), "independent")
PETS = ["cat", "dog", "small bird"]


def images(**names):
    """The record of image tasks in an artifact; tasks of names in a tuple are multi-label."""
    tasks = {
        task: {"names": list(x), "templates": ["a {}"], "multi_label": isinstance(x, tuple)}
        for task, x in names.items()
    }
    return {"transform": {"size": 16, "mode": "crop"}, "context_position": "end", "tasks": tasks}


def write_predictions(folder, run, step, targets, scores):
    """Writes the predictions of an evaluation as SeqIO does, with scores or with names."""
    kind = "score" if isinstance(scores[0], list) else "prediction"
    found = [{"input": {}, "target": t, kind: s} for t, s in zip(targets, scores, strict=True)]
    write_lines(folder / "inference_eval" / f"{run}-{step:06}.jsonl", found)


def scores_of(predicted, classes):
    """Log probabilities whose largest value is that of a class."""
    return [[-0.1 if i == p else -5.0 for i in range(classes)] + [-np.inf] for p in predicted]


@pytest.fixture
def model_dir(tmp_path):
    """A job of three runs, one of them multi-label."""
    folder, rng = tmp_path / "job", np.random.default_rng(0)
    tasks = images(pets=PETS, tags=("sky", "sea"))
    params = {"image_tokens": {"table": rng.normal(size=(3, 2, 4))}}
    method = SitePrompts(image_tokens=PromptTuning(2))
    given = {"vocabulary_sha256": None, "images": tasks}
    saved_artifacts.save(folder / "artifact", method, params, RUNS, **given)
    write_lines(folder / "run.jsonl", [{"image_transform_sha256": "0" * 64}])
    write_predictions(folder, "pets_s0", 2, [0, 1], scores_of([0, 1], 3))
    targets, predicted = rng.integers(0, 3, (2, 60)).tolist()
    write_predictions(folder, "pets_s0", 1000000, targets, scores_of(predicted, 3))
    write_predictions(folder, "pets_s1", 4, [0, 2, 2], ["cat", "dog", "small bird"])
    write_predictions(folder, "tags", 4, [[0, 1]], [[-0.1, -0.1]])
    return folder, targets, predicted


def test_counts_equal_those_of_sklearn(model_dir):
    folder, targets, predicted = model_dir
    found = confusion.of_run(folder, "pets_s0", PETS)
    assert found.step == 1000000, "the last step, though its name sorts first"
    expected = metrics.confusion_matrix(targets, predicted)
    counts = np.array([[found.counts.get((i, j), 0) for j in range(3)] for i in range(3)])
    np.testing.assert_array_equal(counts, expected)
    shares = confusion.matrix(found, [0, 1, 2])
    normalized = metrics.confusion_matrix(targets, predicted, normalize="true")
    np.testing.assert_allclose(np.nan_to_num(shares[:, :3]), 100 * normalized, atol=1e-9)
    assert np.isnan(shares[:, 3]).all()


def test_largest_tasks_show_their_most_confused_classes():
    rng = np.random.default_rng(1)
    targets = np.repeat(np.arange(50), 20)
    predicted = np.where(rng.random(1000) < 0.01 * targets, rng.integers(0, 50, 1000), targets)
    names = [f"class {i}" for i in range(50)]
    pairs, numbers = np.unique(np.stack([targets, predicted]), axis=1, return_counts=True)
    counts = {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, numbers, strict=True)}
    found = confusion.Confusion("run", 5, names, counts)
    expected = metrics.confusion_matrix(targets, predicted)
    wrong = expected - np.diag(np.diag(expected))
    errors = wrong.sum(0) + wrong.sum(1)
    shown = found.most_confused(30)
    assert len(shown) == 30 and shown == sorted(shown)
    assert errors[shown].min() >= max(e for i, e in enumerate(errors) if i not in shown)
    shares = np.nan_to_num(confusion.matrix(found, shown)) / 100 * 20
    np.testing.assert_allclose(shares[:, :30], expected[np.ix_(shown, shown)], atol=1e-9)
    np.testing.assert_allclose(shares.sum(1), 20)
    page = "".join(confusion.blocks(found))
    assert "The 30 of 50 classes with the most errors" in page and confusion.OTHER in page
    a, b = np.unravel_index(np.argmax(wrong), wrong.shape)
    assert f'<th scope="row">class {a}</th><td>class {b}</td><td>{wrong[a, b]}</td>' in page


def test_tasks_without_errors_fill_up_with_other_classes():
    found = confusion.Confusion("run", 5, [str(i) for i in range(6)], {(5, 4): 1, (0, 0): 3})
    assert found.most_confused(4) == [0, 1, 4, 5]
    assert found.images == 4 and found.errors() == [(5, 4)]


def test_page_of_a_run_has_a_matrix_for_each_single_label_run(model_dir):
    folder, targets, predicted = model_dir
    command.main([str(folder)])
    html = (folder / "report.html").read_text()
    assert "Confusion matrices" in titles(html)
    alts = [alt for alt in Reader(html).alts if alt.startswith("Confusion")]
    correct = int(metrics.accuracy_score(targets, predicted, normalize=False))
    start = f"Confusion matrix of pets_s0, step 1,000,000: {correct} of 60 images are correct."
    assert alts[0].startswith(start) and len(alts) == 2
    assert alts[1].endswith("2 of 3 images are correct. Most frequent errors: small bird as dog 1.")
    assert "tags" not in "".join(alts)
    drawing = re.search(r"<svg[^>]*pets_s1.*?</svg>", html, re.S).group()
    assert re.findall(r">([\d]+)<", drawing) == ["100", "50", "50"]
    assert ">dog (0)<" in drawing and ">small bird (2)<" in drawing


def test_page_says_why_a_matrix_is_missing(model_dir, tmp_path):
    folder, *_ = model_dir
    (folder / "inference_eval" / "pets_s1-000004.jsonl").unlink()
    write_predictions(folder, "pets_s0", 2000000, [0], [[float("nan"), 1.0, 2.0]])
    command.main([str(folder), "--out", str(tmp_path / "a.html")])
    html = (tmp_path / "a.html").read_text()
    assert "Confusion matrices" not in titles(html)
    assert "pets_s1 (no predictions are stored, see JSON_WRITE_N_RESULTS)" in html
    assert re.search(r"pets_s0 \(a score in .*2000000.jsonl is NaN\)", html)
    (folder / "artifact").rename(tmp_path / "gone")
    command.main([str(folder), "--out", str(tmp_path / "b.html")])
    assert "has no artifact, which names the classes" in (tmp_path / "b.html").read_text()


def test_jobs_of_texts_have_no_matrix(tmp_path):
    write_lines(tmp_path / "run.jsonl", [{"seed": 1}])
    notes = []
    assert confusion.of_model_dir(tmp_path, notes) == [] and notes == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"target": 3, "score": [0.0, 1.0, 2.0]}, "has the target 3, but ids of 3 classes"),
        ({"target": -1, "score": [0.0]}, "has target = -1, but an integer >= 0 was expected"),
        ({"target": 1}, "has neither scores nor one of the 3 class names"),
        ({"target": 1, "prediction": "cow"}, "has neither scores nor one of the 3 class names"),
        ({"target": 1, "score": "x"}, "has score = "),
        ({"score": [0.0]}, "is incomplete: it lacks target"),
    ],
)
def test_damaged_predictions_name_the_line(tmp_path, line, problem):
    folder = tmp_path / "inference_eval"
    folder.mkdir()
    good = {"target": 1, "score": [0.0, 1.0, 2.0]}
    (folder / "pets-000002.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=f"Line 2 of .*pets-000002.jsonl {re.escape(problem)}"):
        confusion.of_run(tmp_path, "pets", PETS)

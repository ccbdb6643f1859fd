"""Requests that bring class names, compared with a model that was built with these classes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpt_jax.serving.predict import image_requests, open_classes
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import image_serving
from tests.fixtures.image_files import noise
from tests.fixtures.image_serving import PETS, SHAPES, TAGS, ask, request, save

NAMES = ["horse", "grey wolf", "cat", "ant"]
PIXELS = noise(16, 16, 3)


def load(clip, saved):
    return ImageServer.load([saved.folder], str(clip), batch_size=2)


@pytest.mark.parametrize("kind", ["coop", "vpt", "both", "upt"])
def test_classes_of_a_request_score_as_a_model_with_these_classes(kind, clip, tmp_path):
    """In the context of each task; a multi-label task keeps its probability for each class."""
    saved = save(tmp_path / "a", clip, kind)
    changed = [dataclasses.replace(task, names=tuple(NAMES)) for task in (PETS, SHAPES, TAGS)]
    other = save(tmp_path / "b", clip, kind, tasks=tuple(changed))
    server = load(clip, saved)
    tasks = ("pets", "shapes", "tags")
    answers = ask(server, [request(x, PIXELS, classes=NAMES) for x in tasks], "score")
    found = []
    for task, answer in zip(tasks, answers, strict=True):
        expected = other.scores(task, PIXELS)
        assert list(answer["scores"]) == NAMES
        np.testing.assert_allclose(
            list(answer["scores"].values()), [expected[x] for x in NAMES], 1e-5, 1e-5
        )
        found.append(tuple(answer["scores"].values()))
    if kind in ("coop", "both"):  # one context for each task
        assert len(set(found)) == 3


def test_classes_of_the_task_score_as_the_task(clip, tmp_path):
    saved = save(tmp_path / "a", clip)
    own, brought, fewer = ask(
        load(clip, saved),
        [
            request("pets", PIXELS),
            request("pets", PIXELS, classes=list(PETS.names)),
            request("pets", PIXELS, classes=list(PETS.names[:2])),
        ],
        "score",
    )
    assert own["scores"] == pytest.approx(brought["scores"], abs=1e-5)
    two = np.array([own["scores"][name] for name in PETS.names[:2]])
    np.testing.assert_allclose(
        list(fewer["scores"].values()), two - np.log(np.exp(two).sum()), 1e-5, 1e-5
    )


def test_features_of_a_list_are_kept(clip, tmp_path, monkeypatch):
    saved = save(tmp_path / "a", clip)
    server = load(clip, saved)
    encoded = []
    original = open_classes.texts_of
    monkeypatch.setattr(
        open_classes, "texts_of", lambda *args: encoded.append(args) or original(*args)
    )
    ask(server, [request("pets", PIXELS, classes=NAMES)] * 3)
    assert len(encoded) == 1
    ask(server, [request("shapes", PIXELS, classes=NAMES)])
    assert len(encoded) == 2, "another context"


@pytest.mark.parametrize("kind", ["coop", "vpt"])
def test_lists_of_any_size_run_a_program_for_each_length(kind, clip, tmp_path):
    """More texts than a chunk, and texts of several lengths; features as if encoded at once."""
    many = tuple(f"animal of kind {i}" for i in range(open_classes.CHUNK + 3))
    lists = [NAMES, many, ["cat", "a wolf of a wolf"]]
    saved = save(tmp_path / "a", clip, kind)
    server = load(clip, saved)
    for names in lists:
        changed = [dataclasses.replace(task, names=tuple(names)) for task in (PETS, SHAPES)]
        other = save(tmp_path / f"{len(names)}", clip, kind, tasks=(*changed, TAGS))
        tasks = [request(task, PIXELS, classes=list(names)) for task in ("pets", "shapes")]
        for task, answer in zip(("pets", "shapes"), ask(server, tasks, "score"), strict=True):
            assert answer["scores"] == pytest.approx(other.scores(task, PIXELS), abs=1e-5)
    more = [request("pets", PIXELS, classes=[*NAMES, f"bird {i}"]) for i in range(3)]
    ask(server, more)
    assert server._open._encode._cache_size() <= 1 + len(open_classes.LENGTHS)


def test_too_many_texts_of_a_request_are_an_error(clip, tmp_path, monkeypatch):
    templates = tuple(f"{i} {{}}" for i in range(80))
    tasks = (dataclasses.replace(PETS, templates=templates), SHAPES, TAGS)
    names = [f"class {i}" for i in range(1000)]
    vpt = load(clip, save(tmp_path / "vpt", clip, "vpt", tasks=tasks))
    monkeypatch.setattr(open_classes, "texts_of", lambda *_: pytest.fail("made texts"))
    wrong, right = ask(vpt, [request("pets", PIXELS, classes=names), request("pets", PIXELS)])
    assert wrong["error"] == (
        "The request has 1,000 class names, which make 80,000 texts with the 80 templates of the "
        "task, and the limit is 2,048. Send at most 25 names at a time."
    )
    assert right["prediction"] in PETS.names


@pytest.mark.parametrize(("kind", "fits"), [("coop", True), ("vpt", False)])
def test_templates_count_only_without_a_context(kind, fits, clip, tmp_path, monkeypatch):
    server = load(clip, save(tmp_path / "a", clip, kind))
    monkeypatch.setattr(open_classes, "MOST_TEXTS", 2 * len(NAMES) - 1)
    (answer,) = ask(server, [request("pets", PIXELS, classes=NAMES)])
    assert ("prediction" in answer) == fits and ("error" in answer) != fits


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat"], "Write a list of 2 to 1,000 names"),
        ([], "Write a list of 2 to 1,000 names"),
        ("cat", "classes is cat. Write a list"),
        (["cat"] * 1001, "Write a list of 2 to 1,000 names"),
        (["cat", 3], "The class name 3 is not a text"),
        (["cat", " "], "is not a text of 1 to 250 characters"),
        (["cat", "x" * 251], "is not a text of 1 to 250 characters"),
        (["cat", "cat"], "cat"),
        (["cat", "long " * 40], "positions"),
    ],
)
def test_wrong_classes_are_an_error_of_their_line(classes, message, clip, tmp_path):
    server = load(clip, save(tmp_path / "a", clip))
    wrong, right = ask(server, [request("pets", PIXELS, classes=classes), request("pets", PIXELS)])
    assert message in wrong["error"] and "prediction" not in wrong
    assert right["prediction"] in PETS.names


@pytest.mark.parametrize("kind", ["contexts of classes", "cocoop"])
def test_prompts_that_do_not_fit_other_classes_refuse(kind, clip, tmp_path):
    server = load(clip, save(tmp_path / "a", clip, kind))
    (answer,) = ask(server, [request("pets", PIXELS, classes=NAMES)])
    assert "The field classes does not work with these prompts" in answer["error"]
    assert "classes" in image_requests.FIELDS and image_serving.METHODS[kind]

"""Answers of lanes, for one task and for all classes seen, compared with the logits of the training
model; artifacts that cannot be served."""

from __future__ import annotations

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import image_serving, lane_serving, tiny_lanes
from tests.fixtures.image_files import encoded, noise
from tests.fixtures.lane_serving import FIRST, GROUPS, PETS, SECOND, TASKS, save

PIXELS = [noise(16, 16, seed) for seed in range(6)]
NAMES = tuple(task.task for task in TASKS)


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    return save(tmp_path_factory.mktemp("lanes") / "a", clip)


@pytest.fixture(scope="module")
def server(clip, saved):
    return load(clip, saved.folder)


def load(backbone, *prompts, **settings):
    return ImageServer.load(list(map(str, prompts)), str(backbone), **{"batch_size": 4, **settings})


def request(pixels, **fields):
    content = base64.b64encode(encoded(pixels, "PNG")).decode()
    return {"image_base64": content, **fields}


def ask(server, requests, mode="score"):
    reader = server.reader(mode)
    lines = [json.dumps(request).encode() for request in requests]
    return server.answer([reader.read(line, i) for i, line in enumerate(lines, start=1)])


def log_probabilities(logits, multi_label):
    """The log sigmoids, or the log softmax, of logits in float64."""
    if multi_label:
        return -np.log1p(np.exp(-logits))
    return logits - np.log(np.exp(logits).sum())


def check(answer, names, logits, multi_label):
    expected = log_probabilities(logits, multi_label)
    assert list(answer["scores"]) == list(names)
    np.testing.assert_allclose(list(answer["scores"].values()), expected, 1e-5, 1e-5)
    assert answer["score"] == max(answer["scores"].values())
    above = [name for name, x in zip(names, expected, strict=True) if x > np.log(0.5)]
    assert answer["prediction"] == (above if multi_label else names[int(np.argmax(expected))])


# --- Answers -------------------------------------------------------------------------------------

METHODS = {
    "lanes": {},
    "first layer's summaries": {"method": {"drop_and_replace": False}},
    "merged tokens": {"method": {"selectors": 0, "merged_tokens": 5}},
    "factors": {"method": {"lane": MPT(11, 2, Uniform(0.5))}},
    "shared": {"method": {"lane": SharedPrompt(11, Uniform(0.5))}},
    "head": {"head": {"normalize": False, "temperature": 3.0}},
}


QUICK = ("lanes", "head")


@pytest.mark.parametrize(
    "kind", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in METHODS]
)
def test_server_equals_the_training_model(kind, clip, tmp_path):
    """Of each task, in batches of four with requests about sequences between them."""
    given = dict(METHODS[kind])
    if "method" in given:
        given["method"] = tiny_lanes.method(**given["method"])
    saved = save(tmp_path / "a", clip, **given)
    server = load(clip, saved.folder)
    assert server.names == NAMES
    requests = [request(x, task=NAMES[i % 4]) for i, x in enumerate(PIXELS)]
    requests.insert(1, request(PIXELS[0], sequence="tags_1"))
    answers = ask(server, requests)
    assert [answer["line"] for answer in answers] == list(range(1, 8))
    del answers[1]
    for i, (answer, pixels) in enumerate(zip(answers, PIXELS, strict=True)):
        task = TASKS[i % 4]
        check(answer, task.names, saved.logits(task.task, pixels), task.multi_label)


def seen_logits(saved, group, pixels):
    """The logits of all classes of a group, each lane's from a separate call."""
    own = [name for name, number in zip(NAMES, GROUPS, strict=True) if number == group]
    return np.concatenate([saved.logits(name, pixels) for name in own])


def test_sequence_has_the_classes_of_all_lanes(saved, server):
    tags = [*FIRST.names, *SECOND.names]
    pets = ["pets_1/cat", "dog", "owl", "crow", "wren", "pets_2/cat"]  # each cat from its lane
    requests = [
        request(PIXELS[0], sequence="tags_1", id="x"),
        request(PIXELS[0], sequence="pets_2"),
        request(PIXELS[1], sequence="tags_2"),
    ]
    first, second, third = ask(server, requests)
    assert first.pop("id") == "x"
    check(first, tags, seen_logits(saved, 0, PIXELS[0]), True)
    check(second, pets, seen_logits(saved, 1, PIXELS[0]), False)
    check(third, tags, seen_logits(saved, 0, PIXELS[1]), True)
    assert first["scores"] != pytest.approx(third["scores"], abs=1e-3)
    # Any lane of a sequence names it, and predictions are those of mode 'score'.
    (other,) = ask(server, [request(PIXELS[0], sequence="pets_1")], "predict")
    assert other == {"line": 1, **{name: second[name] for name in ("prediction", "score")}}


def test_one_lane_as_sequence_equals_the_task(clip, tmp_path):
    saved = save(tmp_path / "a", clip, tasks=(PETS,), groups=(0,))
    one, other = ask(
        load(clip, saved.folder),
        [request(PIXELS[0], task="pets_1"), request(PIXELS[0], sequence="pets_1")],
    )
    assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


def test_server_on_a_plain_vit(tmp_path):
    vit = lane_serving.write_vit(tmp_path / "vit")
    saved = save(tmp_path / "a", vit)
    server = load(vit, saved.folder)
    task, seen = ask(
        server, [request(PIXELS[0], task="tags_2"), request(PIXELS[0], sequence="tags_2")]
    )
    check(task, SECOND.names, saved.logits("tags_2", PIXELS[0]), True)
    check(seen, (*FIRST.names, *SECOND.names), seen_logits(saved, 0, PIXELS[0]), True)
    assert set(server.params) == {"image_encoder", "prompt"}


def test_artifacts_together_answer_as_alone_and_stay_separate_sequences(clip, saved, tmp_path):
    """Heads of another size, in one batch; a renamed artifact."""
    second = save(tmp_path / "b", clip, tasks=(PETS, SECOND), groups=(0, 1), seed=3)
    server = load(clip, saved.folder, f"new={second.folder}")
    assert server.names == (*NAMES, "new/pets_1", "new/tags_2")
    asked = [
        request(PIXELS[0], **fields)
        for fields in (
            {"task": "pets_1"},
            {"task": "new/pets_1"},
            {"sequence": "new/tags_2"},
            {"sequence": "tags_2"},
        )
    ]
    first, new, alone, seen = ask(server, asked)
    check(first, PETS.names, saved.logits("pets_1", PIXELS[0]), False)
    check(new, PETS.names, second.logits("pets_1", PIXELS[0]), False)
    check(alone, SECOND.names, second.logits("tags_2", PIXELS[0]), True)
    check(seen, (*FIRST.names, *SECOND.names), seen_logits(saved, 0, PIXELS[0]), True)


def test_sequence_of_mixed_tasks_fails_its_line(clip, tmp_path):
    saved = save(tmp_path / "a", clip, tasks=(FIRST, PETS), groups=(0, 0))
    fails, task = ask(
        load(clip, saved.folder),
        [request(PIXELS[0], sequence="tags_1"), request(PIXELS[0], task="pets_1")],
    )
    assert set(fails) == {"line", "error"}
    assert fails["error"].startswith("The tasks tags_1, pets_1 have one label per image or several")
    check(task, PETS.names, saved.logits("pets_1", PIXELS[0]), False)


def test_requests_that_name_no_lane_or_two_fail(server):
    for fields, says in (
        ({"sequence": "tags"}, "Unknown sequence 'tags'. Did you mean 'tags_2' or 'tags_1'?"),
        ({"sequence": 3}, "sequence must be a non-empty string, got 3."),
        ({"task": "tags_1", "sequence": "tags_1"}, "either task, .* or sequence, .* Omit one"),
        ({}, "The field task is missing."),
    ):
        (answer,) = ask(server, [request(PIXELS[0], **fields)])
        assert re.search(says, answer["error"]), answer


def test_sequence_without_lanes_fails(clip, tmp_path):
    server = load(clip, image_serving.save(tmp_path / "coop", clip).folder)
    (answer,) = ask(server, [request(PIXELS[0], sequence="pets")])
    assert answer["error"].startswith("The field sequence needs prompts with lanes (MULTI-LANE)")


def test_score_that_is_not_finite_fails_its_line(clip, saved):
    server = load(clip, saved.folder)
    head = dict(server.params["prompt"]["head"])
    head["bias"] = head["bias"].at[1].set(np.nan)
    server.params = {**server.params, "prompt": {**server.params["prompt"], "head": head}}
    seen, own = ask(
        server, [request(PIXELS[0], sequence="tags_1"), request(PIXELS[0], task="tags_1")]
    )
    assert "NaN or infinite" in seen["error"] and "error" not in own


def test_one_program_for_tasks_and_one_for_sequences(server):
    for count in (1, 5):
        for field in ("task", "sequence"):
            ask(server, [request(PIXELS[i], **{field: "pets_1"}) for i in range(count)])
    assert server._score._cache_size() == server._score_seen._cache_size() == 1


# --- Artifacts that cannot be served -------------------------------------------------------------

SHORTER = tiny_lanes.method(selectors=2)
KEPT = tiny_lanes.method(drop_and_replace=False)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": SHORTER}, "their lanes differ: 11 rows with 3 selectors, .* in .*a; 10 rows"),
        ({"method": KEPT}, "lanes differ: .* and new summaries .*the first layer's summaries"),
        ({"head": {"temperature": 2.0}}, "their head differs: .*1.0.* in .*a; .*2.0"),
        ({"transform": image_serving.Transform(mode="squash")}, "image transform differs"),
        ({"tasks": (dataclasses.replace(PETS, names=("cat", "cow")),)}, "other classes"),
    ],
)
def test_load_artifacts_that_disagree_fail(fields, says, clip, saved, tmp_path):
    other = save(tmp_path / "b", clip, **{"tasks": (PETS,), "groups": (0,), **fields})
    with pytest.raises(ValueError, match=says) as raised:
        load(clip, saved.folder, f"other={other.folder}")
    assert str(raised.value).endswith(".")


def test_load_lanes_beside_prompts_fail(clip, saved, tmp_path):
    coop = image_serving.save(tmp_path / "coop", clip)
    says = f"{saved.folder} have lanes and heads, but {coop.folder} have prompts of a CLIP"
    with pytest.raises(ValueError, match=says):
        load(clip, saved.folder, coop.folder)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"head": None}, "do not record how their heads read features .images.head.. Repeat"),
        ({"head": {"normalize": True, "temperature": 0}}, "temperature"),
        ({"head": {"normalize": True, "temperature": 1e999}}, "temperature is not finite"),
        ({"head": {"normalize": "yes", "temperature": 1}}, "normalize"),
        ({"tasks": {}}, "records no classes of its task 'pets_1'"),
    ],
    ids=str,
)
def test_load_damaged_inputs_fail(fields, says, clip, tmp_path):
    saved = save(tmp_path / "a", clip, tasks=(PETS,), groups=(0,), images=fields)
    with pytest.raises(ValueError, match=says):
        load(clip, saved.folder)


def test_load_more_classes_than_columns_fails(clip, tmp_path):
    many = {"names": ["cat", "dog", "cow"], "templates": ["{}"], "multi_label": False}
    saved = save(
        tmp_path / "a", clip, tasks=(PETS,), groups=(0,), images={"tasks": {"pets_1": many}}
    )
    with pytest.raises(ValueError, match="'pets_1' of .*a has 3 classes, but its head has 2. Copy"):
        load(clip, saved.folder)


def test_load_other_sizes_than_the_backbone_fail(clip, tmp_path, monkeypatch):
    size = image_serving.Transform(17)
    saved = save(tmp_path / "size", clip, transform=size)
    with pytest.raises(ValueError, match="has images of 17 pixels, but the backbone has images of"):
        load(clip, saved.folder)
    vit = lane_serving.write_vit(tmp_path / "vit")  # without a projection to 10
    saved = save(tmp_path / "features", clip)
    monkeypatch.setattr("mpt_jax.serving.predict.image_server.check_origin", lambda *_: {})
    with pytest.raises(ValueError, match="of width 10, but the backbone has features of width 24"):
        load(vit, saved.folder)


def test_load_lanes_without_backbone_fails(saved):
    says = "These lanes are of a ViT or CLIP, .* or open_clip folder.$"
    with pytest.raises(ValueError, match=says):
        ImageServer.load([saved.folder], None)


def test_load_lanes_on_another_backbone_fails(clip, saved, tmp_path):
    with pytest.raises(ValueError, match="another backbone.*sha256 of its embedding"):
        load(lane_serving.write_vit(tmp_path / "vit"), saved.folder)


def test_digests_change_with_head_and_names(clip, saved, tmp_path):
    first = load(clip, saved.folder).digests
    assert load(clip, save(tmp_path / "same", clip).folder).digests == first
    changed = save(tmp_path / "t", clip, head={"temperature": 2.0})
    assert load(clip, changed.folder).digests != first
    assert load(clip, f"new={saved.folder}").digests != first


def test_fixture_has_lanes_that_read_the_image(saved):
    """So the comparisons above can fail."""
    one, other = (saved.logits("pets_1", x) for x in PIXELS[:2])
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - saved.logits("pets_2", PIXELS[0])[:2]).max() > 1e-2


def test_runs_of_one_task_are_separate_sequences(clip, tmp_path):
    saved = save(tmp_path / "a", clip, tasks=(PETS, PETS), groups=(0, 1), names=("s0", "s1"))
    one, other = ask(
        load(clip, saved.folder),
        [request(PIXELS[0], sequence=name) for name in ("s0", "s1")],
    )
    for answer, name in ((one, "s0"), (other, "s1")):
        check(answer, PETS.names, saved.logits(name, PIXELS[0]), False)
    assert one["scores"] != pytest.approx(other["scores"], abs=1e-3)

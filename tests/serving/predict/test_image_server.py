"""Answers about images compared with the training model; artifacts that disagree."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from mpt_jax.convert.clip import load_clip, read_clip_config, save_clip
from mpt_jax.core.runs import Runs
from mpt_jax.data import image_formats
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.serving.predict import image_artifacts
from mpt_jax.serving.predict.image_server import ImageServer
from mpt_jax.serving.predict.requests import Failure
from tests.fixtures import clip_files, image_serving, saved_artifacts
from tests.fixtures.image_files import encoded, noise, photo
from tests.fixtures.image_serving import PETS, SHAPES, TAGS, ask, request, save

PIXELS = [noise(16, 16, seed) for seed in range(7)]


@pytest.fixture(scope="module")
def coop(clip, tmp_path_factory):
    return save(tmp_path_factory.mktemp("coop") / "a", clip)


@pytest.fixture(scope="module")
def server(clip, coop):
    return load(clip, coop.folder)


def load(clip, *prompts, **settings):
    return ImageServer.load(list(map(str, prompts)), str(clip), **{"batch_size": 4, **settings})


def check(answer, scores, multi_label=False):
    """Compares an answer in mode 'score' with the training model's scores, to 1e-5."""
    assert list(answer["scores"]) == list(scores)
    np.testing.assert_allclose(list(answer["scores"].values()), list(scores.values()), 1e-5, 1e-5)
    best = max(scores, key=lambda name: scores[name])
    assert answer["score"] == answer["scores"][best]
    above = [name for name, score in scores.items() if np.exp(score) > 0.5]
    assert answer["prediction"] == (above if multi_label else best)


# --- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", image_serving.METHODS)
def test_server_equals_the_training_model(kind, clip, tmp_path):
    """Seven requests about three tasks, in batches of four, the last one padded."""
    saved = save(tmp_path / "a", clip, kind)
    server = load(clip, saved.folder)
    assert server.names == ("pets", "shapes", "tags")
    tasks = [server.names[i % 3] for i in range(7)]
    requests = [request(task, x) for task, x in zip(tasks, PIXELS, strict=True)]
    answers = ask(server, requests, "score")
    assert [answer["line"] for answer in answers] == list(range(1, 8))
    for answer, task, pixels in zip(answers, tasks, PIXELS, strict=True):
        check(answer, saved.scores(task, pixels), multi_label=task == "tags")
    assert len({round(answer["score"], 4) for answer in answers}) == 7
    plain = ask(server, requests)
    for scored, answer in zip(answers, plain, strict=True):
        assert answer == {name: scored[name] for name in ("line", "prediction", "score")}


def test_server_prompts_differ_from_no_prompt(clip, coop, server, tmp_path):
    """So the comparison above can fail: prompts of another seed have other scores."""
    other = save(tmp_path / "other", clip, seed=1)
    (answer,) = ask(server, [request("pets", PIXELS[0])], "score")
    assert answer["scores"] != pytest.approx(other.scores("pets", PIXELS[0]), abs=0.01)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_server_has_the_context_position_of_the_artifact(position, clip, coop, tmp_path):
    saved = save(tmp_path / position, clip, position=position)
    (answer,) = ask(load(clip, saved.folder), [request("pets", PIXELS[0])], "score")
    check(answer, saved.scores("pets", PIXELS[0]))
    assert answer["scores"] != pytest.approx(coop.scores("pets", PIXELS[0]), abs=1e-3)


@pytest.mark.slow
def test_server_artifacts_together_answer_as_alone(clip, coop, tmp_path):
    """Three runs of one task, two of them of one artifact that is renamed."""
    runs = Runs(["pets", "pets"], ["pets_s1", "pets_s2"], "independent")
    several = save(tmp_path / "several", clip, tasks=(PETS,), runs=runs, seed=2)
    single = save(tmp_path / "single", clip, tasks=(SHAPES,), seed=3)
    together = load(clip, coop.folder, f"new={several.folder}", f"second={single.folder}")
    names = ("pets", "shapes", "tags", "new/pets_s1", "new/pets_s2", "second")
    assert together.names == names
    owners = [*[(coop, name) for name in names[:3]]]
    owners += [(several, "pets_s1"), (several, "pets_s2"), (single, "shapes")]
    answers = ask(together, [request(name, PIXELS[0]) for name in names], "score")
    for answer, (owner, name) in zip(answers, owners, strict=True):
        check(answer, owner.scores(name, PIXELS[0]), multi_label=name == "tags")
    mine = ask(load(clip, several.folder), [request("pets_s2", PIXELS[0])], "score")
    assert mine[0]["scores"] == pytest.approx(answers[4]["scores"], abs=1e-5)
    assert together.nbytes == 4 * 6 * image_serving.P * 16


@pytest.mark.parametrize("transform", [(16, "crop"), (16, "squash"), (16, "crop", 19)], ids=str)
def test_server_images_of_other_sizes_equal_the_pipeline(transform, clip, tmp_path):
    """JPEG files of other sizes, with the pixels of TensorFlow: to 1e-2, for one level of 255."""
    made = ImageTransform(*transform)
    saved = save(tmp_path / "a", clip, transform=made)
    server = load(clip, saved.folder)
    for height, width in ((40, 21), (9, 12), (16, 16)):
        path = tmp_path / f"{height}.jpg"
        path.write_bytes(encoded(photo(height, width), "JPEG"))
        (answer,) = ask(server, [{"task": "pets", "image": str(path)}], "score")
        image = made(tf.constant(image_formats.pixels(path.read_bytes()))).numpy()
        assert answer["scores"] == pytest.approx(saved.scores("pets", image), abs=1e-2)


def test_server_path_and_base64_answer_equally(server, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(PIXELS[0], "PNG"))
    first, second = ask(
        server, [{"task": "pets", "image": str(path), "id": {"a": [1]}}, request("pets", PIXELS[0])]
    )
    assert first.pop("id") == {"a": [1]} and first.pop("line") == 1 and second.pop("line") == 2
    assert first == second


@pytest.mark.parametrize("size", [1, 4, 32])
def test_server_batch_size_changes_only_rounding(size, clip, coop, server):
    requests = [request(name, x) for x in PIXELS[:3] for name in server.names]
    expected = ask(server, requests, "score")
    for one, other in zip(
        ask(load(clip, coop.folder, batch_size=size), requests, "score"), expected, strict=True
    ):
        assert one["prediction"] == other["prediction"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_server_compiles_one_program(server):
    for count in (1, 3, 9):
        ask(server, [request("pets", PIXELS[i % 7]) for i in range(count)])
    assert server._score._cache_size() == 1


def test_server_failures_keep_request_order(server):
    first, second, third = ask(
        server,
        [
            request("pets", PIXELS[0]),
            request("pest", PIXELS[0], id="mine"),
            request("tags", PIXELS[1]),
        ],
    )
    assert first["line"] == 1 and third["line"] == 3 and isinstance(third["prediction"], list)
    assert second["id"] == "mine" and "Unknown task 'pest'. Did you mean 'pets'" in second["error"]
    assert server.answer([]) == []
    assert server.answer([Failure({"line": 9}, "no")]) == [{"line": 9, "error": "no"}]


def test_server_in_bfloat16_is_close(clip, coop):
    server = load(clip, coop.folder, dtype="bfloat16")
    (answer,) = ask(server, [request("pets", PIXELS[0])], "score")
    expected = coop.scores("pets", PIXELS[0])
    assert answer["scores"] == pytest.approx(expected, abs=0.2)
    assert answer["scores"] != pytest.approx(expected, abs=1e-6)


def test_server_score_that_is_not_finite_fails_its_line(clip, coop):
    server = load(clip, coop.folder)
    tree = jax.tree.map(jnp.copy, server.params)
    tree["logit_scale"] = jnp.full_like(tree["logit_scale"], jnp.nan)
    server.params = tree
    (answer,) = ask(server, [request("pets", PIXELS[0], id=7)])
    assert set(answer) == {"line", "id", "error"}
    assert answer["error"].startswith("The scores are NaN or infinite ([nan, nan, nan])")


# --- Artifacts that disagree ---------------------------------------------------------------------

LONGER = SitePrompts(PromptTuning(6, image_serving.WIDE))
SQUASH = image_serving.Transform(mode="squash")
OTHER_PETS = dataclasses.replace(PETS, names=("cat", "dog", "cow"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"kind": LONGER},
            "differ: text_context of 4 rows in 1 layers, 0 classes in .*a; .* 6",
        ),
        ({"kind": "both"}, "differ: .*text_context of 4 rows and image_tokens of 2 rows"),
        ({"kind": "contexts of classes"}, "differ: .*text_context of 16 rows.*4 classes"),
        ({"kind": "vpt"}, "differ: .*image_tokens of 6 rows in 3 layers"),
        ({"position": "front"}, 'their context position differs: "end" in .*a; "front" in .*b.'),
        (
            {"transform": SQUASH},
            "their image transform differs: .*crop.* in .*a; .*squash",
        ),
        ({"transform": image_serving.Transform(resize_to=18)}, "their image transform differs: "),
        ({"tasks": (OTHER_PETS,)}, "a and .*b have other classes or templates of the task 'pets'"),
        ({"tasks": (dataclasses.replace(PETS, templates=("{}",)),)}, "classes or templates"),
        ({"tasks": (dataclasses.replace(PETS, multi_label=True),)}, "classes or templates"),
        ({"embedding_sha256": "0" * 64}, "sha256 of its embedding"),
        ({"backbone_sha256": "0" * 64}, "sha256 of its weights"),
        ({"vocabulary_sha256": "0" * 64}, "their vocabulary .sha256. differs"),
    ],
)
def test_load_artifacts_that_disagree_fail(fields, says, clip, coop, tmp_path):
    other = save(tmp_path / "b", clip, **{"tasks": (PETS,), **fields})
    with pytest.raises(ValueError, match=says) as raised:
        load(clip, coop.folder, f"other={other.folder}")
    assert str(raised.value).endswith(".")


def test_load_equal_names_fail_and_can_be_renamed(clip, coop, tmp_path):
    other = save(tmp_path / "b", clip, tasks=(PETS,), seed=1)
    with pytest.raises(ValueError, match=f"'pets'.*NEW_NAME={re.escape(other.folder)}"):
        load(clip, coop.folder, other.folder)
    assert load(clip, coop.folder, f"mine={other.folder}").names[-1] == "mine"


def test_load_text_artifact_among_image_artifacts_fails(clip, coop, tmp_path):
    recorded = json.loads((Path(coop.folder) / "config.json").read_text())
    digests = ("embedding_sha256", "backbone_sha256", "backbone_config", "vocabulary_sha256")
    fields = {name: recorded[name] for name in digests}
    text = saved_artifacts.save_example(tmp_path / "text", **fields)
    with pytest.raises(ValueError, match=f"{text}.* prompts for texts, and the others for images"):
        load(clip, coop.folder, text)


def test_load_artifact_without_classes_of_a_task_fails(clip, tmp_path):
    model = save(tmp_path / "a", clip).model
    images = model.input_settings
    del images["tasks"]["shapes"]
    lacking = save(tmp_path / "b", clip, images=images)
    with pytest.raises(ValueError, match="b records no classes of its task 'shapes'. Copy the"):
        load(clip, lacking.folder)


def with_images(clip, folder, kind="coop", transform=None, pets=None, runs=None):
    """Saves an artifact with some fields of `images` replaced; returns its folder."""
    model = save(folder / "model", clip, kind, runs=runs).model
    images = model.input_settings
    images["transform"] |= transform or {}
    images["tasks"]["pets"] |= pets or {}
    return save(folder / "a", clip, kind, runs=runs, images=images).folder


@pytest.mark.parametrize("size", [1, 17, 2**31 - 1])
def test_load_images_of_another_size_than_the_backbone_fail(size, clip, tmp_path):
    folder = with_images(clip, tmp_path, transform={"size": size})
    says = f"a have images of {size} pixels, but the backbone has images of 16 pixels. Copy the"
    with pytest.raises(ValueError, match=says):
        load(clip, folder)


@pytest.mark.parametrize(
    ("kind", "table", "says"),
    [
        ("coop", (3, 4, 1), "text_context of width 1, but the backbone has .* width 16. Copy the"),
        ("coop", (3, 4, 17), "text_context of width 17, but the backbone has .* width 16."),
        ("vpt", (3, 6, 25), "image_tokens of width 25, but the backbone has .* width 24."),
        (
            SitePrompts(None, PromptTuning(4, image_serving.WIDE), image_layers=2),
            (3, 4, 24),
            "image_tokens in 2 layers, but the backbone has image_tokens in 3 layers.",
        ),
    ],
)
def test_load_prompts_of_other_sizes_than_the_backbone_fail(kind, table, says, clip, tmp_path):
    saved = save(tmp_path / "model", clip, kind)
    recorded = json.loads((Path(saved.folder) / "config.json").read_text())
    names = ("embedding_sha256", "backbone_sha256", "vocabulary_sha256", "backbone", "images")
    fields = {name: recorded[name] for name in names}
    method, runs = saved.model.prompt, saved.model.runs
    (site,) = method.parts
    prompt = {site: {"table": np.ones(table, np.float32)}}
    folder = saved_artifacts.save(tmp_path / "a", method, prompt, runs, **fields)
    with pytest.raises(ValueError, match=f"a have {says}"):
        load(clip, folder)


@pytest.mark.parametrize(
    ("kind", "pets", "rows", "number"),
    [
        ("vpt", {"templates": [f"{i} {{}}" for i in range(2048)]}, 3, "2,097,158"),
        ("coop", {}, 1025, "2,099,200"),
        pytest.param(*("vpt", {"templates": ["{}"]}, 1025, "2,099,200"), marks=pytest.mark.slow),
    ],
)
def test_load_too_many_class_texts_fail_before_they_are_made(
    kind, pets, rows, number, clip, tmp_path, monkeypatch
):
    runs = None if rows == 3 else Runs(["pets"] * rows, [f"s{i}" for i in range(rows)])
    names = [f"class {i}" for i in range(1024 if rows == 3 else 2048)]
    folder = with_images(clip, tmp_path, kind, pets={"names": names, **pets}, runs=runs)
    monkeypatch.setattr(image_artifacts, "class_texts", lambda *_: pytest.fail("made texts"))
    says = f"The artifacts have {number} class texts, and the limit is 1,048,576. Serve fewer"
    with pytest.raises(ValueError, match=says):
        load(clip, folder)


@pytest.mark.parametrize(("kind", "number"), [("coop", 9), ("vpt", 12)])
def test_load_counts_texts_of_templates_only_without_a_context(
    kind, number, clip, tmp_path, monkeypatch
):
    folder = save(tmp_path / "a", clip, kind).folder
    monkeypatch.setattr(image_artifacts, "MOST_TEXTS", number)
    assert load(clip, folder).names
    monkeypatch.setattr(image_artifacts, "MOST_TEXTS", number - 1)
    with pytest.raises(ValueError, match=f"have {number} class texts"):
        load(clip, folder)


def test_load_other_backbone_or_tokenizer_fails(clip, coop, tmp_path):
    config = read_clip_config(clip)
    params = load_clip(clip, config)
    params["logit_scale"] = params["logit_scale"] + 1
    save_clip(tmp_path / "weights", params, config)
    clip_files.write(tmp_path / "weights")
    with pytest.raises(ValueError, match="another backbone.*sha256 of its weights.*--backbone"):
        load(tmp_path / "weights", coop.folder)
    assert load(tmp_path / "weights", coop.folder, digest_backbone=False).names
    save_clip(
        tmp_path / "gelu", load_clip(clip, config), dataclasses.replace(config, activation="gelu")
    )
    clip_files.write(tmp_path / "gelu")
    with pytest.raises(ValueError, match="another configuration.*activation: saved .quick_gelu"):
        load(tmp_path / "gelu", coop.folder)
    save_clip(tmp_path / "words", load_clip(clip, config), config)
    merges = clip_files.learned_merges(("other words about a description of something",))
    clip_files.write(tmp_path / "words", merges)
    with pytest.raises(ValueError, match="trained with another vocabulary"):
        load(tmp_path / "words", coop.folder)


def test_load_missing_backbone_fails(coop, tmp_path):
    with pytest.raises(ValueError, match="which is not shipped. Set --backbone to its Hugging"):
        ImageServer.load([coop.folder], None)
    with pytest.raises(FileNotFoundError, match="none has no config.json and no open_clip_config"):
        ImageServer.load([coop.folder], str(tmp_path / "none"))


def test_load_vit_as_backbone_fails(coop, tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    fields = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 1, "image_size": 16}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="vit is a ViT without a text encoder. Set --backbone"):
        load(folder, coop.folder)


def test_load_artifact_without_digest_warns(clip, tmp_path):
    old = save(tmp_path / "old", clip, backbone_sha256=None)
    said = []
    load(clip, old.folder, warn=said.append)
    (line,) = said
    assert line.startswith(f"{old.folder} records no backbone_sha256")


def test_load_batch_size_of_zero_fails(clip, coop):
    with pytest.raises(ValueError, match="batch_size is 0"):
        load(clip, coop.folder, batch_size=0)


def test_digests_change_with_all_that_answers_depend_on(clip, coop, tmp_path):
    def digests(folder):
        return load(clip, folder).digests

    first = digests(coop.folder)
    assert digests(save(tmp_path / "same", clip).folder) == first
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"position": "front"},
        {"transform": SQUASH},
        {"tasks": (OTHER_PETS, SHAPES, TAGS)},
    ]
    for number, fields in enumerate(changes):
        changed = save(tmp_path / str(number), clip, **fields)
        assert digests(changed.folder) != first, fields
    assert digests(f"new={coop.folder}") != first

"""Exports of images: scores compared with the training model, and errors."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.serving import export
from mpt_jax.serving.export.images import write_images
from mpt_jax.serving.export.writing import Settings
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import image_jobs, image_serving, lane_serving
from tests.fixtures.image_files import noise

PIXELS = np.stack([noise(16, 16, seed) for seed in range(3)])


def exported(folder, saved, backbone):
    """Exports an artifact; returns the folder, and the server that was exported."""
    server = ImageServer.load([saved.folder], str(backbone))
    write_images(folder / "exported", server, Settings(("cpu",)))
    return folder / "exported", server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An artifact, and its export in the folder `exported` beside it."""
    folder = tmp_path_factory.mktemp("export")
    clip = image_jobs.write_clip(folder / "clip")
    saved = image_serving.save(folder / "artifact", clip)
    return exported(folder, saved, clip)[0], saved


def changed(saved, tmp_path, **fields):
    """Copies the export with other fields in config.json; returns the folder."""
    folder = tmp_path / "changed"
    shutil.copytree(saved[0], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_score_images_equals_the_training_model(saved):
    loaded = export.load(saved[0])
    assert loaded.names == ["pets", "shapes", "tags"]
    scores = np.asarray(loaded.score_images(PIXELS, [2, 0, 1]))
    for row, name, pixels in zip(scores, ("tags", "pets", "shapes"), PIXELS, strict=True):
        expected = saved[1].scores(name, pixels)
        assert loaded.config["images"]["classes"][name] == list(expected)
        np.testing.assert_allclose(row[: len(expected)], list(expected.values()), atol=1e-5)
        assert (row[len(expected) :] == -np.inf).all()


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """An artifact with lanes, and its export in the folder `exported` beside it."""
    folder = tmp_path_factory.mktemp("lanes")
    vit = lane_serving.write_vit(folder / "vit")
    saved = lane_serving.save(folder / "artifact", vit)
    target, server = exported(folder, saved, vit)
    return target, saved, server


def test_scores_of_lanes_equal_the_training_model(lanes):
    folder, saved, server = lanes
    loaded = export.load(folder)
    assert loaded.names == [task.task for task in lane_serving.TASKS]
    params = saved.params
    batch = {"image": jnp.asarray(PIXELS), "task_ids": jnp.asarray([2, 0, 3], jnp.int32)}
    own = np.asarray(loaded.score_images(PIXELS, [2, 0, 3]))
    np.testing.assert_allclose(own, saved.model.score_batch(params, batch), atol=1e-5)
    seen = np.asarray(loaded.score_seen(PIXELS, [2, 0, 3]))
    np.testing.assert_allclose(seen, saved.model.score_seen_batch(params, batch), atol=1e-5)
    columns = loaded.config["images"]["seen"]["classes"]
    assert len(columns) == seen.shape[1] == 11
    assert columns[:5] == [["tags_1", "sky"], ["tags_1", "sea"], ["tags_2", "sand"],
                           ["tags_2", "tree"], ["tags_2", "road"]]  # fmt: skip
    assert loaded.config["images"]["seen"]["sequence"] == [0, 0, 1, 1]
    assert np.isfinite(seen[1, :5]).all() and np.isneginf(seen[1, 5:]).all()
    np.testing.assert_allclose(np.exp(seen[[0, 2], 5:]).sum(1), 1, rtol=1e-5)
    readme = (folder / "README.md").read_text()
    assert "An image encoder with lanes of 4 tasks" in readme and "score_seen.jax" in readme


def test_load_export_of_lanes_without_its_second_function_fails(lanes, tmp_path):
    shutil.copytree(lanes[0], tmp_path / "copy")
    (tmp_path / "copy" / "score_seen.jax").unlink()
    with pytest.raises(FileNotFoundError, match="score_seen.jax does not exist. Copy the folder"):
        export.load(tmp_path / "copy")
    digests = json.loads((lanes[0] / "config.json").read_text())["files_sha256"]
    del digests["score_seen.jax"]
    (tmp_path / "other").mkdir()
    folder = changed(lanes, tmp_path / "other", files_sha256=digests)
    with pytest.raises(ValueError, match="The field files_sha256 of .* has the invalid value"):
        export.load(folder)


def test_score_seen_of_an_export_without_lanes_fails(saved):
    with pytest.raises(ValueError, match=f"{saved[0]} has no lanes. Export artifacts of MULTI-LA"):
        export.load(saved[0]).score_seen(PIXELS, [0, 0, 0])
    assert "score_seen" not in (saved[0] / "README.md").read_text()


@pytest.mark.parametrize(
    "functions", [[], None, {"predict": {"x": "f"}}, {"predict": {"8": "../f"}}], ids=str
)
def test_load_export_of_images_does_not_read_functions_of_texts(functions, saved, tmp_path):
    loaded = export.load(changed(saved, tmp_path, functions=functions))
    assert np.isfinite(loaded.score_images(PIXELS[:1], [0])[0, :3]).all()


def test_predict_and_score_of_an_export_of_images_fail(saved, tmp_path):
    for folder in (saved[0], changed(saved, tmp_path, target_length=4)):
        loaded = export.load(folder)
        says = f"{folder} is an export of images. Call score_images."
        with pytest.raises(ValueError, match=says):
            loaded.predict([[5, 1]], [0])
        with pytest.raises(ValueError, match=says):
            loaded.score([[5, 1]], [[6, 1]], [0])


@pytest.mark.parametrize(
    ("images", "rows", "says"),
    [
        (PIXELS, [0, 1], r"must be uint8 \[2, 16, 16, 3\].* got uint8 \[3, 16, 16, 3\]"),
        (PIXELS.astype(np.float32), [0, 1, 2], "got float32"),
        (PIXELS[:, 1:], [0, 1, 2], r"got uint8 \[3, 15, 16, 3\]"),
        (PIXELS[:1], [3], "There is no row 3: the 3 tasks"),
    ],
)
def test_score_images_of_other_shapes_or_rows_fails(images, rows, says, saved):
    with pytest.raises(ValueError, match=says):
        export.load(saved[0]).score_images(images, rows)


@pytest.mark.parametrize("images", [None, [], {"transform": {"size": 0}}, {"transform": 3}])
def test_load_invalid_field_images_fails(images, saved, tmp_path):
    with pytest.raises(ValueError, match="The field images of .* has the invalid value"):
        export.load(changed(saved, tmp_path, images=images))

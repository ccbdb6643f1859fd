"""Pictures of the attention of lanes, against NumPy, Pillow and what the evaluation wrote."""

from __future__ import annotations

import base64
import io
import json
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mpt_jax.artifacts import artifacts
from mpt_jax.backbones.clip.published import clip_config
from mpt_jax.convert import load_backbone
from mpt_jax.data.task_lookup import find_task
from mpt_jax.experiments.report import __main__ as command
from mpt_jax.experiments.report import figures, lane_job, lane_pictures
from mpt_jax.prompts.prompt_tuning import PromptTuning
from tests.fixtures import lane_jobs, lane_serving, reference_lanes, saved_artifacts
from tests.fixtures.image_jobs import run_job
from tests.fixtures.report_folders import Reader, titles, write_lines

pytestmark = pytest.mark.usefixtures("cleared_gin")

KINDS = lane_jobs.KINDS


@pytest.fixture(scope="module")
def model_dir(clip, tmp_path_factory):
    """A job that trained the lanes of three single-label tasks."""
    root = tmp_path_factory.mktemp("lanes")
    given = lane_jobs.bindings(
        clip, root, (KINDS,), STEP=3, BATCH_SIZE=6, TRAIN_STEPS=1, EVAL_PERIOD=1,
        SAVE_PERIOD=1, STATS_PERIOD=1, EVAL_SPLIT="test",
    )  # fmt: skip
    run_job(["multilane", "runs/joint_lanes"], given)
    return root / "multilane_joint_3"


def pixels_of(task, number):
    """The pixels of a test image, which has the size that the model reads."""
    examples = find_task(task).get_dataset({}, "test", shuffle=False, num_epochs=1)
    encoded = list(examples.as_numpy_iterator())[number]["image"][0]
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.slow
def test_seen_images_equal_numpy_and_the_evaluation(clip, model_dir):
    lanes, images = lane_job.seen_images(model_dir, 5)
    assert lanes == KINDS
    # A third of the 16 images have a class of the task; the first tasks show one more.
    folder = model_dir / "inference_eval"
    lines = {name: (folder / f"{name}-000001.jsonl").read_text().splitlines() for name in KINDS}
    sizes = [len(lines[name]) for name in KINDS]
    chosen = [(KINDS[i], j * sizes[i] // n) for i, n in enumerate((2, 2, 1)) for j in range(n)]
    assert [(image.run, image.number) for image in images] == chosen
    found = artifacts.load_artifact(model_dir / "artifact")
    config = clip_config(checkpoint=str(clip), dtype="float32")
    backbone = load_backbone(str(clip), config)
    values = np.asarray(found.params["lane"]["table"], np.float64)
    for image in images:
        pixels = pixels_of(image.run, image.number)
        np.testing.assert_array_equal(image.pixels, pixels)
        for row, maps in enumerate(image.attention):
            pairs, expected = values[row, 3:].reshape(2, 2, 2, -1), []
            reference_lanes.feature(
                config, backbone, pixels, values[row, :3], pairs[:, 0], pairs[:, 1], maps=expected
            )
            np.testing.assert_allclose(maps, expected, atol=1e-4)
        line = json.loads(lines[image.run][image.number])
        names = found.config["images"]["tasks"][image.run]["names"]
        assert image.classes == (names[line["target"]],)
        assert image.predicted == (names[int(np.argmax(line["score"]))],)


@pytest.mark.slow
def test_page_shows_images_and_shares(model_dir, tmp_path, capsys):
    out = tmp_path / "page.html"
    command.main([str(model_dir), "--images", "2", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    html = out.read_text()
    assert titles(html)[:3] == ["Scores", "Confusion matrices", "Attention of lanes"]
    alts = [alt for alt in Reader(html).alts if alt.startswith("Attention of 3 lanes over patches")]
    assert len(alts) == 2 and "in 3 layers. Image 0 of lane_kinds_1 (test): sky." in alts[0]
    assert "nats per image" in html
    addresses = Reader(html).addresses
    assert sum(x.startswith("data:image/png;base64,") for x in addresses) == 2
    assert all(x.startswith(("#", "data:image/png;base64,")) for x in addresses)
    _, images = lane_job.seen_images(model_dir, 2)
    patches = [100 * image.attention[1, 2, 1:].sum() for image in images]
    cells = re.findall(r'scope="row">lane_kinds_2</th>(.*?)</tr>', html)[-1]
    assert re.findall(r"<td>(.*?)</td>", cells)[2] == f"{np.mean(patches):.1f}"


def test_overlay_colors_patches_by_their_share_of_the_largest():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = lane_pictures.overlay(plain, np.array([0.0, 0.2, 0.1, 0.4], np.float32))
    assert found.shape == (8, 8, 3)
    gray = np.asarray(Image.fromarray(plain).convert("L"), np.float64)
    for (i, j), share in {(0, 0): 0.0, (0, 1): 0.5, (1, 0): 0.25, (1, 1): 1.0}.items():
        color = np.array(matplotlib.colormaps["inferno"](share)[:3]) * 255
        part = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        expected = 0.6 * color + 0.4 * gray[part][..., None]
        np.testing.assert_allclose(found[part], expected, atol=1.5)
    assert not lane_pictures.overlay(plain * 0, np.zeros(4, np.float32)).max() > 10


def test_pictures_contain_their_pixels():
    cells = np.random.default_rng(1).integers(0, 256, (2, 3, 5, 5, 3)).astype(np.uint8)
    svg = figures.pictures(figures.Panel("", "", "", "alt"), ["a", "b"], ["x", "y", "$z$"], cells)
    encoded = re.search(r'"data:image/png;base64,\s*([^"]*)"', svg).group(1)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))
    pixels = pixels if pixels.shape == (14, 23, 4) else pixels[::-1]
    assert pixels.shape == (14, 23, 4)
    for i, j in np.ndindex(2, 3):
        cell = pixels[9 * i : 9 * i + 5, 9 * j : 9 * j + 5]
        np.testing.assert_array_equal(cell[..., :3], cells[i, j])
        assert (cell[..., 3] == 255).all()
    assert (pixels[5:9, :, 3] == 0).all()


# --- Errors --------------------------------------------------------------------------------------


def failed(capsys, *arguments):
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        command.main([str(x) for x in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.slow
def test_what_cannot_be_shown_is_an_error(model_dir, tmp_path, capsys):
    assert "The number of images is 25" in failed(capsys, model_dir, "--images", 25)
    assert "number of images is -1" in failed(capsys, model_dir, "--images", -1)
    write_lines(tmp_path / "run.jsonl", [{"seed": 1}])
    assert "No prompt artifact at" in failed(capsys, tmp_path, "--images", 1)
    runs = artifacts.load_artifact(model_dir / "artifact").runs
    params = {"table": np.ones((3, 2, 4))}
    saved_artifacts.save(tmp_path / "artifact", PromptTuning(2), params, runs)
    assert "has prompts of the method 'prompt_tuning'" in failed(capsys, tmp_path, "--images", 1)
    (tmp_path / "run.jsonl").unlink()
    assert "is no MODEL_DIR of a job" in failed(capsys, tmp_path, "--images", 1)


def test_job_without_evaluation_is_an_error(clip, tmp_path, capsys, monkeypatch):
    lane_serving.save(tmp_path / "artifact", clip)
    write_lines(tmp_path / "run.jsonl", [{"seed": 1}])
    monkeypatch.setattr(lane_job, "_read_job", lambda _: lane_job._Job(None, None, None))
    error = failed(capsys, tmp_path, "--images", 1)
    assert "evaluates no data" in error
    assert "Omit --images, or train without gin/runs/no_evaluation.gin." in error


@pytest.mark.slow
def test_missing_backbone_or_configuration_is_named(model_dir, tmp_path, capsys):
    gin = model_dir / "config.gin"
    kept = gin.read_text()
    missing = re.sub(r"(?m)^INITIAL_CHECKPOINT_PATH = .*$", "INITIAL_CHECKPOINT_PATH = '/no'", kept)
    try:
        gin.write_text(missing)
        error = failed(capsys, model_dir, "--images", 1, "--out", tmp_path / "x.html")
        assert "/no has no config.json" in error and "To get one: " in error
        assert "In call to configurable" not in error
        gin.write_text(kept.replace("['tests.fixtures.lane_jobs']", "['tests.fixtures.gone']"))
        assert "tests.fixtures.gone" in failed(capsys, model_dir, "--images", 1)
        gin.write_text("from __gin__ import dynamic_registration\n")
        assert "does not configure a training job" in failed(capsys, model_dir, "--images", 1)
        gin.unlink()
        assert "config.gin does not exist" in failed(capsys, model_dir, "--images", 1)
        assert not (tmp_path / "x.html").exists()
    finally:
        gin.write_text(kept)

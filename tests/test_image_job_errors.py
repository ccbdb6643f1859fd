"""Mistakes in the configuration of image jobs: each is one sentence with its remedy."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import seqio

from mpt_jax.config import gin_utils
from mpt_jax.tasks import images
from tests.fixtures import clip_files, image_files, image_jobs, memory_tasks
from tests.fixtures.image_jobs import bindings, run_job

pytestmark = pytest.mark.usefixtures("cleared_gin")

COOP = {"CONTEXT_LENGTH": 2, "TRAIN_STEPS": 0}


@pytest.fixture
def fails(clip, tmp_path):
    """A function that runs a job that must fail, and returns the message for the user."""

    def run(*files, tasks=("job_pets",), entry="train", folder=clip, **macros):
        given = bindings(folder, tmp_path / "root", tasks, **{**COOP, **macros})
        with pytest.raises((ValueError, OSError)) as caught:
            run_job(files or ["coop_target"], given, entry)
        assert gin_utils._is_for_the_user(caught.value), "raised by other code"
        return gin_utils.message(caught.value)

    return run


def test_wrong_macro(fails):
    assert re.search("macro CONTEXT_LENGHT.*Did you mean CONTEXT_LENGTH", fails(CONTEXT_LENGHT=3))


def test_missing_clip_folder_gives_the_download_command(fails, tmp_path):
    message = fails(folder=tmp_path / "none")
    assert "hf download openai/clip-vit-base-patch16 --local-dir" in message


def test_missing_tokenizer_files(fails, clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "merges.txt").unlink()
    message = fails(folder=tmp_path / "clip")
    assert "lacks merges.txt, the tokenizer of CLIP. Copy the files" in message


def test_tokenizer_of_another_size(fails, tmp_path):
    other = clip_files.write(tmp_path / "other", [("c", "a")])
    message = fails(CLIP_TOKENIZER=str(other))
    assert message.startswith("The tokenizer has 515 ids, but the backbone embeds 534. Set CLIP_T")


def test_class_name_that_is_too_long(fails):
    assert re.search(
        r"job_pets.*\b\d+\b.*positions.*CONTEXT_LENGTH", fails(CONTEXT_LENGTH=30).replace("\n", " ")
    )


def test_text_task_in_an_image_job(fails):
    memory_tasks.register("job_text", memory_tasks.listed([("a", "b")], ["train", "validation"]))
    message = fails(tasks=["job_text"])
    assert message.startswith("Task 'job_text' has no classes, because it is not an image task.")


def test_image_task_in_a_text_job(tmp_path):
    given = ["TARGET_TASKS = ['job_pets']", "TASK_MODULES = ['tests.fixtures.image_jobs']"]
    given += ["TRAIN_STEPS = 1", f"ROOT = {str(tmp_path)!r}"]
    with pytest.raises(ValueError) as caught:
        run_job(["pt_target", "tiny"], given)
    assert gin_utils.message(caught.value) == (
        "The tasks job_pets are image tasks, so task_feature_lengths = {'inputs': 48, 'targets': "
        "12} and by_length = False would have no effect. Use a stage for images, such as "
        "gin/coop_target.gin, with TASK_FEATURE_LENGTHS = {} and without gin/runs/by_length.gin."
    )


@pytest.mark.slow
def test_vpt_artifact_in_a_coop_job(fails, clip, tmp_path):
    vpt = {"IMAGE_TOKENS": 2, "TRAIN_STEPS": 0}
    run_job(["vpt_target"], bindings(clip, tmp_path / "source", ["job_pets"], **vpt))
    start = str(tmp_path / "source" / "vpt_target" / "artifact")
    message = fails(INITIAL_ARTIFACT=start)
    assert "has none for text_context. Set INITIAL_ARTIFACT to an artifact with" in message


@pytest.mark.slow
def test_contexts_of_classes_in_another_order(fails, clip, tmp_path, own_tasks):
    def register(names):
        seqio.TaskRegistry.remove("job_pair")
        pixels = image_files.noise(4, 4)[None].repeat(2, 0)
        data = {split: (pixels, np.array([0, 1])) for split in ("train", "validation")}
        images.register("job_pair", images.ArrayImages(data, names))

    own = {**COOP, "TEXT_CLASSES": 2}
    register(["cat", "dog"])
    run_job(["coop_target"], bindings(clip, tmp_path / "source", ["job_pair"], **own))
    start = str(tmp_path / "source" / "coop_target" / "artifact")
    register(["dog", "cat"])
    message = fails(tasks=["job_pair"], INITIAL_ARTIFACT=start, TEXT_CLASSES=2)
    assert "trained with other inputs: its class_names_of_job_pair_sha256 is" in message
    register(["cat", "dog"])
    given = bindings(clip, tmp_path / "same", ["job_pair"], **own, INITIAL_ARTIFACT=start)
    run_job(["coop_target"], given)


def test_empty_split(fails, own_tasks):
    pixels = image_files.noise(4, 4)[None].repeat(2, 0)
    data = {"train": (pixels, np.array([0, 1])), "validation": (pixels[:0], np.zeros(0, int))}
    images.register("job_empty", images.ArrayImages(data, ["cat", "dog"]))
    message = fails(tasks=["job_empty"])
    assert "empty" in message and "job_empty" in message or "images of shape" in message


def test_limits_of_texts(fails):
    message = fails(TASK_FEATURE_LENGTHS={"inputs": 4, "targets": 2})
    assert (
        "job_pets are image tasks, so task_feature_lengths = {'inputs': 4, 'targets': 2}" in message
    )
    assert "with TASK_FEATURE_LENGTHS = {} and without" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packed", "Images cannot be packed, .* Drop --gin_file=gin/runs/packed.gin"),
        ("by_length", "by_length = True would have no effect.* without gin/runs/by_length"),
        ("teacher_cache", "cannot use a teacher cache: .* drop --gin_file=gin/runs/teacher_cache"),
    ],
)
def test_files_for_texts(fails, name, message):
    assert re.search(message, fails("coop_target", f"runs/{name}", TRAIN_STEPS=1))


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_damaged_file_is_named(fails, tmp_path, own_tasks, split):
    root = image_jobs.write_photos(tmp_path / "photos")
    damaged = root / split / "dog" / "5.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    name = image_jobs.register_photos(root, f"job_photos_{split}")
    message = fails(tasks=[name], TRAIN_STEPS=4, EVAL_PERIOD=2, BATCH_SIZE=7)
    assert re.match(
        rf"The image of example \S*dog/5.jpg of {name} cannot be used: its JPEG data is truncated "
        r"or damaged. Replace the image, or remove the example from the data.$",
        message,
    )

"""Artifacts of every image stage, served and exported, compared with what the evaluator wrote."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from mpt_jax.artifacts.artifacts import load_artifact
from mpt_jax.serving import export
from mpt_jax.serving.export.images import write_images
from mpt_jax.serving.export.writing import Settings
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import lane_jobs, picture_files
from tests.fixtures.image_jobs import bindings, run_job
from tests.fixtures.lane_jobs import KINDS, TAGS

pytestmark = pytest.mark.usefixtures("cleared_gin")

# Images of 16 by 16 pixels are not resized, so pixels are equal. The last task is multi-label.
TASKS = (KINDS[0], KINDS[1], TAGS[0])
RECIPE = {
    "EVAL_PERIOD": 4,
    "LEARNING_RATE": 0.05,
    "STEPS_PER_EPOCH": 1,
    "infer_eval/utils.DatasetConfig.split": "test",
    "train_eval/utils.DatasetConfig.split": "test",
}
BOTH = {"CONTEXT_LENGTH": 2, "IMAGE_TOKENS": 2}
SOURCE = {"SHOTS": [2], "SEEDS": [1], "AUGMENTATION": None}


def given(clip, root, tasks=TASKS, kind="TARGET_TASKS", **macros):
    modules = {"TASK_MODULES": ["tests.fixtures.lane_jobs"]}
    found = bindings(clip, root, tasks, **{**RECIPE, **modules, **macros})
    return [x.replace("TARGET_TASKS", kind) for x in found]


def run(name, files, own):
    gin.clear_config()
    return run_job([name, *files], own)


def evaluated(folder: Path, task: str) -> list[dict]:
    """What the evaluator wrote of each example of a task at the step of the artifact."""
    step = load_artifact(folder / "artifact").config["step"]
    path = folder / "inference_eval" / f"{task}-{step:06}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(task: str, split: str) -> list[str]:
    """The images of a split of a run's task, in base64."""
    rows = picture_files.rows(task.split("_k2")[0], split)
    return [base64.b64encode(x["image"][0]).decode() for x in rows]


def asked(server, task, split, field="task"):
    """The answers in mode 'score' about the images of a split of a task."""
    reader = server.reader("score")
    lines = [json.dumps({field: task, "image_base64": x}) for x in content(task, split)]
    return server.answer([reader.read(x.encode(), i) for i, x in enumerate(lines, start=1)])


def check_served(clip, folder, tmp_path, split="test"):
    """Compares the server and the export of a job's artifact with what its evaluator wrote."""
    artifact = load_artifact(folder / "artifact")
    server = ImageServer.load([str(folder / "artifact")], str(clip), batch_size=8)
    assert server.names == artifact.runs.run_names
    write_images(tmp_path / "exported", server, Settings(("cpu",)))
    exported = export.load(tmp_path / "exported")
    different = set()
    for row, run_name in enumerate(server.names):
        answers, written = asked(server, run_name, split), evaluated(folder, run_name)
        assert len(answers) == len(written) > 4
        names = list(answers[0]["scores"])
        scores = np.array([list(x["scores"].values()) for x in answers])
        expected = np.array([x["score"] for x in written])[:, : len(names)]
        np.testing.assert_allclose(scores, expected, atol=2e-5)
        different |= {round(x, 4) for x in scores[:, 0].tolist()}
        pairs = list(zip((x["prediction"] for x in answers), written, strict=True))
        if "accuracy" in (own := artifact.config["metrics"]["scores"][run_name]):
            right = np.mean([found == names[x["target"]] for found, x in pairs])
            assert 100 * right == pytest.approx(own["accuracy"])
        else:
            assert all(len(found) == sum(np.exp(x["score"]) > 0.5) for found, x in pairs)
        line = json.dumps({"task": run_name, "image_base64": content(run_name, split)[0]})
        request: Any = server.reader().read(line.encode(), 1)
        lone = np.asarray(exported.score_images(request.image[None], [row]))[0]
        np.testing.assert_allclose(lone[: len(names)], expected[0], atol=2e-5)
    assert len(different) > 5, "scores depend on the image"
    return server


# --- Lanes ---------------------------------------------------------------------------------------


def lane_stages(clip, root, sequences, steps, **macros):
    for step in steps:
        gin.clear_config()
        run_job(["multilane"], lane_jobs.bindings(clip, root, sequences, STEP=step, **macros))
    return root / f"multilane_{steps[-1]}"


def test_lanes_with_one_label(clip, tmp_path):
    folder = lane_stages(clip, tmp_path, (KINDS,), (1, 2), EVAL_SPLIT="test")
    server = check_served(clip, folder, tmp_path)
    # Without a task id: each class from its own lane.
    artifact = load_artifact(folder / "artifact")
    answers = asked(server, KINDS[1], "test", "sequence")
    names = [x for task in KINDS[:2] for x in artifact.config["images"]["tasks"][task]["names"]]
    for answer in answers:
        assert list(answer["scores"]) == names == list(lane_jobs.CLASSES[:4])
        assert sum(np.exp(list(answer["scores"].values()))) == pytest.approx(1, abs=1e-5)
    own = asked(server, KINDS[1], "test")
    for one, other in zip(answers, own, strict=True):  # the same logits, up to a constant
        gap = [one["scores"][name] - x for name, x in other["scores"].items()]
        assert gap[0] == pytest.approx(gap[1], abs=1e-4) and gap[0] < 0


@pytest.mark.slow
def test_multi_label_lanes_have_the_scores_of_their_tasks(clip, tmp_path):
    """So the scores of all classes seen are those of the evaluator, lane by lane."""
    folder = lane_stages(clip, tmp_path, (TAGS,), (1, 2))
    server = check_served(clip, folder, tmp_path, "seen_2")
    written = [evaluated(folder, task) for task in TAGS[:2]]
    for i, answer in enumerate(asked(server, TAGS[0], "seen_2", "sequence")):
        expected = [x for lines in written for x in lines[i]["score"][:2]]
        assert list(answer["scores"]) == list(lane_jobs.CLASSES[:4])
        np.testing.assert_allclose(list(answer["scores"].values()), expected, atol=2e-5)


# --- Stages of prompts of a CLIP -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["upt", "coop", "vpt", "cocoop"])
def test_mvlpt_source_and_target(clip, tmp_path, method):
    """One prompt for all source tasks of a draw, and one for each target task."""
    files = [] if method == "upt" else [f"methods/{method}"]
    own = {
        "upt": {**BOTH, "MIXER_WIDTH": 8},
        "coop": {"CONTEXT_LENGTH": 2},
        "cocoop": {"CONTEXT_LENGTH": 2, "CONTEXT_INIT": "@init.Normal()"},
        "vpt": {"IMAGE_TOKENS": 2},
    }[method]
    draws = {**SOURCE, "SEEDS": [1, 2], **own}
    run("mvlpt_source", files, given(clip, tmp_path, kind="SOURCE_TASKS", **draws))
    server = check_served(clip, tmp_path / "mvlpt_source", tmp_path / "source")
    assert len(server.names) == 2 * len(TASKS)
    run("mvlpt_target", files, given(clip, tmp_path, **own))
    check_served(clip, tmp_path / "mvlpt_target", tmp_path / "target")


SITES = {
    "both": BOTH,
    "text": {"CONTEXT_LENGTH": 2, "IMAGE_PROMPT": None},
    "image": {"IMAGE_TOKENS": 2, "TEXT_PROMPT": None, "CONTEXT_LENGTH": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("sites", SITES)
def test_clip_mpt_teachers_source_and_target(clip, tmp_path, sites):
    own = SITES[sites]
    source = given(clip, tmp_path, kind="SOURCE_TASKS", **SOURCE, **own)
    if sites == "both":
        run("clip_pt_source", [], source)
        check_served(clip, tmp_path / "clip_pt_source", tmp_path / "teachers")
    else:
        source.append("DISTILL_FROM = 'zero_shot'")
    run("clip_mpt_source", [], source)
    check_served(clip, tmp_path / "clip_mpt_source", tmp_path / "source")
    run("clip_mpt_target", [], given(clip, tmp_path, **own))
    check_served(clip, tmp_path / "clip_mpt_target", tmp_path / "target")

"""Whole jobs of MULTI-LANE from the shipped gin files: stages, resuming, evaluation, groups."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.experiments import sequence_metrics
from tests.fixtures.image_jobs import run_job
from tests.fixtures.lane_jobs import KINDS, TAGS, bindings
from tests.fixtures.training_runs import assert_same_bits, prompts

pytestmark = pytest.mark.usefixtures("cleared_gin")

ROWS = 3 + 2 * 2 * 2  # of a lane
JOB = ["multilane"]


@pytest.fixture(scope="module")
def stages(clip, tmp_path_factory):
    """The root and the scores of two stages."""
    root = tmp_path_factory.mktemp("stages")
    return root, [run_job(JOB, bindings(clip, root, STEP=step)) for step in (1, 2)]


def config(folder):
    return artifacts.load_artifact(folder / "artifact").config


def test_first_stage_trains_one_lane(stages):
    root, (scores, _) = stages
    found = config(root / "multilane_1")
    assert found["run_names"] == [TAGS[0]] and found["step"] == 4
    assert found["shapes"] == {
        "head/bias": [1, 2], "head/kernel": [1, 2, 10], "lane/table": [1, ROWS, 24],
    }  # fmt: skip
    assert found["metrics"]["scores"] == scores
    assert list(scores[TAGS[0]]) == ["map", "map_classes"] and scores[TAGS[0]]["map_classes"] == 2
    record = json.loads((root / "multilane_1" / "run.jsonl").read_text())
    assert record["trainable_parameters"] == ROWS * 24 + 2 * 11
    assert set(record["data"][TAGS[0]]["splits"]) == {"train", "seen_1"}


def test_second_stage_keeps_the_first_lane(clip, stages, tmp_path):
    root, _ = stages
    first, second = (prompts(root / f"multilane_{step}") for step in (1, 2))
    for name, values in first.items():
        np.testing.assert_array_equal(second[name][0], values[0])
        assert second[name].shape[0] == 2
    given = bindings(clip, tmp_path, STEP=2, TRAIN_STEPS=0, EVAL_PERIOD=1)
    given += [f"INITIAL_ARTIFACT = {str(root / 'multilane_1' / 'artifact')!r}"]
    run_job(JOB, given)
    start = prompts(tmp_path / "multilane_2")
    np.testing.assert_array_equal(start["lane/table"][1], first["lane/table"][0])
    assert (start["head/kernel"][1] != first["head/kernel"][0]).all()
    for name in first:
        assert np.abs(second[name][1] - start[name][1]).max() > 1e-4


def test_metrics_of_the_sequence(stages, capsys):
    root, scores = stages
    sequence_metrics.main([str(root / f"multilane_{step}") for step in (1, 2)])
    printed = capsys.readouterr().out.splitlines()
    own = scores[0][TAGS[0]]["map"]
    both = [scores[1][name]["map"] for name in TAGS[:2]]
    assert printed[0] == f"stage 1: map {own:.2f} over 2 classes"
    assert printed[1] == f"stage 2: map {np.mean(both):.2f} over 4 classes"
    assert printed[2] == f"average {(own + np.mean(both)) / 2:.2f}, last {np.mean(both):.2f}"
    assert printed[3].startswith(f"forgetting {own - both[0]:.2f}, backward")
    # The lane is the same, but the second stage has more images without its classes.
    assert config(root / "multilane_2")["started_from"]["start_from"] == {
        "lane": {TAGS[0]: TAGS[0], TAGS[1]: TAGS[0]}
    }


def test_evaluation_of_the_artifact_gives_the_scores_of_training(clip, stages):
    root, scores = stages
    given = bindings(clip, root / "read", TASK_NAMES=list(TAGS[:2]))
    training = (
        "BATCH_SIZE",
        "TRAIN_STEPS",
        "EVAL_PERIOD",
        "SAVE_PERIOD",
        "STATS_PERIOD",
        "SEQUENCES",
    )
    given = [x for x in given if x.split(" = ")[0] not in training]
    given += [
        f"INITIAL_ARTIFACT = {str(root / 'multilane_2' / 'artifact')!r}",
        "START_FROM = 'same'",
        "utils.DatasetConfig.split = 'seen_2'",
    ]
    files = ["eval", "models/prompted_vit", "methods/multi_lane"]
    assert run_job(files, given, "eval") == {0: scores[1]}


@pytest.mark.slow
def test_resumed_same_bits(clip, stages, tmp_path):
    root, _ = stages
    for steps in (1, 3, 4):
        given = bindings(clip, tmp_path, **{"train_script.train.total_steps": steps})
        run_job(JOB, given)
    assert_same_bits(prompts(root / "multilane_1"), prompts(tmp_path / "multilane_1"))
    with pytest.raises(ValueError, match=r"(?s)another configuration.*normalize"):
        run_job(JOB, bindings(clip, tmp_path, NORMALIZE=False, TRAIN_STEPS=6))


@pytest.mark.slow
def test_sequences_of_one_job_equal_solo_jobs(clip, stages, tmp_path):
    root, scores = stages
    turned = (TAGS[1] + "_lr0.05", TAGS[0] + "_lr0.05")
    for step in (1, 2):
        both = run_job(
            JOB, bindings(clip, tmp_path, (TAGS, (*turned, TAGS[2] + "_lr0.05")), STEP=step)
        )
        solo, found = (prompts(x / f"multilane_{step}") for x in (root, tmp_path))
        for name, values in solo.items():
            np.testing.assert_allclose(found[name][:step], values, atol=2e-5)
        assert both[TAGS[0]]["map"] == pytest.approx(scores[step - 1][TAGS[0]]["map"], abs=1e-3)
    assert config(tmp_path / "multilane_2")["groups"] == [0, 0, 1, 1]


@pytest.mark.slow
def test_one_label_and_all_lanes_at_once(clip, tmp_path):
    given = bindings(clip, tmp_path, (KINDS,), STEP=3, BATCH_SIZE=6, EVAL_SPLIT="test")
    scores = run_job([*JOB, "runs/joint_lanes"], given)
    assert list(scores) == list(KINDS) and all("accuracy" in x for x in scores.values())
    found = prompts(tmp_path / "multilane_joint_3")
    assert found["lane/table"].shape == (3, ROWS, 24)
    assert (np.abs(found["head/bias"]) > 0).all()


def test_missing_stage_names_the_command(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"multilane_1/artifact.*STEP before"):
        run_job(JOB, bindings(clip, tmp_path, STEP=2))

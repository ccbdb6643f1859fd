"""Whole image jobs from the shipped gin files: training, evaluation, inference and stages."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.tree import flatten
from mpt_jax.models import dual_encoder
from tests.fixtures import image_jobs, picture_files
from tests.fixtures.image_jobs import bindings, run_job
from tests.fixtures.training_runs import assert_same_bits, prompts

pytestmark = pytest.mark.usefixtures("cleared_gin")

PAIR = ("job_pets", "job_shapes")
TAGGED = ("job_tags", "job_pets")  # the first is multi-label
COOP = {"CONTEXT_LENGTH": 2, "STEPS_PER_EPOCH": 1, "EVAL_PERIOD": 4}
AUGMENTATION = "@image_transforms.Augmentation()"
VPT = {"IMAGE_TOKENS": 2, "STEPS_PER_EPOCH": 1, "EVAL_PERIOD": 4, "AUGMENTATION": AUGMENTATION}


@pytest.fixture(scope="module")
def coop(clip, tmp_path_factory):
    """The root and the scores of a CoOp job."""
    root = tmp_path_factory.mktemp("coop")
    return root, run_job(["coop_target"], bindings(clip, root, PAIR, **COOP))


@pytest.fixture(scope="module")
def vpt(clip, tmp_path_factory):
    """The root and the scores of an augmented VPT job."""
    root = tmp_path_factory.mktemp("vpt")
    return root, run_job(["vpt_target"], bindings(clip, root, PAIR, **VPT))


@pytest.fixture(scope="module")
def tagged(clip, tmp_path_factory):
    """The root and the scores of a job with a multi-label task."""
    root = tmp_path_factory.mktemp("tagged")
    return root, run_job(["coop_target"], bindings(clip, root, TAGGED, **COOP))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(model_dir: Path) -> dict:
    return artifacts.load_artifact(model_dir / "artifact").config


# --- Training ------------------------------------------------------------------------------------


def test_coop_target_trains_and_records_its_scores(clip, coop, tmp_path):
    root, scores = coop
    folder = root / "coop_target"
    assert set(scores) == set(PAIR) and all(set(x) == {"accuracy"} for x in scores.values())
    found = config(folder)
    assert found["run_names"] == list(PAIR) and found["groups"] == [0, 1]
    assert found["metrics"]["scores"] == scores and found["step"] == 4
    assert found["shapes"] == {"text_context/shared": [2, 2, 16]}
    assert len(found["image_transform_sha256"]) == 64
    classes = {name: list(image_jobs.CLASSES[name]) for name in PAIR}
    assert {name: x["names"] for name, x in found["images"]["tasks"].items()} == classes
    for name in PAIR:
        own = artifacts.load_artifact(folder / "artifacts" / name).config["images"]
        assert own == {**found["images"], "tasks": {name: found["images"]["tasks"][name]}}
    losses = [x for x in lines(folder / "metrics.jsonl") if x["folder"] == "train" and "loss" in x]
    assert [x["step"] for x in losses] == [2, 4]
    assert all({f"loss/{task}" for task in PAIR} <= set(x) for x in losses)
    record = json.loads((folder / "run.jsonl").read_text())
    assert record["trainable_parameters"] == 2 * 2 * 16
    assert set(record["data"]) == set(PAIR)
    run_job(["coop_target"], bindings(clip, tmp_path, PAIR, **COOP, TRAIN_STEPS=0))
    first, last = prompts(tmp_path / "coop_target"), prompts(folder)
    moved = np.abs(np.asarray(last["text_context/shared"] - first["text_context/shared"]))
    assert (moved.max((1, 2)) > 1e-5).all()  # of each run


def test_vpt_target_with_augmentation_trains(vpt):
    root, scores = vpt
    found = config(root / "vpt_target")
    # Three layers of two tokens in each of two runs.
    assert found["shapes"] == {"image_tokens/shared": [2, 6, 24]}
    assert found["metrics"]["scores"] == scores


def test_predictions_beside_metrics_have_names_but_no_files(coop):
    root, _ = coop
    written = lines(root / "coop_target" / "inference_eval" / "job_pets-000004.jsonl")
    assert len(written) == 10
    assert set(written[0]["input"]) == {"targets", "example_names", "task_ids"}
    assert [x["target"] for x in written] == [i % 3 for i in range(10)]
    assert all(len(x["score"]) >= 3 for x in written)


@pytest.mark.slow
def test_resumed_with_augmentation_same_bits(clip, tmp_path):
    # Without evaluations, which would select another best step.
    limit = {"train_script.train.actions": {}, **VPT}
    for steps in (1, 3, 4):
        limit["train_script.train.total_steps"] = steps
        run_job(["vpt_target"], bindings(clip, tmp_path / "parts", PAIR, **limit))
    run_job(["vpt_target"], bindings(clip, tmp_path / "whole", PAIR, **limit))
    whole, parts = (prompts(tmp_path / name / "vpt_target") for name in ("whole", "parts"))
    assert_same_bits(whole, parts)


@pytest.mark.slow
def test_augmentation_changes_training_and_is_part_of_the_fingerprint(clip, vpt, tmp_path):
    root, _ = vpt
    plain = {**VPT, "AUGMENTATION": None}
    run_job(["vpt_target"], bindings(clip, tmp_path, PAIR, **plain))
    one, other = prompts(tmp_path / "vpt_target"), prompts(root / "vpt_target")
    assert any((np.asarray(one[name]) != np.asarray(other[name])).any() for name in one)
    with pytest.raises(ValueError, match=r"(?s)another configuration.*augmentation"):
        run_job(["vpt_target"], bindings(clip, tmp_path, PAIR, **{**VPT, "TRAIN_STEPS": 6}))


@pytest.mark.slow
def test_runs_of_one_job_equal_solo_jobs(clip, coop, tmp_path):
    root, _ = coop
    run_job(["coop_target"], bindings(clip, tmp_path, ["job_shapes"], **COOP))
    (grouped,) = prompts(root / "coop_target").values()
    (solo,) = prompts(tmp_path / "coop_target").values()
    np.testing.assert_allclose(np.asarray(grouped)[1], np.asarray(solo)[0], atol=1e-6)


@pytest.mark.slow
def test_multi_label_task_trains_beside_a_single_label_task(tagged):
    root, scores = tagged
    assert list(scores["job_tags"])[0] == "map_11point"
    assert 0 <= scores["job_tags"]["map_11point"] <= 100
    written = lines(root / "coop_target" / "metrics.jsonl")
    losses = [x["loss/job_tags"] for x in written if x["folder"] == "train" and "loss" in x]
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.slow
def test_few_shot_runs_read_as_many_images_of_each_class(clip, tmp_path):
    runs = ["job_pets_k2_per_class_s1", "job_shapes_k3_s0"]
    run_job(["coop_target"], bindings(clip, tmp_path, runs, **COOP))
    record = json.loads((tmp_path / "coop_target" / "run.jsonl").read_text())
    assert {name: len(rows) for name, rows in record["few_shot"].items()} == {
        runs[0]: 6,
        runs[1]: 3,
    }
    assert len(picture_files.ids(runs[0])) == 6


@pytest.mark.slow
def test_fleet_has_a_run_for_each_task_shot_count_and_rate(clip, tmp_path):
    fleet = {"SHOTS": [2], "SEEDS": [0], "LEARNING_RATES": [0.01, 0.1, 0.3]}
    given = bindings(clip, tmp_path, PAIR, **COOP, **fleet)
    scores = run_job(["coop_target", "runs/fleet"], given)
    names = [f"{task}_k2_s0_lr{rate}" for task in PAIR for rate in (0.01, 0.1, 0.3)]
    assert list(scores) == names
    (table,) = prompts(tmp_path / "coop_target").values()
    run_job(["coop_target", "runs/fleet"], [*given, "train_script.train.total_steps = 0",
            f"ROOT = {str(tmp_path / 'start')!r}"])  # fmt: skip
    (start,) = prompts(tmp_path / "start" / "coop_target").values()
    moved = np.abs(np.asarray(table) - np.asarray(start)).max((1, 2)).reshape(2, 3)
    # Equal images and initial values, so that a larger rate moves the prompt further.
    np.testing.assert_array_equal(np.asarray(start)[0], np.asarray(start)[2])
    assert (np.diff(moved) > 0).all()


@pytest.mark.slow
def test_photos_in_folders_of_several_sizes_train(clip, tmp_path, own_tasks):
    name = image_jobs.register_photos(image_jobs.write_photos(tmp_path / "photos"))
    scores = run_job(["vpt_target"], bindings(clip, tmp_path, [name], **VPT))
    assert list(scores) == [name]
    record = config(tmp_path / "vpt_target")["data"][name]
    assert {split: x["rows"] for split, x in record["splits"].items()} == {
        "train": 7, "validation": 7
    }  # fmt: skip


# --- Stages --------------------------------------------------------------------------------------

UPT_ONLY = ("IMAGE_TOKENS", "MIXER_WIDTH")
UPT = {"CONTEXT_LENGTH": 2, "IMAGE_TOKENS": 2, "MIXER_WIDTH": 8, "STEPS_PER_EPOCH": 1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["upt", "coop", "cocoop"])
def test_mvlpt_target_starts_from_the_mean_of_the_draws_of_the_source_stage(
    clip, tmp_path, method, caplog
):
    files = [] if method == "upt" else [f"methods/{method}"]
    own = {name: x for name, x in UPT.items() if method == "upt" or name not in UPT_ONLY}
    if method == "cocoop":
        own["CONTEXT_INIT"] = "@init.Normal()"
    draws = {"SOURCE_TASKS": list(PAIR), "SHOTS": [2], "SEEDS": [1, 2], "AUGMENTATION": None}
    given = bindings(clip, tmp_path, [], **{**draws, **own})
    run_job(["mvlpt_source", *files], [x for x in given if not x.startswith("TARGET_TASKS")])
    source = prompts(tmp_path / "mvlpt_source")
    assert config(tmp_path / "mvlpt_source")["groups"] == [0, 1, 0, 1]
    assert {len(x) for x in source.values()} == {2}
    moved = [np.abs(x[0] - x[1]).max() for x in source.values()]
    assert max(moved) > 1e-3  # the draws have separate prompts
    with caplog.at_level("WARNING", logger="absl"):
        run_job(["mvlpt_target", *files], bindings(clip, tmp_path, PAIR, **own, TRAIN_STEPS=0))
    assert "its image_transform_sha256 is" in caplog.text  # crop, then squash
    target = prompts(tmp_path / "mvlpt_target")
    assert target.keys() == source.keys()
    for name, value in target.items():
        mean = np.mean(source[name], 0)
        np.testing.assert_allclose(value, np.stack([mean, mean]), rtol=1e-5, atol=1e-7)
    scores = run_job(["mvlpt_target", *files], bindings(clip, tmp_path, PAIR, **own))
    assert set(scores) == set(PAIR)


def test_failed_run_does_not_end_the_evaluation_of_others(clip, coop, tmp_path):
    given = bindings(clip, tmp_path, PAIR, **{**COOP, "EVAL_PERIOD": 2})
    given += [
        "CONTEXT_INIT = {'job_pets': @init.Normal(), 'job_shapes': @infinite/init.Normal()}",
        "infinite/init.Normal.standard_deviation = 1e400",
    ]
    scores = run_job(["coop_target"], given)
    assert scores["job_shapes"] == {"accuracy": 0.0, "accuracy_undefined": 1.0}
    assert scores["job_pets"] == coop[1]["job_pets"]
    status = json.loads((tmp_path / "coop_target" / "fleet.json").read_text())
    assert "failed" in json.dumps(status)


# --- Evaluation and inference --------------------------------------------------------------------


def inference(clip, root, kind, **macros):
    """The bindings of an evaluation or inference of a job's artifact."""
    method = kind.removesuffix("_target")
    given = bindings(
        clip,
        root / "read",
        PAIR,
        **{"CONTEXT_LENGTH": 2} if method == "coop" else {"IMAGE_TOKENS": 2},
        INITIAL_ARTIFACT=str(root / kind / "artifact"),
        GROUPS="independent",
        **{"utils.DatasetConfig.split": "validation"},
        **macros,
    )
    training = ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "SAVE_PERIOD", "STATS_PERIOD")
    files = ["models/prompted_clip", f"methods/{method}"]
    return files, [x for x in given if x.split(" = ")[0] not in training]


@pytest.mark.parametrize("kind", ["coop", pytest.param("vpt", marks=pytest.mark.slow)])
def test_eval_of_artifact_and_checkpoint_gives_the_scores_of_training(clip, kind, request):
    root, expected = request.getfixturevalue(kind)
    files, given = inference(clip, root, f"{kind}_target")
    assert run_job(["eval", *files], given, "eval") == {0: expected}
    checkpoint = str(root / f"{kind}_target" / "checkpoint_4")
    files, given = inference(clip, root, f"{kind}_target", CHECKPOINT_PATH=checkpoint)
    given = [x for x in given if not x.startswith("INITIAL_ARTIFACT")]
    assert run_job(["eval", *files], given, "eval") == {4: expected}


@pytest.mark.parametrize(
    ("macros", "name"),
    [({"IMAGE_MODE": "squash"}, "image_transform"), ({"CONTEXT_POSITION": "front"}, "context_pos")],
)
def test_eval_of_artifact_with_other_inputs_fails(clip, coop, macros, name):
    files, given = inference(clip, coop[0], "coop_target", **macros)
    with pytest.raises(ValueError, match=f"trained with other inputs: its {name}"):
        run_job(["eval", *files], given, "eval")


def test_infer_writes_names_predictions_and_scores(clip, coop):
    root, scores = coop
    found = {}
    for mode in ("predict", "score", "predict_with_aux"):
        files, given = inference(clip, root, "coop_target", **{"infer_script.infer.mode": mode})
        paths = run_job(["infer", *files], given, "infer")
        assert [Path(path).name.split("-")[0] for path in paths] == list(PAIR)
        found[mode] = lines(Path(paths[0]))
    ids = picture_files.ids("job_pets", "validation")
    for written in found.values():
        assert [x["inputs"] for x in written] == [{"example_names": name} for name in ids]
    classes = image_jobs.CLASSES["job_pets"]
    table = np.array([x["score"] for x in found["score"]])
    assert table.shape == (10, 3)
    np.testing.assert_allclose(np.exp(table).sum(1), 1, rtol=1e-5)
    best = [classes[i] for i in table.argmax(1)]
    for mode in ("predict", "predict_with_aux"):
        assert [x["prediction"] for x in found[mode]] == best
    aux = [x["aux"]["scores"] for x in found["predict_with_aux"]]
    np.testing.assert_allclose(aux, table.max(1), rtol=1e-6)
    gold = [classes[i % 3] for i in range(10)]
    right = np.mean([a == b for a, b in zip(best, gold, strict=True)])
    assert 100 * right == pytest.approx(scores["job_pets"]["accuracy"])


@pytest.mark.slow
def test_infer_multi_label_predicts_all_classes_above_one_half(clip, tagged):
    root, _ = tagged
    found = {}
    for mode in ("predict", "score", "predict_with_aux"):
        macros = {"infer_script.infer.mode": mode, "TARGET_TASKS": list(TAGGED)}
        files, given = inference(clip, root, "coop_target", **macros)
        paths = sorted(run_job(["infer", *files], given, "infer"))
        found[mode] = [lines(Path(path)) for path in reversed(paths)]  # of tags, of pets
    tags, pets = image_jobs.CLASSES["job_tags"], image_jobs.CLASSES["job_pets"]
    table = np.array([x["score"] for x in found["score"][0]])
    assert table.shape == (10, 4) and np.shape([x["score"] for x in found["score"][1]]) == (10, 3)
    above = [[name for name, s in zip(tags, row, strict=True) if np.exp(s) > 0.5] for row in table]
    assert any(len(names) != 1 for names in above)
    for mode in ("predict", "predict_with_aux"):
        assert [x["prediction"] for x in found[mode][0]] == above
        assert all(x["prediction"] in pets for x in found[mode][1])
    aux = [x["aux"]["scores"] for x in found["predict_with_aux"][0]]
    np.testing.assert_allclose(aux, table.max(1), rtol=1e-6)


def test_infer_scores_that_are_not_finite_are_written(clip, coop, tmp_path, monkeypatch):
    root, _ = coop
    bad = jnp.array([jnp.nan, -jnp.inf, 0.0])
    monkeypatch.setattr(
        dual_encoder.PromptedDualEncoder,
        "score_batch",
        lambda model, params, batch: jnp.broadcast_to(bad, (len(batch["image"]), 3)),
    )
    macros = {"infer_script.infer.mode": "score", "INFER_OUTPUT_DIR": str(tmp_path)}
    files, given = inference(clip, root, "coop_target", **macros)
    pets, shapes = run_job(["infer", *files], given, "infer")
    for path, number in ((pets, 3), (shapes, 2)):  # of 3 and 2 classes
        for line in lines(Path(path)):
            np.testing.assert_array_equal(line["score"], np.array(bad)[:number])


def test_artifact_holds_prompts_only(coop):
    root, _ = coop
    params = artifacts.load_artifact(root / "coop_target" / "artifact").params
    assert list(flatten(params)) == ["text_context/shared"]

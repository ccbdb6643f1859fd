"""Whole runs of `train()` on in-memory tasks: resuming, stopping, errors and output files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.convert import load_backbone, save_t5x
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.data import datasets
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.evaluation import finalize
from mpt_jax.evaluation.evaluator import InferenceEvaluator
from mpt_jax.models import encoder_decoder, losses
from mpt_jax.prompts.factors import aligned
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.no_prompt import NoPrompt
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.spot import NearestSource
from mpt_jax.training import initialization
from mpt_jax.training.oom import OutOfMemory
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.selection import SelectBest
from mpt_jax.training.trainer import NonFiniteLoss, Trainer
from tests.fixtures import tiny
from tests.fixtures.training_runs import (
    BATCH,
    CONFIG,
    STEPS,
    TASKS,
    P,
    assert_same_bits,
    build,
    dataset,
    prompts,
    run,
)


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    """MODEL_DIR of a run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(backbone, folder, train_eval_dataset_cfg=dataset(Runs(TASKS), split="validation"))
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """MODEL_DIR of the same run, for jobs that write to it."""
    return shutil.copytree(whole, tmp_path / "run")


def test_train_finished_run_writes_documented_files(whole):
    found = {path.name for path in whole.iterdir()}
    assert {"artifact", "run.jsonl", "metrics.jsonl", "train", "training_eval"} <= found
    assert "checkpoint_8" in found
    record = json.loads((whole / "run.jsonl").read_text())
    assert record["trainable_parameters"] == P * 16 + 3 * (P + 16)
    assert set(record["exposure"]) == set(TASKS)
    assert sum(found["share"] for found in record["exposure"].values()) == pytest.approx(1)
    lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    losses_found = [x for x in lines if x["folder"] == "train" and "loss" in x]
    assert [x["step"] for x in losses_found] == [2, 4, 6, 8]  # before every save
    assert {f"loss/{task}" for task in TASKS} <= set(losses_found[-1])
    evaluated = {x["folder"] for x in lines if x["folder"].startswith("training_eval")}
    assert {f"training_eval/{task}" for task in TASKS} <= evaluated


@pytest.mark.slow  # the test below resumes a job that was stopped
def test_train_resumed_same_bits_as_uninterrupted(backbone, whole, tmp_path):
    run(backbone, tmp_path / "parts", steps=4)
    run(backbone, tmp_path / "parts", steps=STEPS)
    assert_same_bits(prompts(whole), prompts(tmp_path / "parts"))


@pytest.mark.slow  # positions of such data are restored in tests/data/test_datasets.py
@pytest.mark.parametrize(
    "changes",
    [
        {"pack": True, "batch_size": 2},
        {"by_length": True, "length_buckets": {"inputs": [2]}},
    ],
)
def test_train_resumed_packed_or_by_length_same_bits(backbone, tmp_path, changes):
    given = {"data": dataset(Runs(TASKS), **changes), "stats_period": 1}
    run(backbone, tmp_path / "whole", **given)
    run(backbone, tmp_path / "parts", steps=3, **given)
    run(backbone, tmp_path / "parts", **given)
    assert_same_bits(prompts(tmp_path / "whole"), prompts(tmp_path / "parts"))
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["folder"] == "train" and "loss" in line]
    per_row = {line["batch/examples_per_row"] for line in steps}
    assert per_row == {2.0} if "pack" in changes else {1.0}
    # An example takes 3 prompt positions and 2 of text, out of 7 (14 if packed).
    padding = [line["batch/encoder_padding"] for line in steps]
    assert padding == pytest.approx([4 / 14 if "pack" in changes else 0.0] * STEPS)


def test_train_sigterm_saves_and_exits_for_retry(backbone, whole, tmp_path):
    class Terminated(Trainer):
        def train(self, batch):
            super().train(batch)
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(backbone, tmp_path / "stopped", trainer_cls=Terminated)
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "stopped" / "checkpoint_3").is_dir()
    run(backbone, tmp_path / "stopped")
    assert_same_bits(prompts(whole), prompts(tmp_path / "stopped"))


def test_train_nan_loss_saves_last_good_state(backbone, whole, tmp_path):
    class Poisoned(Trainer):
        def train(self, batch):
            if self.step == 5:
                weights = np.full_like(batch["decoder_loss_weights"], np.nan, np.float32)
                batch = {**batch, "decoder_loss_weights": weights}
            super().train(batch)

    with pytest.raises(NonFiniteLoss, match="step 5 is not finite"):
        run(backbone, tmp_path / "nan", trainer_cls=Poisoned)
    assert (tmp_path / "nan" / "checkpoint_5").is_dir()
    # Batches after the fifth had been taken; the resumed run starts with the one that failed.
    run(backbone, tmp_path / "nan")
    assert_same_bits(prompts(whole), prompts(tmp_path / "nan"))


def test_train_model_dir_of_other_configuration_error(backbone, finished):
    with pytest.raises(
        ValueError, match=r"another configuration .*random_seed: saved 0, current 7"
    ):
        run(backbone, finished, random_seed=7)
    with pytest.raises(ValueError, match="another configuration"):
        run(backbone, finished, model=build(MPT(P, rank=2)))
    with pytest.raises(ValueError, match=r"objective: saved .*z_loss=0.0.*, current .*z_loss=0.1"):
        run(backbone, finished, model=build(objective=losses.Objective(z_loss=0.1)))


def test_train_other_weights_same_embedding_error(backbone, finished, tmp_path):
    """As after merging a LoRA. Neither resuming nor starting from the artifact is allowed."""
    leaves = flatten(load_backbone(backbone))
    name = "encoder/layers_0/attention/query/kernel"
    other = str(save_t5x(tmp_path, unflatten({**leaves, name: leaves[name] * 1.1}), step=0))
    with pytest.raises(ValueError, match="backbone_sha256: saved '.*', current '"):
        run(other, finished, steps=STEPS + 2)
    origins = {"artifact": str(finished / "artifact")}
    with pytest.raises(ValueError, match="another backbone.*sha256 of its weights is .* is "):
        run(other, tmp_path / "new", steps=2, origins=origins)


def test_train_other_configuration_of_backbone_same_weights_error(backbone, finished, tmp_path):
    """Neither resuming nor starting from the artifact is allowed."""
    recorded = artifacts.load_artifact(finished / "artifact").config["backbone_config"]
    assert recorded == backbone_config(CONFIG)
    other = dataclasses.replace(CONFIG, relative_attention_max_distance=20)
    field = r"relative_attention_max_distance: saved 128, current 20\)"
    with pytest.raises(ValueError, match=rf"another configuration \(backbone_config.{field}"):
        run(backbone, finished, model=build(config=other), steps=STEPS + 2)
    origins = {"artifact": str(finished / "artifact")}
    with pytest.raises(ValueError, match=rf"configuration of its backbone \({field}"):
        run(backbone, tmp_path / "new", model=build(config=other), steps=2, origins=origins)


@pytest.mark.slow
def test_train_digest_switched_off_is_logged_and_recorded(backbone, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        run(backbone, tmp_path / "run", steps=0, origins={"digest_backbone": False})
    assert "Origins.digest_backbone = False: " in caplog.text
    config = artifacts.load_artifact(tmp_path / "run" / "artifact").config
    assert config["backbone_sha256"] is None and config["embedding_sha256"]


@pytest.mark.slow  # compiles a step that trains the backbone
def test_train_artifact_records_trained_backbone(backbone, tmp_path):
    """Prompts that were trained together with a backbone only work with the result."""
    model = build(labels=encoder_decoder.FULL_FINETUNING)
    run(backbone, tmp_path / "run", model, steps=2)
    (made,) = (tmp_path / "run" / "backbone").iterdir()
    found = artifacts.load_artifact(tmp_path / "run" / "artifact").config
    trained = load_backbone(made)
    assert found["backbone_sha256"] == backbone_digest(trained)
    assert found["embedding_sha256"] == artifacts.embedding_digest(
        trained["token_embedder"]["embedding"]
    )
    assert found["backbone_sha256"] != backbone_digest(load_backbone(backbone))
    run(backbone, tmp_path / "run", build(labels=encoder_decoder.FULL_FINETUNING), steps=3)


def test_train_resumed_with_other_artifact_error(backbone, whole, tmp_path):
    run(backbone, tmp_path / "run", steps=2, origins={"artifact": str(whole / "artifact")})
    other = shutil.copytree(tmp_path / "run" / "artifact", tmp_path / "other")
    with pytest.raises(ValueError, match="artifact_sha256: saved .*, current .*"):
        run(backbone, tmp_path / "run", steps=4, origins={"artifact": str(other)})


@pytest.mark.slow
def test_train_resumed_with_other_learning_rate_logged(backbone, tmp_path, caplog):
    run(backbone, tmp_path / "run", steps=2)
    with caplog.at_level("WARNING", logger="absl"):
        run(backbone, tmp_path / "run", steps=4, model=build(rate=0.05))
    assert "'shared.peak': 0.1" in caplog.text and "'shared.peak': 0.05" in caplog.text


@pytest.mark.slow  # the fleet test below starts a finished run of prompts again
def test_train_finished_run_started_again_same_backbone(backbone, tmp_path):
    """The run trains a backbone, which is written again."""
    model = lambda: build(NoPrompt(), reserved=0, labels=encoder_decoder.FULL_FINETUNING)  # noqa: E731
    run(backbone, tmp_path / "run", model(), steps=2)
    (made,) = (tmp_path / "run" / "backbone").iterdir()
    first = (made / "checkpoint").read_bytes()
    run(backbone, tmp_path / "run", model(), steps=2)
    assert (made / "checkpoint").read_bytes() == first


def test_train_missing_inputs_error_names_command(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="No backbone could be loaded.*absent.*make it so"):
        run(str(tmp_path / "absent"), tmp_path / "a", origins={"backbone_command": "make it so"})
    distilled = build(objective=losses.Objective(distillation=losses.Distillation()))
    with pytest.raises(FileNotFoundError, match="To train the teachers, run: .*pt_source"):
        run(backbone, tmp_path / "b", distilled, origins={"teachers": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match="no pretrained backbone"):
        run(None, tmp_path / "c")


def test_train_unwritable_model_dir_error(backbone, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="MODEL_DIR .* cannot be written"):
        run(backbone, tmp_path / "file" / "run")


def test_train_ineffective_settings_error(backbone, tmp_path):
    for setting in ({"use_hardware_rng": True}, {"gc_period": 5}, {"relative_steps": 3}):
        with pytest.raises(ValueError, match="would have no effect"):
            run(backbone, tmp_path / "run", **setting)


@pytest.mark.parametrize(("parts", "message"), [(4, "of 6 rows .* 4 micro"), (0, "0 micro")])
def test_train_microbatches_that_do_not_divide_batch_error_before_data_is_read(
    backbone, tmp_path, monkeypatch, parts, message
):
    read = []
    monkeypatch.setattr(datasets, "train_iterator", lambda *args, **kwargs: read.append(args))
    with pytest.raises(ValueError, match=message):
        run(
            backbone,
            tmp_path / "run",
            trainer_cls=functools.partial(Trainer, num_microbatches=parts),
        )
    assert not read and not (tmp_path / "run").exists()


def test_train_three_stages_start_from_artifacts(backbone, tmp_path):
    """Teachers in one job, the distilled source stage, and a new task from its artifact."""
    independent = Runs(TASKS, groups="independent")
    teachers = build(PromptTuning(P), independent)
    run(backbone, tmp_path / "pt", teachers, data=dataset(independent, EqualQuotas(BATCH, 1)))
    student = build(objective=losses.Objective(distillation=losses.Distillation()))
    origins = {"teachers": str(tmp_path / "pt" / "artifact")}
    run(backbone, tmp_path / "source", student, origins=origins)
    lines = (tmp_path / "source" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines[-2:]]
    terms = {"term/kl", "term/hidden_encoder", "term/hidden_decoder"}
    assert any(terms <= set(line) for line in last)
    (statistics,) = [line for line in last if line["folder"] == "prompt"]
    assert {"left_norm", "right_norm", "sign_agreement", "shared_variance"} <= set(statistics)

    one = Runs(["run_b"])
    artifact = str(tmp_path / "source" / "artifact")
    run(backbone, tmp_path / "target", build(runs=one), 0, {"artifact": artifact},
        data=dataset(one, EqualQuotas(BATCH, 1)))  # fmt: skip
    source, target = prompts(tmp_path / "source"), prompts(tmp_path / "target")
    np.testing.assert_array_equal(target["shared"], source["shared"])
    left, right = aligned(*(np.asarray(source[f"task_{side}"]) for side in ("left", "right")))
    np.testing.assert_allclose(target["task_left"][0], left.mean(0), 1e-5)
    np.testing.assert_allclose(target["task_right"][0], right.mean(0), 1e-5)

    without = build(runs=Runs(["run_a", "run_x"]), objective=student.objective)
    with pytest.raises(ValueError, match="No teacher for the tasks run_x"):
        initialization.initialize_params(
            without, initialization.Origins(backbone, **origins), tiny.jax.random.key(0)
        )


def test_train_spot_starts_from_nearest_source_and_records_it(backbone, tmp_path):
    """The sources include run_c's own early prompt, so that is the nearest."""
    independent = Runs(TASKS, groups="independent")
    data = dataset(independent, EqualQuotas(BATCH, 1))
    for name, steps in (("early", 2), ("sources", 4)):
        run(backbone, tmp_path / name, build(PromptTuning(P), independent), steps, data=data)
    one = Runs(["run_c"])
    early = str(tmp_path / "early" / "artifact")

    def start(**settings):
        method = PromptTuning(P, start_from=NearestSource(early, early, **settings))
        origins = {"artifact": str(tmp_path / "sources" / "artifact")}
        run(backbone, tmp_path / "target", build(method, one), 0, origins,
            data=dataset(one, EqualQuotas(BATCH, 1)))  # fmt: skip
        return artifacts.load_artifact(tmp_path / "target" / "artifact")

    started = start()
    np.testing.assert_array_equal(
        started.params["table"][0], prompts(tmp_path / "sources")["table"][2]
    )
    assert started.config["started_from"]["start_from"] == {"run_c": {"run_c": 1.0}}
    with pytest.raises(ValueError, match=r"start_from: saved .*'run_c': 1.0.*, current .*"):
        start(top_k=2)


@pytest.mark.slow
def test_train_source_stage_with_added_task_keeps_other_tasks(backbone, tmp_path):
    """Its teacher is in a separate artifact; the other tasks start from their trained factors."""
    for name, tasks in (("first", TASKS[:2]), ("second", TASKS[2:])):
        runs = Runs(tasks, groups="independent")
        data = dataset(runs, EqualQuotas(BATCH, 1))
        run(backbone, tmp_path / name, build(PromptTuning(P), runs), 2, data=data)
    teachers = [str(tmp_path / name / "artifact") for name in ("first", "second")]
    objective = losses.Objective(distillation=losses.Distillation())
    two = build(runs=Runs(TASKS[:2]), objective=objective)
    run(backbone, tmp_path / "source", two, 2, {"teachers": teachers[:1]})

    method = MPT(P, start_from="same_or_average")
    origins = {"teachers": teachers, "artifact": str(tmp_path / "source" / "artifact")}
    three = lambda: build(method, objective=objective)  # noqa: E731
    run(backbone, tmp_path / "refreshed", three(), 0, origins)
    old, new = prompts(tmp_path / "source"), prompts(tmp_path / "refreshed")
    np.testing.assert_array_equal(new["shared"], old["shared"])
    names = ("task_left", "task_right")
    averaged = aligned(*(np.asarray(old[name]) for name in names))
    for factor, values in zip(names, averaged, strict=True):
        np.testing.assert_array_equal(new[factor][:2], old[factor])
        np.testing.assert_allclose(new[factor][2], values.mean(0), 1e-5)
    run(backbone, tmp_path / "refreshed", three(), 2, origins)
    trained = prompts(tmp_path / "refreshed")
    assert all(np.any(trained[name] != new[name]) for name in new)


@pytest.mark.slow  # steps: tests/training/test_trainer.py; their data: tests/data/test_datasets.py
def test_train_independent_groups_equal_solo_runs(backbone, tmp_path):
    together = Runs(TASKS[:2], groups="independent")
    run(backbone, tmp_path / "both", build(runs=together),
        data=dataset(together, EqualQuotas(BATCH, 1)))  # fmt: skip
    for row, name in enumerate(TASKS[:2]):
        alone = Runs([name], groups="independent")
        sampler = EqualQuotas(BATCH // 2, 1)
        cfg = dataset(alone, sampler, batch_size=BATCH // 2)
        run(backbone, tmp_path / name, build(runs=alone), data=cfg)
        solo, grouped = prompts(tmp_path / name), prompts(tmp_path / "both")
        for leaf in solo:
            np.testing.assert_allclose(grouped[leaf][row], solo[leaf][0], 1e-5, 1e-5, leaf)


@pytest.mark.slow
def test_train_select_best_keeps_best_step_per_group(backbone, tmp_path):
    model = build(runs=Runs(TASKS, groups="independent"))
    best = SelectBest(model, str(tmp_path / "run"), "accuracy")
    scores = run(
        backbone,
        tmp_path / "run",
        model,
        data=dataset(model.runs, EqualQuotas(BATCH, 1)),
        infer_eval_dataset_cfg=dataclasses.replace(
            dataset(model.runs, split="validation"), shuffle=False
        ),
        actions={"INFER_EVAL": [best]},
    )
    assert set(scores) == set(TASKS)
    assert sorted(best.history) == [4, 8]
    config = artifacts.load_artifact(tmp_path / "run" / "artifact").config
    assert config["metrics"]["best_step"] == best.best_step
    assert config["metrics"]["scores"] == best.scores and config["step"] == max(best.best_step)
    assert (tmp_path / "run" / "inference_eval").is_dir()


def test_train_converter_with_other_prompt_length_error(backbone, tmp_path):
    with pytest.raises(ValueError, match="reserves 3 positions .* 'mpt' has prompts of 4"):
        run(backbone, tmp_path / "run", build(MPT(P + 1)))


@pytest.mark.parametrize("where", ["_dispatch", "_read_metrics"])
def test_train_later_step_out_of_memory_explained(backbone, tmp_path, monkeypatch, where):
    """Batches have several lengths, so the first need not be the largest. A device may report the
    error only when the host reads the metrics."""
    sound = getattr(Trainer, where)

    def exhausted(trainer, *args):
        if trainer.step >= 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
        return sound(trainer, *args)

    monkeypatch.setattr(Trainer, where, exhausted)
    with pytest.raises(OutOfMemory, match="A training step does not fit in device memory"):
        run(backbone, tmp_path)


def test_train_joint_job_rows_not_split_by_run(backbone, tmp_path):
    """The single group ends as a whole, so rows need no fixed positions and may be in any order."""
    joint, made = Runs(TASKS), []

    class Seen(Trainer):
        def __init__(self, **settings):
            made.append(settings["rows_by_run"])
            super().__init__(**settings)

    reverse = Runs(TASKS[::-1])
    data = dataset(reverse, EqualQuotas(BATCH, 1))
    run(backbone, tmp_path, build(runs=joint), 1, data=data, trainer_cls=Seen)
    assert made == [False]


# --- Fleets: runs of one job that end separately --------------------------------------------------

FLEET = Runs(TASKS, groups="independent")


def fleet(totals=(4, 8, 8), peaks=(0.03, 0.03, 0.03)):
    schedule = Schedule(list(peaks), list(totals), decay="linear")
    optimizer = PromptOptimizer(dict.fromkeys(("shared", "task", "backbone"), schedule))
    return build(runs=FLEET, optimizer=optimizer)


def run_fleet(backbone, folder, steps=STEPS, patience=None, scored=False, **settings):
    """Trains a fleet with invented validation scores, which fall after the first evaluation."""
    model = fleet(**settings)
    found = iter(range(99))

    class Falling(SelectBest):
        def run(self, train_state, metrics_by_task):
            value = float(-next(found))
            return super().run(train_state, {run: {"accuracy": value} for run in TASKS})

    best = Falling(model, str(folder), patience=patience)
    return run(
        backbone,
        folder,
        model,
        steps,
        data=dataset(FLEET, EqualQuotas(BATCH, 1)),
        eval_period=2,
        infer_eval_dataset_cfg=dataset(FLEET, split="validation", shuffle=False)
        if patience or scored
        else None,
        actions={"INFER_EVAL": [best]} if patience else {},
    )


def endings(folder):
    found = json.loads((folder / "fleet.json").read_text())["runs"]
    return {each["run"]: (each["state"], each["step"], each["best_step"]) for each in found}


def test_train_fleet_runs_end_separately_resumed_same_bits(backbone, tmp_path):
    for folder, stops in (("whole", [STEPS]), ("parts", [6, STEPS])):
        for steps in stops:
            run_fleet(backbone, tmp_path / folder, steps, peaks=(0.03, 1e38, 0.03))
    assert_same_bits(prompts(tmp_path / "whole"), prompts(tmp_path / "parts"))
    assert endings(tmp_path / "whole") == endings(tmp_path / "parts") == {
        "run_a": ("finished", 4, 4), "run_b": ("failed", 1, None), "run_c": ("finished", 8, 8),
    }  # fmt: skip
    # A failed run that was never selected leaves no artifact; each other run leaves its own.
    assert {path.name for path in (tmp_path / "whole" / "artifacts").iterdir()} == {
        "run_a",
        "run_c",
    }
    joint = artifacts.load_artifact(tmp_path / "whole" / "artifact")
    assert joint.runs.run_names == ("run_a", "run_c") and joint.runs.num_groups == 2
    for row, name in enumerate(joint.runs.run_names):
        own = artifacts.load_artifact(tmp_path / "whole" / "artifacts" / name)
        assert own.runs == Runs([name]) and own.config["step"] == (4, 8)[row]
        np.testing.assert_array_equal(own.folded()[0], joint.folded()[row])


@pytest.mark.slow
def test_train_fleet_run_that_ended_early_equals_solo_run_and_starts_others(backbone, tmp_path):
    run_fleet(backbone, tmp_path / "whole", peaks=(0.03, 1e38, 0.03))
    joint = artifacts.load_artifact(tmp_path / "whole" / "artifact")
    alone = Runs(["run_a"], groups="independent")
    schedule = Schedule(0.03, 4, decay="linear")
    optimizer = PromptOptimizer(dict.fromkeys(("shared", "task", "backbone"), schedule))
    cfg = dataset(alone, EqualQuotas(BATCH // 3, 1), batch_size=BATCH // 3)
    run(backbone, tmp_path / "alone", build(runs=alone, optimizer=optimizer), 4, data=cfg)
    solo = artifacts.load_artifact(tmp_path / "alone" / "artifact").folded()
    np.testing.assert_allclose(joint.folded()[:1], solo, 1e-5, 1e-5)
    # Other runs can start from the artifact of one run.
    again = run_fleet(backbone, tmp_path / "whole", scored=True)  # trains no further
    assert set(again) == set(TASKS)
    start = {"artifact": str(tmp_path / "whole" / "artifacts" / "run_a")}
    run(backbone, tmp_path / "next", build(), 2, start)


@pytest.mark.slow
def test_train_fleet_extended_resumes_finished_runs(backbone, tmp_path):
    """All runs had ended, each with its own schedule, so nothing was left to train."""
    run_fleet(backbone, tmp_path / "run", 4, totals=(2, 4, 4))
    first = prompts(tmp_path / "run")
    run_fleet(backbone, tmp_path / "run", 8, totals=(4, 8, 4))
    assert endings(tmp_path / "run") == {
        "run_a": ("finished", 6, 6), "run_b": ("finished", 8, 8), "run_c": ("finished", 4, 4),
    }  # fmt: skip
    last = prompts(tmp_path / "run")
    for name, leaf in first.items():
        changed = [bool((np.asarray(last[name])[row] != leaf[row]).any()) for row in range(3)]
        assert changed == [True, True, False], name


@pytest.mark.slow
def test_train_fleet_all_runs_failed_exports_best_steps(backbone, tmp_path, monkeypatch):
    too_high, read, sound = (1e38, 1e38, 1e38), [], finalize.outcomes
    monkeypatch.setattr(finalize, "outcomes", lambda *args: read.append(1) or sound(*args))
    with pytest.raises(NonFiniteLoss):
        run_fleet(backbone, tmp_path / "none", peaks=too_high)
    assert set(endings(tmp_path / "none").values()) == {("failed", 1, None)}
    assert not (tmp_path / "none" / "artifact").exists()
    folder = tmp_path / "some"
    run_fleet(backbone, folder, 2, patience=9)
    first = prompts(folder)
    with pytest.raises(NonFiniteLoss):
        run_fleet(backbone, folder, patience=9, peaks=too_high)
    assert set(endings(folder).values()) == {("failed", 3, 2)} and not finalize.all_ended(folder)
    assert_same_bits(prompts(folder), first)
    assert artifacts.load_artifact(folder / "artifacts" / "run_b").config["step"] == 2
    assert len(read) == 3, "once for each job, however many artifacts it writes"
    # The card of a run counts only its own trained parameters.
    for name, runs in (("artifact", 3), ("artifacts/run_b", 1)):
        card = (folder / name / "README.md").read_text()
        count = sum(leaf.size for leaf in first.values()) // 3 * runs
        assert f"| trainable parameters | {count:,} |" in card


@pytest.fixture
def evaluations(monkeypatch):
    """The step of each evaluation, the names of the tasks in it, and what all would have scored."""
    calls = []

    def evaluate(self, predict_fn, score_fn, step, task_names=None):
        everything = of_evaluator(self, predict_fn, score_fn, step)
        found = of_evaluator(self, predict_fn, score_fn, step, task_names)
        assert found == {name: everything[name] for name in task_names}
        calls.append((step, list(task_names), everything))
        return found

    of_evaluator = InferenceEvaluator.evaluate
    monkeypatch.setattr(InferenceEvaluator, "evaluate", evaluate)
    return calls


@pytest.mark.slow
def test_train_fleet_ended_runs_are_evaluated_once_more_and_keep_their_scores(
    backbone, tmp_path, evaluations
):
    scores = run_fleet(backbone, tmp_path / "run", 8, scored=True, peaks=(0.03, 1e38, 0.03))
    assert [(step, names) for step, names, _ in evaluations] == [
        (2, list(TASKS)), (4, ["run_a", "run_c"]), (6, ["run_c"]), (8, ["run_c"]),
    ]  # fmt: skip
    assert scores == evaluations[-1][-1], "what all runs would have scored in the end"


@pytest.mark.slow
def test_train_fleet_patience_ends_runs_then_job(backbone, tmp_path, evaluations):
    run_fleet(backbone, tmp_path / "run", patience=[2, 1, 1], totals=(9, 9, 9))
    assert [(step, names) for step, names, _ in evaluations] == [
        (2, list(TASKS)), (4, list(TASKS)), (6, ["run_a"]),
    ]  # fmt: skip
    assert endings(tmp_path / "run") == {
        "run_a": ("finished", 6, 2), "run_b": ("finished", 4, 2), "run_c": ("finished", 4, 2),
    }  # fmt: skip
    assert (tmp_path / "run" / "checkpoint_6").is_dir(), "no run was left to train to step 8"
    config = artifacts.load_artifact(tmp_path / "run" / "artifacts" / "run_b").config
    assert config["metrics"]["best_step"] == [2] and config["metrics"]["best_score"] == [0]
    assert list(config["metrics"]["scores"]) == ["run_b"]

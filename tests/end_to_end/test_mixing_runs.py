"""Runs of ATTEMPT and CrossPT on in-memory tasks: resuming, evaluating, and errors."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.checkpointing import checkpoint_config, restore_states
from mpt_jax.core.runs import Runs
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.prompts.materialize import plain_prompts
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from tests.fixtures import tiny
from tests.fixtures.saved_artifacts import save
from tests.fixtures.training_runs import (
    BATCH,
    STEPS,
    TASKS,
    P,
    assert_same_bits,
    build,
    dataset,
    prompts,
    run,
)

SOURCES = ("first", "second", "third")
ONE_APIECE = Runs(TASKS, groups="independent")


@pytest.fixture(scope="module")
def sources(backbone, tmp_path_factory):
    """Artifacts of random source prompts: two of this backbone, one longer, one of another."""
    folder = tmp_path_factory.mktemp("sources")
    embedding = artifacts.embedding_digest(tree(backbone)["token_embedder"]["embedding"])

    def save_source(name, seed, length=P, digest=embedding):
        rng = np.random.default_rng(seed)
        table = rng.normal(size=(len(SOURCES), length, tiny.WIDTH))
        save(
            folder / name,
            PromptTuning(length),
            {"table": table},
            Runs([f"{name}_{run}" if name != "one" else run for run in SOURCES]),
            embedding_sha256=digest,
            vocabulary_sha256=None,
        )
        return str(folder / name)

    return {
        "one": save_source("one", 0),
        "longer": save_source("longer", 1, P + 1),
        "foreign": save_source("foreign", 2, digest="0" * 64),
    }


def tree(backbone):
    model = build(PromptTuning(P))
    return initialization.initialize_params(
        model, initialization.Origins(backbone), jax.random.key(0)
    ).params


def mixing(method, runs=ONE_APIECE, **settings):
    """A model with one of the two methods."""
    return build(method, runs, optimizer=tiny.optimizer(0.1), **settings)


def attempt(**settings) -> ATTEMPT:
    return ATTEMPT(P, SOURCES, **{"width": 4, "temperature": 4.0, **settings})


def crosspt(**settings) -> CrossPT:
    return CrossPT(P, SOURCES, **{"annealing": Annealing(steps=3), **settings})


def train(backbone, folder, model, artifact=None, **settings):
    origins = {"artifact": artifact} if artifact else {}
    data = dataset(model.runs, EqualQuotas(BATCH, 1), **settings.pop("data", {}))
    run(backbone, folder, model, origins=origins, data=data, **settings)


def restored(backbone, model, path="", artifact=None) -> dict[str, jax.Array]:
    """The prompt parameters that evaluation reads, from a MODEL_DIR or only an artifact."""
    origins = initialization.Origins(backbone, artifact=artifact and str(artifact))
    cfg = checkpoint_config.RestoreCheckpointConfig(str(path), "latest" if path else "specific")
    (state,) = restore_states.states(model, origins, PjitPartitioner(), cfg)
    return state.params["prompt"]


# --- Resuming ------------------------------------------------------------------------------------


@pytest.mark.slow  # that of prompts without a mix is in tests/test_train.py
@pytest.mark.parametrize(
    ("method", "from_artifact", "groups"),
    [
        pytest.param(
            method,
            from_artifact,
            groups,
            id=f"{name}-{groups}",
        )
        for name, method, from_artifact in (
            ("attempt", attempt(), True),
            ("crosspt", crosspt(share="learned"), True),
            ("crosspt through MLPs", crosspt(reparameterize=["sources", "private"]), False),
        )
        for groups in ("joint", "independent")
    ],
)
def test_mixing_run_resumed_same_bits_as_uninterrupted(
    method, from_artifact, groups, backbone, sources, tmp_path
):
    """This includes sampled prompts, whose temperature depends on a counter in the checkpoint."""
    artifact = sources["one"] if from_artifact else None
    for folder, stops in (("whole", [STEPS]), ("parts", [3, STEPS])):
        for steps in stops:
            model = mixing(method, Runs(TASKS, groups=groups))
            train(backbone, tmp_path / folder, model, artifact, steps=steps)
    whole = prompts(tmp_path / "whole")
    assert_same_bits(whole, prompts(tmp_path / "parts"))
    kept = {name for name in whole if not name.endswith(("_in", "_out"))}
    assert set(whole) == kept and "clock" not in whole, "an artifact has no more than it needs"
    model = mixing(method, Runs(TASKS, groups=groups))
    if "clock" in (found := restored(backbone, model, tmp_path / "parts", artifact)):
        np.testing.assert_array_equal(found["clock"], STEPS)


# --- Evaluating ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attempted(backbone, sources, tmp_path_factory):
    """MODEL_DIR of a short run of ATTEMPT."""
    folder = tmp_path_factory.mktemp("attempted")
    train(backbone, folder, mixing(attempt()), sources["one"], steps=2)
    return folder


@pytest.fixture(scope="module")
def crossed(backbone, sources, tmp_path_factory):
    """MODEL_DIR of a run of CrossPT that has not trained."""
    folder = tmp_path_factory.mktemp("crossed")
    train(backbone, folder, mixing(crosspt()), sources["one"], steps=0)
    return folder


def test_attempt_checkpoint_and_artifact_same_prompts(backbone, attempted):
    model = mixing(attempt(start_from="same"))
    by_checkpoint = restored(backbone, model, attempted, attempted / "artifact")
    by_artifact = restored(backbone, model, artifact=attempted / "artifact")
    assert_same_bits(by_checkpoint, by_artifact)
    assert "sources" in prompts(attempted), "the artifact holds what is frozen"


@pytest.mark.slow
def test_crosspt_sampled_prompts_checkpoint_equals_artifact(backbone, sources, tmp_path):
    method = crosspt(share="learned", top_k=2)
    train(backbone, tmp_path, mixing(method), sources["one"], steps=6)
    same = dataclasses.replace(method, start_from="same")
    found = [
        plain_prompts(same, restored(backbone, mixing(same), *where), ONE_APIECE)
        for where in ((tmp_path,), ("", tmp_path / "artifact"))
    ]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(found[0], artifacts.load_artifact(tmp_path / "artifact").folded())


def test_attempt_checkpoint_needs_artifact_for_frozen_sources(
    backbone, sources, attempted, tmp_path
):
    with pytest.raises(ValueError, match="no artifact provides them.*that its job wrote"):
        restored(backbone, mixing(attempt()), attempted)
    from_start = restored(backbone, mixing(attempt()), attempted, sources["one"])
    assert_same_bits(from_start, prompts(attempted))
    other = tmp_path / "other"
    train(backbone, other, mixing(attempt()), renamed(sources["one"], tmp_path / "x"), steps=0)
    with pytest.raises(
        ValueError, match="frozen_prompts_sha256: saved '[0-9a-f]+', current '[0-9a-f]+'"
    ):
        restored(backbone, mixing(attempt(start_from="same")), attempted, other / "artifact")


def renamed(path, to) -> str:
    """The same names, other prompts."""
    found = artifacts.load_artifact(path)
    save(
        to,
        found.method,
        {"table": -found.params["table"]},
        found.runs,
        **{name: found.config[name] for name in ("embedding_sha256", "vocabulary_sha256")},
    )
    return str(to)


# --- Errors --------------------------------------------------------------------------------------


def filled(backbone, method, artifact=None, runs=ONE_APIECE):
    origins = initialization.Origins(backbone, artifact=artifact)
    return initialization.initialize_params(mixing(method, runs), origins, jax.random.key(0))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (attempt(), None, r"mixes frozen .* so no artifact provides them\. Set INITIAL"),
        (attempt(), "longer", r"longer has prompts of 4 positions, but this job needs 3"),
        (crosspt(), "longer", r"longer has prompts of 4 positions, but this job needs 3"),
        (attempt(), "foreign", "foreign was trained on another backbone"),
        (attempt(), ["one", "longer"], "prompt length differs: 3 in .*one; 4 in .*longer"),
        (crosspt(), ["one", "foreign"], "backbone .* differs: [0-9a-f]+ in .*one; 0+ in .*foreign"),
        (attempt(), ["one", "one"], "both hold a prompt of 'first'. Leave one artifact out"),
        (ATTEMPT(P, ["first", "forth"]), "one", "Unknown run 'forth'.* Known: first, second"),
        (CrossPT(P, ["firts"]), "one", "Unknown run 'firts'. Did you mean 'first'"),
        (attempt(start_from="fourth"), "one", "Unknown run 'fourth'"),
        (crosspt(reparameterize=["sources"]), "one", r"Set REPARAMETERIZE = \[\]"),
        (CrossPT(P, SOURCES, "private"), "one", "'private' has no source prompts to init"),
    ],
)  # fmt: skip
def test_mixing_run_incompatible_start_error_says_why(method, given, message, backbone, sources):
    if given is not None:
        given = [sources[x] for x in given] if isinstance(given, list) else sources[given]
    with pytest.raises(ValueError, match=message):
        filled(backbone, method, given)


def test_attempt_artifact_as_plain_prompt_error(backbone, attempted):
    artifact = str(attempted / "artifact")
    for method in (PromptTuning(P), CrossPT(P, TASKS), PromptTuning(P, start_from="same")):
        with pytest.raises(ValueError, match="depend on the text that follows them"):
            filled(backbone, method, artifact)
    with pytest.raises(ValueError, match="depend on the text that follows them"):
        artifacts.load_artifact(artifact).folded()
    with pytest.raises(ValueError, match="initial artifact .attention: saved 'sub', current 'dot'"):
        filled(backbone, attempt(attention="dot"), artifact)


@pytest.mark.parametrize("method", [attempt(start_from="same"), crosspt(start_from="same")])
def test_mixing_run_task_missing_in_artifact_error(method, backbone, attempted, crossed):
    artifact = (attempted if isinstance(method, ATTEMPT) else crossed) / "artifact"
    with pytest.raises(ValueError, match="Unknown run 'run_d'.* Known: run_a, run_b, run_c"):
        filled(backbone, method, str(artifact), Runs(["run_d"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 4}, "top_k is 4, but the router has 3 candidates: first, second, third"),
        ({"top_k": 0}, "top_k is 0"),
        (
            {"compose_by": "private_cat", "private_length": {}},
            "private_length must be None, a number of",
        ),
        (
            {"compose_by": "private_cat", "private_length": 0},
            "private_length must be None, a number of",
        ),
        ({"compose_by": "sums"}, "Unknown CrossPT.compose_by 'sums'. Did you mean"),
        ({"compose_by": "cat", "share": 0.5}, "share = 0.5 would have no effect"),
    ],
)
def test_crosspt_invalid_settings_error(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossPT(P, SOURCES, **settings)


def test_crosspt_annealing_longer_than_shortest_run_error(backbone, tmp_path):
    optimizer = dataclasses.replace(
        tiny.optimizer(),
        learning_rates={
            label: dataclasses.replace(schedule, total_steps=[9, 5, 9])
            for label, schedule in tiny.optimizer().learning_rates.items()
        },
    )
    method = crosspt(annealing=Annealing(steps=6))
    short = r"anneals over 6 steps, but a run has only 5, .*\(ANNEALING_STEPS\)"
    with pytest.raises(ValueError, match=short):
        train(backbone, tmp_path, build(method, ONE_APIECE, optimizer=optimizer))
    with pytest.raises(ValueError, match=short):
        train(str(tmp_path / "before anything is read"), tmp_path, mixing(method), steps=5)


def test_crosspt_too_few_prompt_positions_error(backbone, tmp_path):
    cat = crosspt(compose_by="cat")
    with pytest.raises(ValueError, match="reserves 3 positions .* 'crosspt' has prompts of 9"):
        train(backbone, tmp_path, mixing(cat))
    model = mixing(cat, reserved=3 * P)
    converter = model.FEATURE_CONVERTER_CLS(pack=True, pack_lengths={"inputs": 12, "targets": 3})
    with pytest.raises(
        ValueError, match=r"pack_lengths\['inputs'\] is 12, .* 13 .*prompt_length 9"
    ):
        converter.get_model_feature_lengths({"inputs": 4, "targets": 3})


# --- Private prompts of several lengths ----------------------------------------------------------


OWN = {"run_a": 1, "run_b": 4, "run_c": 2}


def test_crosspt_private_lengths_artifacts_keep_their_length(backbone, tmp_path):
    """With the settings of the whole fleet, and with only the run's own."""
    method = crosspt(compose_by="private_cat", private_length=OWN)
    train(backbone, tmp_path, mixing(method, reserved=P + 4), steps=6)
    whole = artifacts.load_artifact(tmp_path / "artifact").plain()
    assert [len(prompt) for prompt in whole] == [P + OWN[run] for run in TASKS]
    for row, run_name in enumerate(TASKS):
        artifact = str(tmp_path / "artifacts" / run_name)
        for lengths in (OWN, {run_name: OWN[run_name]})[: 2 if row == 1 else 1]:
            same = dataclasses.replace(method, private_length=lengths, start_from="same")
            one = Runs([run_name])
            found = filled(backbone, same, artifact, one).params["prompt"]
            (plain,) = plain_prompts(same, found, one)
            np.testing.assert_array_equal(plain, whole[row])
    other = dataclasses.replace(method, private_length=OWN | {"run_a": 3}, start_from="same")
    with pytest.raises(ValueError, match="'run_a' has 3 positions.* it would start from, has 1"):
        filled(backbone, other, str(tmp_path / "artifact"))
    lacking = dataclasses.replace(method, private_length={"run_a": 1, "run_b": 4})
    with pytest.raises(ValueError, match="PRIVATE_LENGTH has no entry for the run 'run_c'"):
        mixing(lacking, reserved=P + 4).FEATURE_CONVERTER_CLS(pack=False)


def test_crosspt_other_normalization_of_artifact_error(backbone, crossed):
    other = crosspt(normalize="sum", start_from="same")
    words = "differ from those of the initial artifact .normalize: saved 'softmax', current 'sum'"
    with pytest.raises(ValueError, match=words):
        filled(backbone, other, str(crossed / "artifact"))


def test_crosspt_trainable_parameters_exclude_step_counter(crossed):
    record = json.loads((crossed / "run.jsonl").read_text())
    numbers = len(TASKS) * (len(SOURCES) * P * 16 + P * 16 + len(SOURCES))
    assert record["trainable_parameters"] == numbers
    card = (crossed / "artifacts" / "run_a" / "README.md").read_text()
    assert f"{numbers // len(TASKS)}" in card

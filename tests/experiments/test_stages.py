"""SPoT stages and prompt tuning recipes: models from gin files, and two-step toy runs that pass
artifacts to each other."""

from __future__ import annotations

import json
from pathlib import Path

import gin
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.config import gin_utils
from mpt_jax.data import sampling
from mpt_jax.prompts.factors import aligned
from mpt_jax.prompts.spot import NearestSource
from mpt_jax.runtime import paths
from tests.fixtures.gin_files import VOCABULARY, parse, trained, value
from tests.fixtures.processes import run_script

ROOT = Path(__file__).resolve().parents[2]
TEACHERS = paths.shipped(name="tiny_t5/teachers")
SOURCE = paths.shipped(name="tiny_t5/mpt_source")
FEW = {"BATCH_SIZE": 14, "EVALUATOR_NUM_EXAMPLES": 4, "EVAL_STEPS": 1}


# --- Models from gin files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "period"),
    # 20 epochs of BoolQ, evaluated after each; 40,000 steps, evaluated every 1,000.
    [("pt_paper", 20 * 9_427 // 32 + 1, 9_427 // 32 + 1), ("pt_strong", 40_000, 1_000)],
)
def test_prompt_tuning_recipes_have_published_settings(name, steps, period):
    parse(["gin/pt_target.gin", f"gin/methods/{name}.gin"], [VOCABULARY])
    optimizer = value("MODEL").optimizer_def
    rate = optimizer.learning_rates["task"]
    assert (rate.peak, rate.warmup_steps, rate.total_steps) == (0.3, 500, steps)
    assert (optimizer.weight_decay, value("BATCH_SIZE")) == (1e-5, 32)
    assert gin.query_parameter("train.eval_period").scoped_selector == "EVAL_PERIOD/gin.macro"
    assert value("EVAL_PERIOD") == period


def test_spot_target_selects_by_similarity_or_named_source():
    settings = ["SPOT_TOP_K = 3", "SPOT_SIMILARITY = 'row_pairs'"]
    parse(["gin/spot_target.gin", "gin/tiny.gin"], settings)
    choice = value("MODEL").prompt.start_from
    folder = value("ROOT")
    assert choice == NearestSource(
        f"{folder}/spot_source_embeddings/artifact",
        f"{folder}/spot_embeddings/artifact",
        top_k=3,
        similarity="row_pairs",
    )
    assert value("INITIAL_ARTIFACT") == value("SOURCE_TEACHERS")
    named = "START_FROM = 'toy_mnli'"
    parse(["gin/spot_target.gin", "gin/tiny.gin"], [named])
    assert value("MODEL").prompt.start_from == "toy_mnli"


@pytest.mark.parametrize("name", ["gin/spot_embeddings.gin", "gin/spot_source_embeddings.gin"])
def test_spot_embeddings_stage_ignores_train_steps(name):
    parse([name], [VOCABULARY])
    model = value("MODEL")
    rate = model.optimizer_def.learning_rates["task"]
    for step in (500, 10_000, 10**6):
        assert float(rate(jnp.asarray(step))) == pytest.approx(0.3)
    assert gin.query_parameter("train.total_steps").scoped_selector == "EMBEDDING_STEPS/gin.macro"
    assert value("EMBEDDING_STEPS") == 10_000
    for evaluation in ("infer_eval_dataset_cfg", "train_eval_dataset_cfg"):
        assert gin.query_parameter(f"train.{evaluation}") is None
    assert gin.query_parameter("train.actions") == {}, "keeps the last step, not the best"
    with pytest.raises(gin_utils.ConfigError, match="No gin file reads the macro TRAIN_STEPS"):
        parse([name], ["TRAIN_STEPS = 5"])


def test_spot_mixture_has_no_teacher_and_samples_per_example():
    parse(["gin/spot_mixture.gin"], [VOCABULARY])
    model = value("MODEL")
    assert trained(model) == 76_800 and not model.has_teacher
    assert value("SAMPLER") == sampling.PerExample(32, 42)


# --- Toy runs ------------------------------------------------------------------------------------

# Runs in a separate process, like the command line, without shape checks.
SCRIPT = """
import json, sys
from mpt_jax.config import gin_utils
for name, macros in json.loads(sys.argv[1]):
    bindings = [f"{macro} = {value!r}" for macro, value in macros.items()]
    gin_utils.run_stage([f"gin/{name}.gin", "gin/tiny.gin"], bindings)
"""


def run(root: Path, *stages: tuple[str, dict]) -> list[artifacts.Artifact]:
    """Runs (gin file, macros) one after another below a root; returns their artifacts."""
    run_script(SCRIPT, json.dumps(stages), **{paths.ROOT_VARIABLE: str(root)})
    return [artifacts.load_artifact(folder(root, *stage)) for stage in stages]


def folder(root: Path, name: str, macros: dict) -> str:
    return str(root / "tiny" / macros.get("STAGE", name) / "artifact")


@pytest.mark.slow
def test_spot_target_starts_from_nearest_sources(tmp_path):
    targets = ["toy_boolq", "toy_rte"]
    early = {"BATCH_SIZE": 12, "EMBEDDING_STEPS": 2}
    spot = {**FEW, "TARGET_TASKS": targets, "SPOT_TOP_K": 2}
    sources, embedded, start, end = run(
        tmp_path,
        ("spot_source_embeddings", early),
        ("spot_embeddings", {**early, "TARGET_TASKS": targets}),
        ("spot_target", {**spot, "TRAIN_STEPS": 0, "STAGE": "start"}),
        ("spot_target", {**spot, "TRAIN_STEPS": 2}),
    )
    assert sources.config["step"] == embedded.config["step"] == 2
    assert not sources.config["metrics"]["scores"], "an embedding has no score"
    full = artifacts.load_artifact(TEACHERS)
    assert full.runs.run_names == sources.runs.run_names
    s, t = (artifact.folded().astype(np.float64).mean(1) for artifact in (sources, embedded))
    for row, target in enumerate(targets):
        similarities = s @ t[row] / np.linalg.norm(s, axis=1) / np.linalg.norm(t[row])
        nearest = np.argsort(-similarities)[:2]
        weights = similarities[nearest] / similarities[nearest].sum()
        recorded = end.config["started_from"]["start_from"][target]
        assert set(recorded) == {full.runs.run_names[source] for source in nearest}
        expected = np.tensordot(weights, full.folded()[nearest], 1)
        np.testing.assert_allclose(start.params["table"][row], expected, atol=1e-4)
        assert np.any(end.params["table"][row] != start.params["table"][row])


@pytest.mark.slow
def test_pt_target_starts_from_spot_mixture_prompt(tmp_path):
    mixture = ("spot_mixture", {**FEW, "TRAIN_STEPS": 2})
    started = {**FEW, "INITIAL_ARTIFACT": folder(tmp_path, *mixture), "TRAIN_STEPS": 0}
    source, target = run(tmp_path, mixture, ("pt_target", started))
    assert (source.method.name, source.runs.num_rows) == ("shared_prompt", 6)
    np.testing.assert_allclose(target.params["table"], source.params["shared"], rtol=1e-6)


@pytest.mark.slow
def test_mpt_source_seventh_source_extends_shipped_prompts(tmp_path):
    """The commands of docs/methods/mpt.md, "Refresh"."""
    shipped = artifacts.load_artifact(SOURCE)
    teacher = ("pt_source", {**FEW, "SOURCE_TASKS": ["toy_rte"], "STAGE": "pt_rte"})
    teacher[1]["TRAIN_STEPS"] = 2
    refresh = {
        **FEW,
        "SOURCE_TASKS": [*shipped.runs.run_names, "toy_rte"],
        "TEACHERS": [TEACHERS, folder(tmp_path, *teacher)],
        "INITIAL_ARTIFACT": SOURCE,
        "START_FROM": "same_or_average",
    }
    _, start, end = run(
        tmp_path,
        teacher,
        ("mpt_source", {**refresh, "TRAIN_STEPS": 0, "STAGE": "start"}),
        ("mpt_source", {**refresh, "TRAIN_STEPS": 2, "STAGE": "refreshed"}),
    )
    np.testing.assert_array_equal(start.params["shared"], shipped.params["shared"])
    names = ("task_left", "task_right")
    averaged = aligned(*(np.asarray(shipped.params[name]) for name in names))
    for factor, old in zip(names, averaged, strict=True):
        np.testing.assert_array_equal(start.params[factor][:6], shipped.params[factor])
        np.testing.assert_allclose(start.params[factor][6], old.mean(0), atol=1e-6)
    assert list(end.runs.run_names) == refresh["SOURCE_TASKS"]
    assert all(np.any(end.params[name] != start.params[name]) for name in end.params)

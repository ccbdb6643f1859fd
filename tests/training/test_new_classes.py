"""Evaluation of new classes with the prompts that were trained on base classes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.prompts.base import PromptContext
from mpt_jax.prompts.cocoop import CoCoOp
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.prompts.upt import UPT, PromptTransformer
from mpt_jax.training.initialization import Origins, initialize_params
from tests.fixtures import clip_models, saved_artifacts, tiny_clip, tiny_lanes

KEY, CONFIG, WIDE = jax.random.PRNGKey(0), clip_models.shallow(), Uniform(0.5)
SCRATCH = Origins(scratch=True)
BASE = tuple(
    TaskClasses(f"{x}_base", ("cat", "dog", "small bird"), ("the {}.",)) for x in ("a", "b")
)
NEW = tuple(TaskClasses(f"{x}_new", ("square", "disc"), ("the {}.",)) for x in ("b", "a"))
# Not in the order of the base runs.
TABLE = {"b_new": "b_base", "a_new": "a_base"}
P, TOKENS, LAYERS = tiny_clip.CONTEXT, 4, 2


def prompts(name, start):
    """A method, whose runs start as `start` says."""
    shared = lambda length: SharedPrompt(length, WIDE, start)  # noqa: E731
    return {
        "coop": lambda: SitePrompts(shared(P)),
        "vpt": lambda: SitePrompts(None, shared(TOKENS), image_layers=LAYERS),
        "upt": lambda: UPT(
            *(shared(P), shared(TOKENS)), image_layers=LAYERS, transformer=PromptTransformer(8)
        ),
        "cocoop": lambda: SitePrompts(CoCoOp(P, WIDE, start)),
        "mpt": lambda: SitePrompts(
            MPT(P, 2, WIDE, start_from=start), MPT(TOKENS, 1, WIDE, start_from=start), 0, LAYERS
        ),
        "prompt_tuning": lambda: SitePrompts(PromptTuning(P, WIDE, start)),
        "contexts of classes": lambda: SitePrompts(PromptTuning(3 * P, WIDE, start), None, 3),
    }[name]()


def made(method, tasks, groups="independent"):
    texts = tiny_clip.texts(P if method.text_context is not None else 0, tasks=tasks)
    runs = Runs([task.task for task in tasks], groups=groups)
    return tiny_clip.model(method, runs, texts=texts, config=CONFIG)


def trained(path, method):
    """Saves an artifact of the base runs; returns the model, its parameters and the origins of a
    job that reads it."""
    model = made(method, BASE)
    loaded = initialize_params(model, SCRATCH, KEY)
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32)  # noqa: E731
    prompt = jax.tree.map(draw, loaded.params["prompt"])
    saved_artifacts.save(path, method, prompt, model.runs, **loaded.digests)
    return model, prompt, dataclasses.replace(SCRATCH, artifact=str(path))


@pytest.mark.parametrize("name", ["coop", "vpt", "upt", "cocoop", "mpt", "prompt_tuning"])
def test_composed_prompts_are_those_of_the_base_runs(name, tmp_path):
    base, prompt, origins = trained(tmp_path / "base", prompts(name, "same"))
    model = made(prompts(name, TABLE), NEW)
    loaded = initialize_params(model, origins, KEY, evaluates_artifact=True)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10)), jnp.float32)
    params = jax.tree.map(jnp.asarray, loaded.params["prompt"])
    given = PromptContext(image_features=features)
    for site in model.prompt.parts:
        found = model.prompt.compose_site(site, params, model.runs, jnp.arange(2), given)
        turned = jnp.array([1, 0])  # b, a
        expected = base.prompt.compose_site(site, prompt, base.runs, turned, given)
        np.testing.assert_array_equal(found, expected)
        assert np.abs(expected[0] - expected[1]).max() > 0.1


@pytest.mark.parametrize("name", ["coop", "cocoop", "upt"])
def test_runs_that_would_share_a_prompt_are_refused(name, tmp_path):
    _, _, origins = trained(tmp_path / "base", prompts(name, "same"))
    for start, tasks in ((TABLE, NEW), ("same", BASE)):
        model = made(prompts(name, start), tasks, "joint")
        with pytest.raises(ValueError, match="are in one group .*GROUPS = 'independent'"):
            initialize_params(model, origins, KEY, evaluates_artifact=True)
    same = dict.fromkeys(TABLE, "a_base")
    model = made(prompts(name, same), NEW, "joint")
    assert initialize_params(model, origins, KEY, evaluates_artifact=True).params["prompt"]


def test_contexts_of_classes_are_refused(tmp_path):
    name = "contexts of classes"
    _, _, origins = trained(tmp_path / "base", prompts(name, "same"))
    model = made(prompts(name, TABLE), NEW)
    words = r"context for each class of a_base, b_base, and none for those of b_new.*TEXT_CLASSES"
    with pytest.raises(ValueError, match=words):
        initialize_params(model, origins, KEY, evaluates_artifact=True)


def test_heads_are_refused(tmp_path):
    base = tiny_lanes.model(tiny_lanes.method(classes=3), BASE)
    loaded = initialize_params(base, SCRATCH, KEY)
    saved_artifacts.save(
        tmp_path / "base", base.prompt, loaded.params["prompt"], base.runs, **loaded.digests
    )
    origins = dataclasses.replace(SCRATCH, artifact=str(tmp_path / "base"))
    model = tiny_lanes.model(tiny_lanes.method(classes=3, start_from=TABLE), NEW)
    with pytest.raises(ValueError, match="no head for the run 'b_new', only for a_base, b_base"):
        initialize_params(model, origins, KEY, evaluates_artifact=True)
    assert initialize_params(model, origins, KEY).params["prompt"]  # a new head is trained

"""Initial parameters and the fingerprint of a dual encoder's job."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.checkpointing import fingerprint
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.models.dual_encoder import FEATURES
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from mpt_jax.training.initialization import InitialParams, Origins, initialize_params
from mpt_jax.training.state import param_shapes
from tests.fixtures import clip_models, saved_artifacts, tiny_clip

KEY = jax.random.PRNGKey(0)
SCRATCH = Origins(scratch=True)
CONFIG = clip_models.shallow()
SHARED = SitePrompts(SharedPrompt(3, Uniform()), SharedPrompt(4, Uniform()), image_layers=2)
SOURCES = Runs(["pets", "shapes"], ["p", "s"])


def made(method=SHARED, runs=SOURCES, **settings):
    return tiny_clip.model(method, runs, **{"config": CONFIG, **settings})


@functools.cache
def scratch():
    """A job from a random backbone."""
    return initialize_params(made(), SCRATCH, KEY)


def saved(path, method=SHARED, **digests):
    """An artifact of a job from the same random backbone, and its parameters."""
    prompt = made(method).init_prompt(KEY, jnp.asarray(made().embedding(scratch().params)))
    saved_artifacts.save(path, method, prompt, SOURCES, **{**scratch().digests, **digests})
    return dataclasses.replace(SCRATCH, artifact=str(path)), prompt


def test_initialize_params_with_text_prompt_has_whole_backbone():
    loaded = scratch()
    assert sorted(loaded.params) == ["image_encoder", "logit_scale", "prompt", "text_encoder"]
    assert loaded.params["logit_scale"] == pytest.approx(2.6593, abs=1e-4)
    what = ("embedding", "backbone", "vocabulary", "image_transform", "context_position")
    assert set(loaded.digests) == {f"{name}_sha256" for name in what}
    assert all(len(digest) == 64 for digest in loaded.digests.values())


def test_initialize_params_frozen_texts_replace_text_tower():
    """The digest of the backbone is that of the whole backbone in both cases."""
    model = made(tiny_clip.prompts(text=False, layers=2))
    loaded = initialize_params(model, SCRATCH, KEY)
    assert sorted(loaded.params) == [FEATURES, "image_encoder", "logit_scale", "prompt"]
    table = loaded.params[FEATURES]["table"]
    assert table.shape == (5, 10) and table.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 1, atol=1e-6)
    of_text = scratch().digests
    assert loaded.digests == {x: y for x, y in of_text.items() if x != "context_position_sha256"}


@pytest.mark.parametrize("sites", [(TEXT, IMAGE), (TEXT,)], ids=["both", "text"])
def test_initialize_params_from_artifact(tmp_path, sites):
    origins, prompt = saved(tmp_path / "a")
    parts = {TEXT: PromptTuning(3, Uniform()), IMAGE: PromptTuning(4, Uniform())}
    method = SitePrompts(**{site: parts[site] for site in sites}, image_layers=2)
    runs = Runs(["shapes", "shapes"], ["x", "y"], "independent")
    loaded = initialize_params(made(method, runs), origins, KEY)
    assert sorted(loaded.params["prompt"]) == sorted(sites)
    for site in sites:
        shared = np.asarray(prompt[site]["shared"])
        expected = np.concatenate([shared, shared])
        np.testing.assert_array_equal(loaded.params["prompt"][site]["table"], expected)
    started = loaded.started_from
    assert started is not None and len(started["artifact_sha256"]) == 64
    assert started["start_from"] == dict.fromkeys(sites, "average")


@pytest.mark.parametrize(
    ("length", "digests", "words"),
    [
        (6, {}, "prompts of 9 positions, but this job needs 7"),
        (4, {"embedding_sha256": "0" * 64}, "another backbone"),
    ],
)
def test_initialize_params_from_other_artifact_fails(tmp_path, length, digests, words):
    method = SitePrompts(
        SharedPrompt(3, Uniform()), SharedPrompt(length, Uniform()), image_layers=2
    )
    origins, _ = saved(tmp_path / "a", method, **digests)
    with pytest.raises(ValueError, match=words):
        initialize_params(made(), origins, KEY)


@pytest.mark.parametrize("name", ["image_transform_sha256", "context_position_sha256"])
def test_initialize_params_other_inputs_warn_in_training_and_fail_in_evaluation(
    tmp_path, name, caplog
):
    """MVLPT crops images of source tasks and squashes those of target tasks."""
    method = SitePrompts(SharedPrompt(3, Uniform()), SharedPrompt(4, Uniform()), image_layers=2)
    origins, prompt = saved(tmp_path / "a", method, **{name: "0" * 64})
    with caplog.at_level("WARNING", logger="absl"):
        loaded = initialize_params(made(method), origins, KEY)
    assert f"other inputs: its {name} is {'0' * 64}, but that of this job is" in caplog.text
    shared = flatten(loaded.params["prompt"])["text_context/shared"]
    np.testing.assert_array_equal(shared, flatten(prompt)["text_context/shared"])
    with pytest.raises(ValueError, match=f"other inputs: its {name}"):
        initialize_params(made(method), origins, KEY, evaluates_artifact=True)


def test_initialize_params_scalars_of_the_backbone_stay_float32():
    """ln 100 in bfloat16 would make all logits one percent smaller."""
    config = dataclasses.replace(clip_models.tiny(), dtype="bfloat16")
    loaded = initialize_params(tiny_clip.model(config=config), SCRATCH, KEY)
    dtypes = {name: leaf.dtype for name, leaf in flatten(loaded.params).items()}
    assert dtypes.pop("logit_scale") == np.float32
    backbone = {str(x) for name, x in dtypes.items() if not name.startswith("prompt/")}
    assert backbone == {"bfloat16"}


# --- Fingerprint ---------------------------------------------------------------------------------


class Crops:
    def __init__(self, scale):
        self.scale = scale

    def config(self):
        return {"scale": self.scale}


def of(function=fingerprint.run_fingerprint, **settings):
    """The fingerprint of a job, whose backbone has made-up digests."""
    model = tiny_clip.model(settings.pop("prompt", None), **settings)
    digests = model.input_digests
    loaded = InitialParams(tiny_clip.params(model), "e", "b", "v", input_digests=digests)
    arguments = (8, 0, {}) if function is fingerprint.run_fingerprint else ()
    found = function(model, loaded, *arguments)
    assert json.loads(json.dumps(found)) == found
    return found


def test_fingerprint_of_same_job_resumes():
    made = of(augmentation=Crops(0.08))
    fingerprint.check_can_resume(made, of(augmentation=Crops(0.08)), "RUN")
    assert made["method"] == "site_prompts" and made["augmentation"] == {"scale": 0.08}


OTHER = TaskClasses("pets", ("cat", "dog", "bird"))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"augmentation": Crops(0.5)}, "augmentation"),
        ({"softmax": "union"}, "objective"),
        ({"prompt": tiny_clip.prompts(image=False)}, "method_config"),
        ({"texts": tiny_clip.texts(tasks=(OTHER, tiny_clip.SHAPES))}, "class_texts_sha256"),
        ({"texts": tiny_clip.texts(position="middle")}, "class_texts_sha256"),
    ],
)
def test_fingerprint_of_other_job_fails(settings, field):
    with pytest.raises(ValueError, match=f"RUN .*{field}"):
        fingerprint.check_can_resume(of(), of(**settings), "RUN")


def test_fingerprint_of_other_transform_cannot_be_restored():
    class Squash(tiny_clip.Transform):
        def config(self):
            return {**super().config(), "mode": "squash"}

    ours, saved = (
        of(fingerprint.model_fingerprint, image_transform=transform)
        for transform in (tiny_clip.Transform(), Squash())
    )
    fingerprint.check_can_restore(ours, ours, "CHECKPOINT")
    with pytest.raises(ValueError, match="CHECKPOINT .*image_transform_sha256"):
        fingerprint.check_can_restore(ours, saved, "CHECKPOINT")


@pytest.mark.slow
def test_scanned_backbone_has_the_same_logits():
    """Layers of both towers in a loop: the same parameters, stacked."""
    plain = tiny_clip.model()
    config = dataclasses.replace(plain.module.config, scan_layers=True)
    scanned, params = tiny_clip.model(config=config), tiny_clip.params(plain)
    backbone = {k: v for k, v in params.items() if k != "prompt"}
    stacked = {**jax.tree.map(jnp.asarray, stack_layers(backbone)), "prompt": params["prompt"]}
    batch = tiny_clip.batch([0, 1], [0, 0])
    first, second = jax.jit(plain.logits)(params, batch), jax.jit(scanned.logits)(stacked, batch)
    np.testing.assert_allclose(first[0], second[0], atol=1e-5)
    shapes = {name: x.shape for name, x in flatten(stacked).items()}
    assert {name: x.shape for name, x in flatten(param_shapes(scanned)[0]).items()} == shapes

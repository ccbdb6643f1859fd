"""Bank of class texts: entries of runs, and published parameter counts of prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.clip import CLIP
from mpt_jax.backbones.clip.config import image_prompt_scale
from mpt_jax.backbones.clip.published import clip_config
from mpt_jax.core.runs import Runs
from mpt_jax.models.class_bank import ClassBank, cosines
from mpt_jax.models.class_texts import TaskClasses, class_texts
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.prompts.init import Normal, Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.training.state import num_params, num_trainable_params, param_shapes
from tests.fixtures import tiny_clip

RUNS = Runs(["shapes", "pets", "shapes"], ["s1", "p1", "s2"], groups=[0, 1, 1])
RNG = np.random.default_rng(0)


def bank(prompted):
    return ClassBank.of(tiny_clip.texts(3 if prompted else 0), RUNS, prompted)


def test_class_bank_prompted_has_pairs_of_runs_and_classes():
    made = bank(True)
    assert made.row.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert made.class_number.tolist() == [3, 4, 0, 1, 2, 3, 4], "texts are in order of tasks"
    assert made.first.tolist() == [0, 2, 5] and made.count.tolist() == [2, 3, 2]


def test_class_bank_frozen_has_classes():
    made = bank(False)
    assert made.class_number.tolist() == [0, 1, 2, 3, 4]
    assert made.first.tolist() == [3, 0, 3] and made.count.tolist() == [2, 3, 2]


@pytest.mark.parametrize("prompted", [True, False])
def test_class_bank_masks(prompted):
    made, ids = bank(prompted), jnp.array([1, 0, 2, 1])
    assert made.is_own(ids).tolist() == [[True] * 3, *[[True, True, False]] * 2, [True] * 3]
    pets, shapes = ([1, 1, 1, 0, 0], [0, 0, 0, 1, 1])
    if prompted:
        expected = {0: [1, 1, 0, 0, 0, 0, 0], 1: [0, 0, 1, 1, 1, 1, 1]}
    else:  # both groups have a run of shapes
        expected = {0: shapes, 1: [a + b for a, b in zip(pets, shapes, strict=True)]}
    found = np.asarray(made.competes(ids)).astype(int).tolist()
    assert found == [expected[1], expected[0], expected[1], expected[1]]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("runs", [3, 9])
def test_own_cosines_match_numpy(prompted, runs):
    """A bank that is large in relation to a task uses another product."""
    many = Runs(["shapes", "pets", *["shapes"] * (runs - 2)], [f"r{i}" for i in range(runs)])
    made = ClassBank.of(tiny_clip.texts(3 if prompted else 0), many, prompted)
    images = RNG.normal(size=(4, 6)).astype(np.float32)
    texts = RNG.normal(size=(len(made.row), 6)).astype(np.float32)
    rows = [1, 0, runs - 1, 1]
    found = made.own_cosines(jnp.asarray(images), jnp.asarray(texts), {"task_ids": jnp.array(rows)})
    for i, row in enumerate(rows):
        own = texts[made.first[row] : made.first[row] + made.count[row]]
        np.testing.assert_allclose(found[i, : len(own)], own @ images[i], rtol=1e-5, atol=1e-5)
    product = cosines(jnp.asarray(images), jnp.asarray(texts))
    np.testing.assert_allclose(product, images @ texts.T, rtol=1e-5, atol=1e-5)
    picked = made.own_entries(product, jnp.array(rows))
    np.testing.assert_array_equal(picked[0], product[0, made.first[1] : made.first[1] + 3])


def test_cosines_not_finite_only_in_own_rows_and_columns():
    images, texts = jnp.ones((3, 2)).at[1, 0].set(jnp.nan), jnp.ones((4, 2)).at[2, 1].set(jnp.inf)
    bad = np.isnan(cosines(images, texts))
    assert bad.tolist() == [[c == 2 or r == 1 for c in range(4)] for r in range(3)]
    weights = jnp.where(bad, 0.0, 1.0)
    loss = lambda *x: jnp.where(bad, 0.0, cosines(*x) * weights).sum()  # noqa: E731
    for grads in jax.grad(loss, (0, 1))(images, texts):
        assert np.isfinite(grads).all()
    np.testing.assert_array_equal(jax.grad(loss)(images, texts)[0], [3, 3])


def test_class_bank_of_unknown_task_fails():
    with pytest.raises(ValueError, match="'plants'"):
        ClassBank.of(tiny_clip.texts(), Runs(["plants"]), True)


# --- Sizes of the published models ---------------------------------------------------------------

B16, L14 = "clip_vit_b16", "clip_vit_l14"


def full_size(name, prompt):
    config = clip_config(name)
    method = prompt.text_context
    context = method.prompt_length // (prompt.text_classes or 1) if method else 0
    tasks = [
        TaskClasses("pets", ("cat", "dog", "bird"), ("a {}.",)),
        TaskClasses("shapes", ("square", "disc"), ("a {}.",)),
    ]
    texts = class_texts(tasks, tiny_clip.Tokenizer(), 77, context)
    return PromptedDualEncoder(CLIP(config), prompt, Runs(["pets"]), texts)


def coop(length, classes=0):
    return SitePrompts(PromptTuning(length * (classes or 1), Normal()), text_classes=classes)


def vpt(length, layers):
    tokens = PromptTuning(length * layers, Uniform())
    return SitePrompts(image_tokens=tokens, image_layers=layers)


def mcoop_mvpt(length, tokens, layers):
    shared = SharedPrompt(tokens * layers, Uniform())
    return SitePrompts(SharedPrompt(length, Normal()), shared, image_layers=layers)


@pytest.mark.parametrize(
    ("name", "prompt", "count"),
    [
        (B16, coop(16), 8_192),
        pytest.param(B16, coop(4), 2_048, marks=pytest.mark.slow),
        pytest.param(B16, coop(16, 3), 3 * 8_192, marks=pytest.mark.slow),
        (L14, coop(16), 12_288),
        (B16, vpt(16, 12), 147_456),
        pytest.param(B16, vpt(16, 1), 12_288, marks=pytest.mark.slow),
        pytest.param(B16, vpt(4, 12), 36_864, marks=pytest.mark.slow),
        (L14, vpt(16, 24), 393_216),
        (B16, mcoop_mvpt(4, 4, 12), 2_048 + 36_864),
        (B16, SitePrompts(MPT(16, 1, Normal())), 8_192 + 528),
        (B16, SitePrompts(None, MPT(192, 1, Uniform()), image_layers=12), 147_456 + 960),
    ],
)
def test_num_trainable_params_as_published(name, prompt, count):
    model = full_size(name, prompt)
    shapes, _ = param_shapes(model)
    assert num_trainable_params(model, shapes) == count
    whole = {B16: 149_620_737, L14: 427_616_513}[name]
    if prompt.text_context:
        assert num_params(shapes) == whole + count
    else:
        # The features of five classes replace the text tower, 63,428,096 of B/16.
        assert shapes["class_features"]["table"].shape == (5, {B16: 512, L14: 768}[name])
        assert "text_encoder" not in shapes
        if name == B16:
            assert num_params(shapes) == whole - 63_428_096 + 5 * 512 + count


@pytest.mark.parametrize(
    ("name", "bound"), [(B16, 0.0625), ("clip_vit_b32", 0.0395), (L14, 0.0610)]
)
def test_image_prompt_scale_as_published(name, bound):
    assert image_prompt_scale(clip_config(name)) == pytest.approx(bound, abs=5e-5)

"""CoCoOp: the context of each image, its meta-net, and texts that are encoded for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_losses import ClassObjective
from mpt_jax.prompts.base import (
    PromptContext,
    get_method,
    method_from_config,
    method_names,
    row_axes,
)
from mpt_jax.prompts.cocoop import CoCoOp
from mpt_jax.prompts.init import Normal
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import IMAGE, TEXT, SiteContext, SitePrompts
from tests.fixtures import tiny, tiny_clip

P, H, U = 3, 6, 48
KEY = jax.random.PRNGKey(0)
RUNS = Runs(["a", "b", "c"], groups=[0, 1, 0])
CONTEXT = SiteContext(jnp.ones((30, H)), None, 10, U)


def randomized(method=None, runs=RUNS):
    rng = np.random.default_rng(0)
    params = (CoCoOp(P) if method is None else method).init(KEY, runs, CONTEXT)
    return {n: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)) for n, x in params.items()}


def test_compose_matches_numpy():
    params, rng = randomized(), np.random.default_rng(1)
    rows, features = np.array([[2, 1], [0, 1]]), rng.normal(size=(2, 2, U)).astype(np.float32)
    given = PromptContext(image_features=jnp.asarray(features))
    found = CoCoOp(P).compose(params, RUNS, jnp.asarray(rows), given)
    for place in np.ndindex(2, 2):
        own = {n: np.asarray(x[RUNS.group_of_row[rows[place]]]) for n, x in params.items()}
        hidden = np.maximum(features[place] @ own["kernel_in"] + own["bias_in"], 0)
        expected = own["shared"] + hidden @ own["kernel_out"] + own["bias_out"]
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "width", "joint", "count"), [(4, 512, 512, 35_360), (16, 512, 512, 41_504)]
)
def test_num_params_as_published(length, width, joint, count):
    context = SiteContext(jnp.zeros((9, width)), None, 768, joint)
    shapes = jax.eval_shape(lambda: CoCoOp(length).init(KEY, Runs(["a"]), context))
    assert sum(x.size for x in shapes.values()) == count
    assert shapes["kernel_in"].shape == (1, joint, joint // 16)


def test_initial_values_are_torchs():
    context = SiteContext(jnp.zeros((9, 512)), None, 768, 512)
    params = CoCoOp(4).init(KEY, Runs(["a"]), context)
    assert float(params["shared"].std()) == pytest.approx(0.02, rel=0.1)
    for name in ("kernel_in", "bias_in", "kernel_out", "bias_out"):
        bound = (512 if name.endswith("in") else 32) ** -0.5
        assert 0.85 * bound < float(jnp.abs(params[name]).max()) <= bound


def test_transfer():
    params = randomized()
    method, runs = CoCoOp(P, start_from="same"), Runs(["b", "a"], groups="independent")
    started = method.transfer(params, method, RUNS, runs)
    for name, value in started.items():
        np.testing.assert_array_equal(value, params[name][jnp.asarray([1, 0])])
    coop = PromptTuning(P, Normal())
    table = coop.init(KEY, RUNS, CONTEXT)
    initial = lambda: method.init(KEY, runs, CONTEXT)  # noqa: E731
    started = method.transfer(table, coop, RUNS, runs, initial)
    np.testing.assert_array_equal(started["shared"], table["table"][jnp.asarray([1, 0])])
    np.testing.assert_array_equal(started["kernel_in"], initial()["kernel_in"])


def test_protocol():
    method = CoCoOp(P)
    assert get_method("cocoop") is CoCoOp and method.reads_input
    assert "cocoop" not in method_names()  # which all take texts
    assert method_from_config("cocoop", method.config(), "FILE") == method
    params = method.init(KEY, RUNS, CONTEXT)
    assert sorted(method.axes) == sorted(params)
    assert set(row_axes(method).values()) == {"groups"}
    with pytest.raises(ValueError, match="'cocoop' depend on the image, so a task has no single"):
        materialize(method, params, RUNS)
    with pytest.raises(ValueError, match="depends on the feature of an image. Pass it as"):
        method.compose(params, RUNS, jnp.arange(3))


def test_only_as_one_context_of_images():
    for settings in ({IMAGE: CoCoOp(P)}, {TEXT: CoCoOp(2 * P), "text_classes": 2}):
        with pytest.raises(ValueError, match="can only compose one context for all classes"):
            SitePrompts(**settings)
    with pytest.raises(ValueError, match="but this model has no images"):
        tiny.params(tiny.model(Runs(["a"]), CoCoOp(tiny.PROMPT)))


# --- Model ---------------------------------------------------------------------------------------


def made(softmax="own", image=False, runs=tiny_clip.RUNS):
    prompt = SitePrompts(
        CoCoOp(tiny_clip.CONTEXT, Normal(0.5)), PromptTuning(2, Normal(0.3)) if image else None
    )
    return tiny_clip.model(prompt, runs, softmax)


def params_of(model):
    """Parameters with a meta-net whose hidden unit is active."""
    params = tiny_clip.params(model)
    context = params["prompt"][TEXT]
    active = {name: 0.5 + jnp.abs(context[name]) for name in ("bias_in", "kernel_out")}
    return {**params, "prompt": {**params["prompt"], TEXT: {**context, **active}}}


@pytest.mark.parametrize(
    ("softmax", "image"),
    [
        ("union", True),
        pytest.param("own", True, marks=pytest.mark.slow),
        pytest.param("own", False, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_coop_with_the_context_of_each_image(softmax, image):
    """The oracle: for each image, a model with its context as a plain one."""
    model, batch = made(softmax, image), tiny_clip.batch([0, 1, 0], [1, 1, 2])
    params = params_of(model)
    found = jax.jit(model.logits)(params, batch)
    features = model.image_features(params, batch)
    given = PromptContext(image_features=features)
    ids = batch["task_ids"]
    contexts = model.prompt.compose_site(TEXT, params["prompt"], model.runs, ids, given)
    assert np.ptp(np.asarray(contexts), axis=0).max() > 0.01  # they differ
    plain = tiny_clip.model(
        SitePrompts(PromptTuning(tiny_clip.CONTEXT), model.prompt.image_tokens),
        softmax=softmax,
    )
    plain_logits = jax.jit(plain.logits)
    for number in range(3):
        table = jnp.stack([contexts[number]] * 2)
        prompt = {**params["prompt"], TEXT: {"table": table}}
        one = {name: x[number : number + 1] for name, x in batch.items()}
        expected = plain_logits({**params, "prompt": prompt}, one)
        np.testing.assert_allclose(found[number], expected[0], rtol=1e-4, atol=1e-4)


def test_gradients_match_finite_differences():
    model, batch = made(), tiny_clip.batch([0, 1, 0], [1, 1, 2])
    params = params_of(model)

    def loss(prompt):
        sums, _ = model.loss_sums({**params, "prompt": prompt}, batch)
        return sums["cross_entropy"].sum()

    compiled = jax.jit(loss)
    gradients = flatten(jax.jit(jax.grad(loss))(params["prompt"]))
    for name, gradient in gradients.items():
        place = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        assert abs(gradient[place]) > 1e-3, name

        def moved(step, name=name, place=place):
            prompt = jax.tree.map(lambda x: x, params["prompt"])
            leaf = name.split("/")[1]
            prompt[TEXT][leaf] = prompt[TEXT][leaf].at[place].add(step)
            return float(compiled(prompt))

        slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
        assert slope == pytest.approx(float(gradient[place]), rel=2e-2), name


def test_evaluation_encodes_texts_for_each_image():
    model, batch = made(), tiny_clip.batch([0, 1], [1, 1])
    params = params_of(model)
    assert model.params_for_evaluation(params) is params
    scores = jax.jit(model.score_batch)(params, batch)
    np.testing.assert_allclose(np.exp(scores).sum(-1), 1, rtol=1e-5)
    assert ClassObjective().softmax == "own"


def test_initial_meta_nets_differ_between_groups_and_depend_on_names_only():
    names = ["a_s0", "a_s1"]
    both = CoCoOp(P).init(KEY, Runs(["a", "a"], names, "independent"), CONTEXT)
    assert not np.array_equal(both["kernel_in"][0], both["kernel_in"][1])
    for row, name in enumerate(names):
        alone = CoCoOp(P).init(KEY, Runs(["a"], [name]), CONTEXT)
        for part, values in alone.items():
            np.testing.assert_array_equal(both[part][row], values[0])

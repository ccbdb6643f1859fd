"""UPT: the transformer against torch, and prompts of both sites that pass through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.prompts.base import method_from_config, row_axes
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.init import Normal, Uniform
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import IMAGE, TEXT, SiteContext, SitePrompts
from mpt_jax.prompts.upt import TRANSFORMER, UPT, PromptTransformer

P, H, WIDTH, LAYERS, D = 3, 6, 10, 2, 8
KEY = jax.random.PRNGKey(0)
RUNS = Runs(["a", "b", "c"], groups=[0, 1, 0])
CONTEXT = SiteContext(jnp.ones((30, H)), None, WIDTH)
WIDTHS = {TEXT: H, IMAGE: WIDTH}


def made(part=SharedPrompt, **settings):
    return UPT(
        part(P, Normal(1.0)),
        part(P * LAYERS, Uniform(1.0)),
        image_layers=LAYERS,
        transformer=PromptTransformer(D, **settings),
    )


def randomized(method, runs=RUNS, seed=0):
    """Parameters of the shapes that `init` returns, all random."""
    rng = np.random.default_rng(seed)
    like = flatten(method.init(KEY, runs, CONTEXT))
    values = {
        name: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)) for name, x in like.items()
    }
    return unflatten(values)


def by_numpy(transformer, params, prompts):
    """The module docstring's formula in float64."""
    get = lambda name: np.asarray(params[name], np.float64)  # noqa: E731
    dense = lambda layer, x: x @ get(f"{layer}/kernel") + get(f"{layer}/bias")  # noqa: E731

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * get(f"{layer}/scale") + get(f"{layer}/bias")

    def attention(x):
        query, key, value = (dense(name, x) for name in ("query", "key", "value"))
        scores = query @ key.T / np.sqrt(x.shape[-1])
        if transformer.mixing == "none":
            scores = np.where(np.eye(len(x)) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return dense("attention_out", weights / weights.sum(-1, keepdims=True) @ value)

    def mlp(x):
        hidden = dense("mlp_in", x)
        return dense("mlp_out", hidden / (1 + np.exp(-1.702 * hidden)))

    x = np.concatenate([dense(f"{site}_in", np.asarray(rows)) for site, rows in prompts.items()])
    if transformer.block == "pre_ln":
        x = x + attention(norm("norm_1", x))
        x = x + mlp(norm("norm_2", x))
    else:
        x = attention(x) + norm("norm_1", x)
        x = mlp(norm("norm_2", x)) + norm("norm_2", x)
    text, image = np.split(x, [len(prompts[TEXT])])
    return {TEXT: dense(f"{TEXT}_out", text), IMAGE: dense(f"{IMAGE}_out", image)}


# --- Transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["tokens", "none"])
@pytest.mark.parametrize("block", ["pre_ln", "upt_paper"])
def test_transformer_matches_numpy(mixing, block):
    method = made(mixing=mixing, block=block)
    own = jax.tree.map(lambda x: x[1], randomized(method)[TRANSFORMER])
    rng = np.random.default_rng(1)
    prompts = {TEXT: rng.normal(size=(3, H)), IMAGE: rng.normal(size=(6, WIDTH))}
    prompts = {site: jnp.asarray(x, jnp.float32) for site, x in prompts.items()}
    found = jax.jit(method.transformer)(own, prompts)
    expected = by_numpy(method.transformer, flatten(own), prompts)
    for site in (TEXT, IMAGE):
        np.testing.assert_allclose(found[site], expected[site], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mixing", "reached"), [("tokens", 9), ("none", 1)])
def test_transformer_tokens_reach_each_other_unless_as_in_the_release(mixing, reached):
    """In MVLPT's code, text and image prompts never meet."""
    method = made(mixing=mixing)
    own = jax.tree.map(lambda x: x[0], randomized(method)[TRANSFORMER])
    prompts = {TEXT: jnp.ones((3, H)), IMAGE: jnp.ones((6, WIDTH))}
    before = method.transformer(own, prompts)
    after = method.transformer(own, {**prompts, TEXT: prompts[TEXT].at[1].add(1.0)})
    changed = [(np.asarray(after[x]) != np.asarray(before[x])).any(-1) for x in (TEXT, IMAGE)]
    assert np.concatenate(changed).sum() == reached and changed[0][1]


def test_transformer_initial_values_are_torchs():
    params = PromptTransformer().init([KEY], {TEXT: 512, IMAGE: 768})
    bounds = {
        f"{TEXT}_in/kernel": 512**-0.5,
        f"{IMAGE}_in/bias": 768**-0.5,
        f"{IMAGE}_out/kernel": 128**-0.5,
        "query/kernel": (6 / (128 + 3 * 128)) ** 0.5,
        "attention_out/kernel": 128**-0.5,
        "mlp_out/kernel": 512**-0.5,
    }
    for name, bound in bounds.items():
        largest = float(jnp.abs(params[name]).max())
        assert 0.97 * bound < largest <= bound, name
    for name in ("query/bias", "value/bias", "attention_out/bias", "norm_1/bias"):
        assert not params[name].any()
    assert (params["norm_2/scale"] == 1).all() and params["mlp_in/bias"].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mixing": "token"}, "MIXING.*'token'"),
        ({"block": "post_ln"}, "MIXER_BLOCK.*'post_ln'"),
        ({"width": 0}, "width must be at least 1, got 0. Raise MIXER_WIDTH"),
    ],
)
def test_transformer_settings_out_of_range_error(settings, words):
    with pytest.raises(ValueError, match=words):
        PromptTransformer(**settings)


# --- Method --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "image_width", "count"), [(512, 768, 566_400), (768, 1024, 760_448)]
)
def test_upt_num_params_as_published(width, image_width, count):
    layers = 12 if width == 512 else 24
    method = UPT(
        SharedPrompt(4, Normal()), SharedPrompt(4 * layers, Uniform(0.1)), image_layers=layers
    )
    context = SiteContext(jnp.zeros((9, width)), None, image_width)
    shapes = jax.eval_shape(lambda: method.init(KEY, Runs(["a", "b"]), context))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_upt_composes_what_its_transformer_returns():
    method = made()
    params = randomized(method)
    ids = jnp.asarray([[2, 1], [0, 2]])
    for row in range(3):
        group = RUNS.group_of_row[row]
        own = {name: x[group] for name, x in flatten(params[TRANSFORMER]).items()}
        prompts = {site: params[site]["shared"][group] for site in (TEXT, IMAGE)}
        expected = by_numpy(method.transformer, own, prompts)
        text = method.compose_site(TEXT, params, RUNS, ids)[np.asarray(ids) == row]
        image = method.compose_site(IMAGE, params, RUNS, ids)[np.asarray(ids) == row]
        assert image.shape[1:] == (LAYERS, P, WIDTH)
        for found in text:
            np.testing.assert_allclose(found, expected[TEXT], rtol=1e-4, atol=1e-4)
        for found in image:
            of_layers = expected[IMAGE].reshape(LAYERS, P, WIDTH)
            np.testing.assert_allclose(found, of_layers, rtol=1e-4, atol=1e-4)


def test_upt_one_group_equals_groups_with_equal_parameters():
    method = made(PromptTuning)
    joint = Runs(["a", "b", "c"])
    params = method.init(KEY, joint, CONTEXT)
    three = Runs(["a", "b", "c"], groups="independent")
    repeated = {
        **params,
        TRANSFORMER: jax.tree.map(lambda x: jnp.repeat(x, 3, 0), params[TRANSFORMER]),
    }
    for site in (TEXT, IMAGE):
        found = method.compose_site(site, repeated, three, jnp.arange(3))
        expected = method.compose_site(site, params, joint, jnp.arange(3))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_upt_separated_prompts_need_no_transformer():
    method = made()
    params = randomized(method)
    plain, tables = method.separated(params, RUNS)
    assert type(plain) is SitePrompts and sorted(tables) == sorted([TEXT, IMAGE])
    for site in (TEXT, IMAGE):
        np.testing.assert_array_equal(
            plain.compose_site(site, tables, RUNS, jnp.arange(3)),
            method.compose_site(site, params, RUNS, jnp.arange(3)),
        )
    # A job without a transformer starts from these.
    target = SitePrompts(PromptTuning(P), PromptTuning(P * LAYERS), image_layers=LAYERS)
    runs = Runs(["c"], ["c"])
    one = SitePrompts(
        PromptTuning(P, start_from="c"),
        PromptTuning(P * LAYERS, start_from="c"),
        image_layers=LAYERS,
    )
    started = one.transfer(params, method, RUNS, runs)
    assert target.parts.keys() == one.parts.keys()
    np.testing.assert_array_equal(started[TEXT]["table"][0], tables[TEXT]["table"][2])


def test_upt_transfer_copies_the_transformer_of_the_group():
    method = UPT(
        SharedPrompt(P, Normal(), "same"),
        SharedPrompt(P * LAYERS, Uniform(), "same"),
        image_layers=LAYERS,
        transformer=PromptTransformer(D),
    )
    params = randomized(method)
    runs = Runs(["b", "a"], groups="independent")
    started = method.transfer(params, method, RUNS, runs)
    assert jax.tree.structure(started) == jax.tree.structure(params)
    for name, value in flatten(started).items():
        np.testing.assert_array_equal(value, flatten(params)[name][jnp.asarray([1, 0])], name)


def test_upt_transfer_from_another_transformer_fails():
    params = randomized(made())
    for theirs in (made(mixing="none"), SitePrompts(PromptTuning(P), PromptTuning(P))):
        with pytest.raises(ValueError, match="UPT starts only from an artifact with the same tran"):
            made().transfer(params, theirs, RUNS, RUNS)


def test_upt_config_round_trip_and_axes():
    method = made(mixing="none", block="upt_paper")
    again = method_from_config("upt", method.config(), "FILE")
    assert isinstance(again, UPT) and again.config() == method.config()
    assert again.transformer == method.transformer
    params = method.init(KEY, RUNS, CONTEXT)
    assert sorted(method.axes) == sorted(flatten(params))
    for name, value in flatten(params).items():
        assert len(method.axes[name]) == value.ndim, name
    assert row_axes(method)[f"prompt/{TRANSFORMER}/query/kernel"] == "groups"
    kept, same = method.for_inference(params)
    assert kept.config() == method.config() and same.keys() == params.keys()
    with pytest.raises(ValueError, match=r"FILE \(transformer\)"):
        method_from_config("upt", {**method.config(), TRANSFORMER: {"width": 3}}, "FILE")


def test_upt_of_one_site_or_random_methods_fails():
    with pytest.raises(ValueError, match="both sites, but image_tokens has no method"):
        UPT(PromptTuning(P))
    random = CrossPT(P, ["x"], init_sources=Uniform(), init_prompt=Uniform())
    with pytest.raises(ValueError, match="cannot draw prompts for each example"):
        UPT(random, PromptTuning(P))


def test_initial_transformers_differ_between_groups_and_depend_on_names_only():
    """So that repetitions in one job are independent, and equal to separate jobs."""
    method, names = made(), ["a_s0", "a_s1"]
    both = method.init(KEY, Runs(["a", "a"], names, "independent"), CONTEXT)[TRANSFORMER]
    kernels = both["query"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    for row, name in enumerate(names):
        alone = method.init(KEY, Runs(["a"], [name]), CONTEXT)[TRANSFORMER]
        for part, values in flatten(alone).items():
            np.testing.assert_array_equal(flatten(both)[part][row], values[0])

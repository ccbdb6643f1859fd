"""Prompts at the sites of a dual encoder: the same as those of the methods they consist of."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.base import PromptContext, method_from_config, method_names, row_axes
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.init import ClassLabels, Normal, SampledVocabulary, Text, Uniform
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import IMAGE, TEXT, SiteContext, SitePrompts, num_rows
from tests.fixtures import clip_models, tiny, tiny_clip

P, H, WIDTH, LAYERS = 4, 6, 10, 3
KEY = jax.random.PRNGKey(0)
RUNS = Runs(["a", "b", "c"], groups=[0, 1, 0])
VALUES = np.random.default_rng(0).normal(size=(30, H)).astype(np.float32)


class Words:
    def encode(self, s):
        return [int(word) for word in s.split()]


CONTEXT = SiteContext(jnp.asarray(VALUES), Words(), WIDTH)
IDS = jnp.asarray([[2, 0], [1, 1]])


def crosspt(length, **settings):
    return CrossPT(length, ["x", "y"], init_sources=Uniform(), init_prompt=Uniform(), **settings)


METHODS = {
    "prompt_tuning": lambda length: PromptTuning(length, Normal()),
    "mpt": lambda length: MPT(length, 1, Uniform()),
    "mpt_rank2": lambda length: MPT(length, 2, Uniform()),
    "shared_prompt": lambda length: SharedPrompt(length, Uniform()),
    "crosspt": crosspt,
    "crosspt_joint": lambda length: crosspt(length, share="joint"),
    "crosspt_private": lambda length: crosspt(length // 2, compose_by="private_cat"),
    "crosspt_mlp": lambda length: crosspt(length, reparameterize="all"),
}
SLOW = ("mpt", "crosspt", "crosspt_joint")  # little different from the others
EACH = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in METHODS]
)


def made(name, **settings):
    """A method at both sites, and random parameters."""
    both = SitePrompts(
        METHODS[name](P * (settings.get("text_classes") or 1)),
        METHODS[name](P * LAYERS),
        **{"image_layers": LAYERS, **settings},
    )
    params = both.init(KEY, RUNS, CONTEXT)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return both, jax.tree.map(draw, params)


@EACH
def test_compose_site_equals_own_compose_of_the_method(name):
    both, params = made(name)
    text = METHODS[name](P).compose(params[TEXT], RUNS, IDS)
    image = METHODS[name](P * LAYERS).compose(params[IMAGE], RUNS, IDS)
    found = both.compose_site(TEXT, params, RUNS, IDS)
    assert found.shape == (2, 2, P, H)
    np.testing.assert_array_equal(found, text)
    found = both.compose_site(IMAGE, params, RUNS, IDS)
    assert found.shape == (2, 2, LAYERS, P, WIDTH)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(found[:, :, layer], image[:, :, P * layer : P * layer + P])


def test_compose_site_mpt_formula():
    both, params = made("mpt_rank2")
    own = {name: np.asarray(value, np.float64) for name, value in params[IMAGE].items()}
    for row, group in enumerate(RUNS.group_of_row):
        expected = own["shared"][group] * (own["task_left"][row] @ own["task_right"][row])
        found = both.compose_site(IMAGE, params, RUNS, jnp.asarray(row))
        np.testing.assert_allclose(found, expected.reshape(LAYERS, P, WIDTH), rtol=1e-5, atol=1e-5)


def test_compose_site_contexts_of_classes_and_shallow_tokens():
    both, params = made("prompt_tuning", text_classes=5, image_layers=1)
    found = both.compose_site(TEXT, params, RUNS, jnp.arange(3))
    np.testing.assert_array_equal(found, params[TEXT]["table"].reshape(3, 5, P, H))
    found = both.compose_site(IMAGE, params, RUNS, jnp.arange(3))
    np.testing.assert_array_equal(found, params[IMAGE]["table"][:, None])


@EACH
def test_labels_axes_and_length_are_those_of_the_parts(name):
    both, params = made(name)
    text, image = METHODS[name](P), METHODS[name](P * LAYERS)
    assert both.prompt_length == text.prompt_length + image.prompt_length
    for leaf in flatten(params):
        site, _, own = leaf.partition("/")
        assert both.axes[leaf] == text.axes[own]
        assert len(both.axes[leaf]) == flatten(params)[leaf].ndim
    names = [(k.removeprefix("prompt/"), axis) for k, axis in row_axes(text).items()]
    expected = {f"prompt/{site}/{k}": axis for site in (TEXT, IMAGE) for k, axis in names}
    assert row_axes(both) == expected
    assert both.is_random == text.is_random
    assert both.depends_on_run_names == text.depends_on_run_names
    assert both.needs_artifact == text.needs_artifact
    labels = {label for _, label in both.labels}
    assert labels == {label for _, label in text.labels}


@EACH
def test_init_does_not_depend_on_rows_and_differs_by_site(name):
    both, _ = made(name)
    order = Runs(["c", "a", "b"], groups=[0, 0, 1])
    first, second = (flatten(both.init(KEY, runs, CONTEXT)) for runs in (RUNS, order))
    for leaf, value in first.items():
        if both.axes[leaf][0] == "tasks":
            np.testing.assert_array_equal(value[np.array([2, 0, 1])], second[leaf], leaf)
    if name == "prompt_tuning":
        same = SitePrompts(PromptTuning(P), PromptTuning(P, Uniform()))
        params = same.init(KEY, RUNS, SiteContext(jnp.asarray(VALUES), None, H))
        assert (params[TEXT]["table"] != params[IMAGE]["table"]).any()


@EACH
def test_config_builds_the_same_method(name):
    both, params = made(name)
    settings = json.loads(json.dumps(both.config()))
    again = method_from_config("site_prompts", settings, "FILE")
    assert isinstance(again, SitePrompts) and again.config() == both.config()
    method, kept = both.for_inference(params)
    assert method.config() == json.loads(json.dumps(method.config())) and method.name == both.name
    for site in (TEXT, IMAGE):
        found = method.compose_site(site, kept, RUNS, IDS)
        expected = both.compose_site(site, params, RUNS, IDS)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not [leaf for leaf in flatten(kept) if "mlp" in leaf]


def test_site_prompts_is_no_method_of_its_own():
    assert "site_prompts" not in method_names()


TEXT_ONLY = {"method": "prompt_tuning", "config": {"prompt_length": 4}}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "has no method"),
        ({TEXT: None}, "has no method"),
        ({TEXT: []}, "an object or null was expected"),
        ({TEXT: {"method": "prompt_tuning"}}, "config"),
        ({TEXT: {"method": "no_such", "config": {}}}, "'no_such'"),
        ({TEXT: {"method": 3, "config": {}}}, "a string was expected"),
        ({TEXT: {"method": "mpt", "config": {"prompt_length": 10**30}}}, "2147483647"),
        ({TEXT: {"method": "mpt", "config": {"prompt_length": 4, "x": 1}}}, "does not have: x"),
        ({TEXT: {"method": "mpt", "config": {}}}, "lacks settings .* prompt_length"),
        ({TEXT: TEXT_ONLY, "text_classes": -1}, ">= 0"),
        ({TEXT: TEXT_ONLY, "text_classes": 3}, "4 prompt rows of text_context do not divide"),
        ({TEXT: TEXT_ONLY, "text_classes": 2**40}, "2147483647"),
        ({TEXT: TEXT_ONLY, "text_classes": 2**30}, "do not divide"),
        ({TEXT: TEXT_ONLY, "text_classes": 1.5}, "an integer"),
        ({IMAGE: TEXT_ONLY, "image_layers": 0}, ">= 1"),
        ({IMAGE: TEXT_ONLY, "image_layers": "3"}, "an integer"),
        ({IMAGE: TEXT_ONLY, "image_layers": 3}, "4 prompt rows of image_tokens do not divide"),
        ({TEXT: {"method": "site_prompts", "config": {TEXT: TEXT_ONLY}}}, "another SitePrompts"),
        ({TEXT: {"method": "attempt", "config": {"prompt_length": 4, "sources": ["a"]}}}, "text"),
    ],
)
def test_hostile_config_is_a_value_error(settings, problem):
    with pytest.raises(ValueError, match=problem):
        method_from_config("site_prompts", settings, "FILE")


def test_methods_that_read_texts_fail():
    for site in (TEXT, IMAGE):
        with pytest.raises(ValueError, match=f"'attempt' depend on an input text.* {site}"):
            SitePrompts(**{site: ATTEMPT(P, ["x"])})
        with pytest.raises(ValueError, match=f"'crosspt' depend on an input text.* {site}"):
            SitePrompts(**{site: crosspt(P, router="attention")})


@pytest.mark.parametrize("init", [SampledVocabulary(), Text("3 4"), ClassLabels(["3"])])
def test_image_tokens_from_token_embeddings_fail(init):
    both = SitePrompts(image_tokens=PromptTuning(P, init))
    with pytest.raises(ValueError, match=f"{type(init).__name__}.*IMAGE_INIT"):
        both.init(KEY, RUNS, CONTEXT)
    shared = SitePrompts(image_tokens=SharedPrompt(P, dict.fromkeys("abc", SampledVocabulary())))
    with pytest.raises(ValueError, match="Cannot draw 4 distinct token ids from 0"):
        shared.init(KEY, RUNS, CONTEXT)


def test_init_text_context_from_words():
    """CoOp's "a photo of a": the embeddings of its tokens."""
    both = SitePrompts(PromptTuning(P, Text("3 1 4 1")))
    table = both.init(KEY, RUNS, CONTEXT)[TEXT]["table"]
    np.testing.assert_array_equal(table, np.broadcast_to(VALUES[[3, 1, 4, 1]], (3, P, H)))


def test_num_rows():
    assert (num_rows(16, 12), num_rows(16, 1), num_rows(16, 0)) == (192, 16, 16)


# --- Transfer ------------------------------------------------------------------------------------

SOURCE = Runs(["a", "b"])
TARGETS = Runs(["new", "a"], groups="independent")


def source(method, **settings):
    both = SitePrompts(method(P), method(P * LAYERS), **{"image_layers": LAYERS, **settings})
    return both, both.init(KEY, SOURCE, CONTEXT)


@pytest.mark.parametrize("name", ["mpt", "mpt_rank2", "shared_prompt"])
def test_transfer_each_site_as_its_method_does(name):
    both, params = source(METHODS[name])
    found = both.transfer(params, both, SOURCE, TARGETS)
    for site, length in ((TEXT, P), (IMAGE, P * LAYERS)):
        method = METHODS[name](length)
        expected = method.transfer(params[site], method, SOURCE, TARGETS)
        tiny.close(found[site], expected, 0)


def test_transfer_plain_prompts_from_mpt():
    both, params = source(METHODS["mpt"])
    plain = lambda length: PromptTuning(length, Normal(), start_from="b")  # noqa: E731
    target = SitePrompts(plain(P), plain(P * LAYERS), image_layers=LAYERS)
    found = target.transfer(params, both, SOURCE, TARGETS)
    for site in (TEXT, IMAGE):
        expected = both.compose_site(site, params, SOURCE, jnp.asarray([1, 1]))
        got = target.compose_site(site, found, TARGETS, jnp.arange(2))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_transfer_one_site_of_two():
    both, params = source(METHODS["shared_prompt"])
    only = SitePrompts(SharedPrompt(P))
    found = only.transfer(params, both, SOURCE, TARGETS)
    assert list(found) == [TEXT]
    assert only.source_prompt_length(both, SOURCE) == both.prompt_length
    assert both.source_prompt_length(only, SOURCE) == P
    longer = SitePrompts(SharedPrompt(P + 1))
    assert longer.source_prompt_length(both, SOURCE) == both.prompt_length + 1
    with pytest.raises(ValueError, match="'site_prompts'.* none for image_tokens"):
        both.transfer({TEXT: params[TEXT]}, only, SOURCE, TARGETS)
    text = SharedPrompt(P)
    own = text.init(KEY, SOURCE, CONTEXT)
    with pytest.raises(ValueError, match="'shared_prompt'.* none for text_context"):
        only.transfer(own, text, SOURCE, TARGETS)


def test_transfer_other_classes_or_layers_fails():
    method = PromptTuning(12, Normal())
    for setting in ("text_classes", "image_layers"):
        first, second = (
            SitePrompts(method, method, **{"text_classes": 2, "image_layers": 2, setting: count})
            for count in (2, 3)
        )
        params = first.init(KEY, SOURCE, CONTEXT)
        with pytest.raises(ValueError, match=f"SitePrompts.{setting} is 3, .* has 2"):
            second.transfer(params, first, SOURCE, TARGETS)


def test_text_method_from_site_prompts_fails():
    both, params = source(METHODS["shared_prompt"])
    for call in (
        lambda: materialize(both, params, SOURCE),
        lambda: PromptTuning(both.prompt_length).transfer(params, both, SOURCE, TARGETS),
    ):
        with pytest.raises(ValueError, match="text_context and image_tokens .* INITIAL_ARTIFACT"):
            call()


def test_statistics_by_site():
    both, params = source(METHODS["mpt"])
    arrays = jax.tree.map(np.asarray, params)
    found = both.statistics(arrays, SOURCE)
    for site, length in ((TEXT, P), (IMAGE, P * LAYERS)):
        for name, value in MPT(length).statistics(arrays[site], SOURCE).items():
            assert found[f"{site}/{name}"] == value


# --- Models --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_model_random_draws_do_not_depend_on_microbatches():
    """CrossPT draws for each example of the image site; of the text context, one for each run."""
    prompt = SitePrompts(crosspt(tiny_clip.CONTEXT), crosspt(4), image_layers=2)
    model = tiny_clip.model(prompt, config=clip_models.shallow())
    assert model.is_random
    params, key = tiny_clip.params(model), jax.random.PRNGKey(3)
    batch = model.number_examples(tiny_clip.batch([0, 1, 0, 1], [0, 0, 1, 1]))
    half = {name: value[2:] for name, value in batch.items()}
    logits = jax.jit(model.logits)
    whole, part = logits(params, batch, key), logits(params, half, key)
    np.testing.assert_allclose(whole[2:], part, atol=1e-5)
    plain = logits(params, batch)
    assert np.abs(np.asarray(whole - plain)[:, :2]).max() > 1e-3


def test_model_different_lengths_of_runs_fail():
    lengths = {"pets": 1, "shapes": 2}
    prompt = SitePrompts(crosspt(1, compose_by="private_cat", private_length=lengths))
    with pytest.raises(ValueError, match="text_context have different lengths .2, 3 positions"):
        tiny_clip.model(prompt)


def test_compose_site_given_key_reaches_the_method():
    method = crosspt(P)
    both = SitePrompts(method)
    params = both.init(KEY, RUNS, CONTEXT)
    given = PromptContext(key=KEY)
    found = both.compose_site(TEXT, params, RUNS, jnp.arange(3), given)
    expected = method.compose(params[TEXT], RUNS, jnp.arange(3), given)
    np.testing.assert_array_equal(found, expected)
    assert (np.asarray(found) != both.compose_site(TEXT, params, RUNS, jnp.arange(3))).any()


def test_init_from_text_starts_every_class_alike():
    method = SitePrompts(PromptTuning(3 * P, Text("7 3", Uniform())), text_classes=3)
    table = method.init(KEY, RUNS, CONTEXT)[TEXT]["table"].reshape(3, 3, P, H)
    expected = np.broadcast_to(VALUES[[7, 3]], (3, 3, 2, H))
    np.testing.assert_array_equal(table[:, :, :2], expected)
    assert (table[:, 0, 2:] != table[:, 1, 2:]).all()  # the rest is drawn
    labels = SitePrompts(PromptTuning(2 * P, ClassLabels(["1 2", "4"])), text_classes=2)
    table = labels.init(KEY, RUNS, CONTEXT)[TEXT]["table"].reshape(3, 2, P, H)
    expected = np.stack([VALUES[[1, 2]].mean(0), VALUES[4]])
    np.testing.assert_allclose(table[:, :, :2], np.broadcast_to(expected, (3, 2, 2, H)), rtol=1e-6)
    with pytest.raises(ValueError, match="A prompt of 1 rows is too short for 2 tokens"):
        SitePrompts(PromptTuning(3, Text("7 3")), text_classes=3).init(KEY, RUNS, CONTEXT)

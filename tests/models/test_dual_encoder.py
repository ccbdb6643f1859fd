"""The dual encoder's logits, losses and scores against NumPy in float64, and class masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.models.dual_encoder import FEATURES
from mpt_jax.prompts.init import Normal, Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import SitePrompts
from tests.fixtures import clip_models, reference_classes, reference_clip, tiny, tiny_clip

CONFIG = clip_models.tiny()
WHOLE = clip_models.random_params(CONFIG)  # with the text tower, also if the model drops it
TASKS = (tiny_clip.PETS, tiny_clip.SHAPES)
BATCH = tiny_clip.batch([0, 1, 0, 1, 0], [2, 0, 0, 1, 1])
WIDE = Uniform(0.5)  # so that prompts matter
TOLERANCE = 1e-4  # logits are at most exp(1) in size; float32 against float64


def per_class():
    method = PromptTuning(3 * tiny_clip.CONTEXT, WIDE)
    return SitePrompts(method, text_classes=3)


PROMPTS = {
    "coop": tiny_clip.prompts(image=False),
    "class_specific": per_class(),
    "vpt_deep": tiny_clip.prompts(text=False),
    "vpt_shallow": tiny_clip.prompts(text=False, layers=1),
    "both": tiny_clip.prompts(),
    "shared": SitePrompts(SharedPrompt(tiny_clip.CONTEXT, WIDE)),
    "mpt": SitePrompts(MPT(tiny_clip.CONTEXT, 2, WIDE), MPT(6, 1, WIDE), image_layers=3),
}


def made(prompt, runs=tiny_clip.RUNS, **settings):
    """A model, and its parameters with random prompts of a size that matters."""
    model = tiny_clip.model(prompt, runs, **settings)
    params = tiny_clip.params(model)
    rng = np.random.default_rng(5)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32)  # noqa: E731
    return model, {**params, "prompt": jax.tree.map(draw, params["prompt"])}


def composed(model, params):
    """Contexts and image tokens of each bank row in NumPy, from the formulas of the methods."""

    def of(method, own, row):
        own = {name: np.asarray(value, np.float64) for name, value in own.items()}
        if isinstance(method, PromptTuning):
            return own["table"][row]
        shared = own["shared"][model.runs.group_of_row[row]]
        if isinstance(method, SharedPrompt):
            return shared
        return shared * (own["task_left"][row] @ own["task_right"][row])

    found = {}
    for site, count in (("text_context", model.prompt.text_classes), ("image_tokens", None)):
        if (method := model.prompt.parts.get(site)) is None:
            continue
        rows = [of(method, params["prompt"][site], row) for row in range(model.runs.num_rows)]
        count = model.prompt.image_layers if count is None else count
        found[site] = [x.reshape(count, -1, x.shape[-1]) if count else x for x in rows]
    return found


def expected_logits(model, params, batch, position="end"):
    """Logits of each example over its own classes, and class features by bank row."""
    prompts = composed(model, params)
    contexts = prompts.get("text_context", [None] * model.runs.num_rows)
    by_name = {task.task: task for task in model.texts.tasks}
    texts = [
        reference_classes.texts(CONFIG, WHOLE, by_name[name], context, position)
        for name, context in zip(model.runs.task_names, contexts, strict=True)
    ]
    return reference_classes.logits(CONFIG, WHOLE, batch, texts, prompts.get("image_tokens")), texts


def run(model, params, batch):
    """Logits, own classes, loss [G] and metrics; compiled, as in training."""

    @jax.jit
    def forward(params, batch):
        own = model.bank.is_own(batch["task_ids"])
        return model.logits(params, batch), own, *model.loss_sums(params, batch)

    logits, own, sums, metrics = forward(params, batch)
    return np.asarray(logits), np.asarray(own), np.asarray(sums["cross_entropy"]), metrics


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x == "shared" else ()) for x in PROMPTS]
)
def test_logits_and_loss_match_numpy(name):
    model, params = made(PROMPTS[name])
    assert (FEATURES in params) == name.startswith("vpt") == ("text_encoder" not in params)
    expected, _ = expected_logits(model, params, BATCH)
    found, own, sums, metrics = run(model, params, BATCH)
    assert own.tolist() == [[True] * len(x) + [False] * (3 - len(x)) for x in expected]
    for row, values in enumerate(expected):
        np.testing.assert_allclose(found[row][: len(values)], values, atol=TOLERANCE)
        assert (found[row][len(values) :] == -np.inf).all()
    each = [
        reference_classes.cross_entropy(x, y)
        for x, y in zip(expected, BATCH["label"].tolist(), strict=True)
    ]
    np.testing.assert_allclose(sums, [sum(each)], rtol=TOLERANCE)
    assert model.loss_normalizers(BATCH)["cross_entropy"].tolist() == [5]
    hits = [x.argmax() == y for x, y in zip(expected, BATCH["label"].tolist(), strict=True)]
    for row in (0, 1):
        mine = [i for i in range(5) if BATCH["task_ids"][i] == row]
        assert metrics["accuracy"].sum[row] == sum(hits[i] for i in mine)
        np.testing.assert_allclose(
            metrics["loss"].sum[row], sum(each[i] for i in mine), rtol=TOLERANCE
        )
        assert metrics["loss"].weight[row] == metrics["accuracy"].weight[row] == len(mine)


@pytest.mark.parametrize("position", ["middle", pytest.param("front", marks=pytest.mark.slow)])
def test_logits_context_position_matches_numpy(position):
    texts = tiny_clip.texts(position=position)
    model, params = made(PROMPTS["coop"], texts=texts)
    expected, _ = expected_logits(model, params, BATCH, position)
    found = run(model, params, BATCH)[0]
    for row, values in enumerate(expected):
        np.testing.assert_allclose(found[row][: len(values)], values, atol=TOLERANCE)


def test_precompute_frozen_texts_are_means_over_templates():
    model, params = made(PROMPTS["vpt_deep"])
    expected = np.concatenate(
        [reference_classes.texts(CONFIG, WHOLE, task, None) for task in TASKS]
    )
    np.testing.assert_allclose(params[FEATURES]["table"], expected, atol=1e-5)
    assert sorted(params) == [FEATURES, "image_encoder", "logit_scale", "prompt"]
    trained, _ = made(PROMPTS["vpt_deep"], labels=((r"text_encoder/.*", "backbone"),))
    assert not trained.precomputes and trained.precompute(WHOLE) is WHOLE
    whole = {**params, "text_encoder": jax.tree.map(jnp.asarray, WHOLE["text_encoder"])}
    del whole[FEATURES]
    found, expected = run(trained, whole, BATCH)[0], run(model, params, BATCH)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["coop", "vpt_deep"])
def test_image_features_in_batch_match_images_without_image_prompts(name):
    model, params = made(PROMPTS[name])
    features = reference_clip.image_features(CONFIG, WHOLE, BATCH["image"])
    rest = {key: value for key, value in BATCH.items() if key != "image"}
    batch = {**rest, "image_features": jnp.asarray(features, jnp.float32)}
    if name == "coop":
        expected = run(model, params, BATCH)[0]
        np.testing.assert_allclose(run(model, params, batch)[0], expected, atol=TOLERANCE)
    else:
        with pytest.raises(ValueError, match="image_features"):
            model.logits(params, batch)


# --- Classes that compete ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("coop", 2),
        pytest.param("coop", 128, marks=pytest.mark.slow),
        ("vpt_shallow", 128),
    ],
)
@pytest.mark.parametrize("groups", ["joint", "independent"])
def test_union_softmax_over_classes_of_the_group(name, groups, chunk):
    """The batch lacks examples of shapes, whose classes compete nevertheless in a joint group."""
    runs = Runs(["shapes", "pets", "pets"], ["shapes", "pets_s1", "pets_s2"], groups)
    model, params = made(PROMPTS[name], runs, softmax="union", text_chunk=chunk)
    batch = tiny_clip.batch([1, 2, 1], [2, 0, 1])
    own, texts = expected_logits(model, params, batch)
    prompts = composed(model, params).get("image_tokens")
    scale = np.exp(float(WHOLE["logit_scale"]))
    each = []
    for i, row in enumerate(batch["task_ids"].tolist()):
        image = np.asarray(batch["image"])[i][None]
        tokens = None if prompts is None else prompts[row][None]
        feature = reference_clip.image_features(CONFIG, WHOLE, image, tokens)[0]
        rivals = [other for other in range(3) if other != row and groups == "joint"]
        if name != "coop":  # runs of one task share their classes
            rivals = [other for other in rivals if runs.task_names[other] != "pets"]
        scores = [own[i], *(scale * texts[other] @ feature for other in rivals)]
        each.append(reference_classes.cross_entropy(np.concatenate(scores), int(batch["label"][i])))
    sums = run(model, params, batch)[2]
    expected = reference_classes.group_sums(each, batch, runs)
    np.testing.assert_allclose(sums, expected, rtol=TOLERANCE)


def multi_label_model(prompt, softmax="own", **settings):
    shapes = dataclasses.replace(tiny_clip.SHAPES, multi_label=True)
    context = tiny_clip.CONTEXT if prompt.text_context else 0
    texts = tiny_clip.texts(context, tasks=(tiny_clip.PETS, shapes))
    return made(prompt, texts=texts, softmax=softmax, **settings)


MIXED = {
    **tiny_clip.batch([0, 1, 1, 1, 0], [2, -1, -1, -1, 0]),
    "labels": jnp.asarray([[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], jnp.float32),
}


@pytest.mark.parametrize("softmax", ["own", "union"])
@pytest.mark.parametrize("name", ["coop", "vpt_deep"])
def test_multi_label_loss_is_mean_binary_cross_entropy_over_own_classes(name, softmax):
    model, params = multi_label_model(PROMPTS[name], softmax)
    expected, texts = expected_logits(model, params, MIXED)
    each = [
        reference_classes.binary(x, np.asarray(MIXED["labels"][i][:2])) if i in (1, 2, 3) else 0.0
        for i, x in enumerate(expected)
    ]
    for i, label in ((0, 2), (4, 0)):
        scores = expected[i]
        if softmax == "union":
            image = np.asarray(MIXED["image"])[i][None]
            tokens = composed(model, params).get("image_tokens")
            tokens = None if tokens is None else tokens[0][None]
            feature = reference_clip.image_features(CONFIG, WHOLE, image, tokens)[0]
            others = np.exp(float(WHOLE["logit_scale"])) * texts[1] @ feature
            scores = np.concatenate([scores, others])
        each[i] = reference_classes.cross_entropy(scores, label)
    _, _, sums, metrics = run(model, params, MIXED)
    np.testing.assert_allclose(sums, [sum(each)], rtol=TOLERANCE)
    assert metrics["accuracy"].weight.tolist() == [2, 0], "multi-label examples have no accuracy"
    assert metrics["loss"].weight.tolist() == [2, 3]


def test_score_batch_log_probabilities():
    model, params = multi_label_model(PROMPTS["both"])
    expected, _ = expected_logits(model, params, MIXED)
    score = jax.jit(lambda *x: (model.score_batch(*x), *model.predict_batch_with_aux(*x)))
    found, ids, aux = score(params, MIXED)
    found = np.asarray(found)
    assert ids.shape == (5, 1) and ids.dtype == jnp.int32
    for i, values in enumerate(expected):
        if i in (0, 4):
            top = values - np.log(np.exp(values).sum())
        else:
            top = -np.log1p(np.exp(-values))
        np.testing.assert_allclose(found[i][: len(values)], top, atol=TOLERANCE)
        assert (found[i][len(values) :] == -np.inf).all()
        assert ids[i, 0] == values.argmax()
        np.testing.assert_allclose(aux["scores"][i], top.max(), atol=TOLERANCE)
    with pytest.raises(ValueError, match="return_intermediates"):
        model.score_batch(params, MIXED, return_intermediates=True)


def test_score_batch_union_training_still_scores_own_classes():
    own, params = made(PROMPTS["coop"])
    union = tiny_clip.model(PROMPTS["coop"], softmax="union")
    first, second = (jax.jit(model.score_batch)(params, BATCH) for model in (own, union))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "method",
    [None, pytest.param(SitePrompts(None, PromptTuning(2, Normal())), marks=pytest.mark.slow)],
)
def test_params_for_evaluation_have_features_of_all_texts(method):
    """Losses and scores are those of the plain parameters, which compute the features."""
    model = tiny_clip.model(method, text_chunk=2)
    params, batch = tiny_clip.params(model), tiny_clip.batch([0, 1, 1, 0], [1, 0, 2, 0])
    prepared = model.params_for_evaluation(params)
    assert prepared["class_features"]["table"].shape == (len(model.bank.row), 10)
    without = {name: x for name, x in prepared.items() if name != "text_encoder"}
    for function in (model.score_batch, lambda *x: model.loss_sums(*x)[0]["cross_entropy"]):
        compiled = jax.jit(function)
        expected = np.asarray(compiled(params, batch))
        np.testing.assert_allclose(compiled(without, batch), expected, 1e-6, 1e-6)


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), -1.0])
def test_masked_classes_never_win_and_have_no_gradient(scale):
    """With negative cosines everywhere, a logit of 0 would win; see MVLPT's released mask."""
    model, params = made(PROMPTS["class_specific"])
    feature = reference_clip.image_features(CONFIG, WHOLE, BATCH["image"])
    rest = {key: value for key, value in BATCH.items() if key != "image"}
    batch = {**rest, "image_features": jnp.asarray(scale * feature, jnp.float32)}

    def forward(prompt):
        whole = {**params, "prompt": prompt}
        loss = model.loss_sums(whole, batch)[0]["cross_entropy"].sum()
        return loss, (model.logits(whole, batch), model.predict_batch(whole, batch))

    grads, (found, ids) = jax.jit(jax.grad(forward, has_aux=True))(params["prompt"])
    shapes = np.asarray(batch["task_ids"]) == 1
    assert (np.asarray(found)[shapes].argmax(-1) < 2).all() and (ids[shapes] < 2).all()
    table = np.asarray(grads["text_context"]["table"])
    contexts = table.reshape(2, 3, tiny_clip.CONTEXT, -1)
    assert np.isfinite(table).all() and not contexts[1, 2].any(), "shapes have two classes"
    assert np.abs(contexts[0]).max(axis=(1, 2)).min() > 0
    assert np.abs(contexts[1, :2]).max(axis=(1, 2)).min() > 0


# --- Construction --------------------------------------------------------------------------------


def test_model_context_and_prompt_length_must_agree():
    with pytest.raises(ValueError, match="reserve 2 positions .* text prompt has 3"):
        tiny_clip.model(PROMPTS["coop"], texts=tiny_clip.texts(2))
    with pytest.raises(ValueError, match="reserve 3 positions .* text prompt has 0"):
        tiny_clip.model(PROMPTS["vpt_deep"], texts=tiny_clip.texts(3))
    two = SitePrompts(PromptTuning(2 * tiny_clip.CONTEXT, Normal()), text_classes=2)
    with pytest.raises(ValueError, match="has 3 classes, but SitePrompts.text_classes is 2"):
        tiny_clip.model(two)


def test_model_unknown_task_or_softmax_fails():
    with pytest.raises(ValueError, match="'plants'.*pets, shapes"):
        tiny_clip.model(PROMPTS["coop"], Runs(["pets", "plants"]))
    with pytest.raises(ValueError, match="CLASS_SOFTMAX"):
        tiny_clip.model(PROMPTS["coop"], softmax="all")


def test_loss_fn_t5x_trains_only_prompts():
    model, params = made(PROMPTS["both"])
    grads = jax.jit(jax.grad(lambda p: model.loss_fn(p, BATCH, None)[0]))(params)
    assert not any(np.any(x) for k in grads if k != "prompt" for x in jax.tree.leaves(grads[k]))
    assert all(np.any(x) for x in jax.tree.leaves(grads["prompt"]))
    total, metrics = jax.jit(model.eval_fn)(params, BATCH)
    sums = run(model, params, BATCH)[2]
    np.testing.assert_allclose(total, sums[0] / 5, rtol=1e-6)
    assert "accuracy/pets" in metrics and "loss/shapes" in metrics


def test_init_prompt_depends_on_run_names_only():
    both = made(PROMPTS["both"])[0]
    swapped = tiny_clip.model(PROMPTS["both"], Runs(["shapes", "pets"]))
    first, second = (tiny_clip.params(model)["prompt"] for model in (both, swapped))
    tiny.close(jax.tree.map(lambda x: x[::-1], first), second, 0)

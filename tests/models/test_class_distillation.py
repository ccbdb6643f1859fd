"""Distillation of the dual encoder against NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.models import class_distillation
from mpt_jax.models.class_distillation import ClassDistillation
from mpt_jax.models.class_losses import ClassObjective
from mpt_jax.models.class_texts import TaskClasses, class_texts
from mpt_jax.models.losses import total_loss
from mpt_jax.prompts.cocoop import CoCoOp
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from tests.fixtures import clip_models, reference_classes, reference_clip, tiny_clip

CONFIG = clip_models.shallow()
# A scale of e^3, so that class distributions differ; that of CLIP is 100.
WHOLE = {**clip_models.random_params(CONFIG), "logit_scale": np.float32(3.0)}
WIDE = Uniform(0.5)
LAYERS = 2
C, TOKENS = tiny_clip.CONTEXT, 4
METHODS = {
    "text": SitePrompts(PromptTuning(C, WIDE)),
    "image": SitePrompts(image_tokens=PromptTuning(TOKENS, WIDE), image_layers=LAYERS),
    "both": SitePrompts(PromptTuning(C, WIDE), PromptTuning(TOKENS, WIDE), image_layers=LAYERS),
    "classes": SitePrompts(PromptTuning(3 * C, WIDE), text_classes=3),
    "mpt": SitePrompts(
        MPT(C, 2, WIDE),
        MPT(TOKENS, 1, WIDE, layers=LAYERS, layer_factors="each"),
        image_layers=LAYERS,
    ),
}
TAU = 2.5
ALL = ClassDistillation(0.7, temperature=TAU, image_weight=3.0, text_weight=5.0)
FROM_CLIP = dataclasses.replace(ALL, teacher="zero_shot")
BATCH = tiny_clip.batch([0, 1, 0, 1, 0], [2, 0, 0, 1, 1])
TASKS = {task.task: task for task in (tiny_clip.PETS, tiny_clip.SHAPES)}
TERMS = ("kl", "hidden_image", "hidden_text")


def draw(shape, seed):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def teacher_prompts(prompt, runs, seed=9):
    """Plain prompts of teachers, by site."""
    widths = {TEXT: clip_models.TEXT.emb_dim, IMAGE: clip_models.IMAGE.emb_dim}
    return {
        site: draw((runs.num_rows, method.prompt_length, widths[site]), seed + number)
        for number, (site, method) in enumerate(prompt.parts.items())
    }


def made(name="both", distillation=ALL, runs=tiny_clip.RUNS, softmax="own", **settings):
    """A model with random prompts of student and teachers, all parameters, and the latter."""
    prompt = METHODS[name]
    objective = ClassObjective(softmax, distillation)
    model = tiny_clip.model(prompt, runs, objective=objective, config=CONFIG, **settings)
    start = model.init_prompt(jax.random.PRNGKey(0), jnp.asarray(model.embedding(WHOLE)))
    student = jax.tree.map(lambda x: jnp.asarray(draw(x.shape, 5)), start)
    prompts = teacher_prompts(prompt, runs) if model.reads_teachers else {}
    tree = {**WHOLE, "prompt": student, "teacher": model.teacher_params(WHOLE, prompts)}
    return model, jax.tree.map(jnp.asarray, model.precompute(tree)), prompts


shared = functools.cache(made)  # tests of the same model share its programs; see `run`


# --- Reference -----------------------------------------------------------------------------------


def by_site(prompt, tables):
    """Contexts and image tokens of each row from rows of one long prompt."""
    found = {}
    for site, rows in tables.items():
        count = prompt.text_classes if site == TEXT else prompt.image_layers
        found[site] = [x.reshape(count, -1, x.shape[-1]) if count else x for x in rows]
    return found


def features(tasks, runs, batch, prompts):
    """Features of each example's image, and of the classes of its task."""
    texts = [
        reference_classes.texts(CONFIG, WHOLE, tasks[task], prompts.get(TEXT, [None] * 9)[row])
        for row, task in enumerate(runs.task_names)
    ]
    images = []
    for image, row in zip(np.asarray(batch["image"]), batch["task_ids"].tolist(), strict=True):
        tokens = prompts[IMAGE][row][None] if IMAGE in prompts else None
        images.append(reference_clip.image_features(CONFIG, WHOLE, image[None], tokens)[0])
    return images, [texts[row] for row in batch["task_ids"].tolist()]


def softmax(x):
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(p, q):
    return float(np.sum(p * np.log(p / q)))


def expected_terms(student, teacher, multi, tau=TAU):
    """Every term of each example."""
    scale = np.exp(float(WHOLE["logit_scale"]))
    terms = {name: [] for name in TERMS}
    for i in range(len(student[0])):
        (image, texts), (own_image, own_texts) = ((x[0][i], x[1][i]) for x in (student, teacher))
        logits, taught = scale * texts @ image / tau, scale * own_texts @ own_image / tau
        if multi[i]:
            each = [
                kl(np.array([p, 1 - p]), np.array([q, 1 - q]))
                for p, q in zip(sigmoid(taught), sigmoid(logits), strict=True)
            ]
            terms["kl"].append(np.mean(each))
        else:
            terms["kl"].append(kl(softmax(taught), softmax(logits)))
        terms["hidden_image"].append(np.mean((image - own_image) ** 2))
        terms["hidden_text"].append(np.mean((texts - own_texts) ** 2))
    return terms


def plain(model, params):
    """The student's prompts, composed by its method."""
    rows = jnp.arange(model.runs.num_rows)
    return {
        site: [np.asarray(x, np.float64) for x in
               model.prompt.compose_site(site, params["prompt"], model.runs, rows)]
        for site in model.prompt.parts
    }  # fmt: skip


# --- Terms ---------------------------------------------------------------------------------------

LOGITS = draw((2, 4, 5), 0) * 8
OWN = np.arange(5) < np.array([5, 3, 1, 2])[:, None]
LOGITS[:, ~OWN] = 1e6  # arbitrary


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("name", ["class_divergence", "multi_label_divergence"])
def test_divergences_match_numpy(name, tau):
    function = getattr(class_distillation, name)
    found = function(*map(jnp.asarray, (*LOGITS, OWN)), tau)
    for i in range(4):
        teacher, student = (np.float64(x[i][OWN[i]]) / tau for x in LOGITS)
        if name == "class_divergence":
            expected = kl(softmax(teacher), softmax(student))
        else:
            pairs = zip(sigmoid(teacher), sigmoid(student), strict=True)
            each = [kl(np.array([p, 1 - p]), np.array([q, 1 - q])) for p, q in pairs]
            expected = np.mean(each)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)
    assert found[2] == 0 if name == "class_divergence" else found[2] > 0, "one class"


@pytest.mark.parametrize("name", ["class_divergence", "multi_label_divergence"])
def test_divergences_at_infinity_have_finite_gradients(name):
    """Logits of classes that do not exist are minus infinity, and teachers may be certain."""
    function = getattr(class_distillation, name)
    teacher = jnp.asarray([[500.0, -500.0, -jnp.inf]])
    student = jnp.asarray([[-300.0, 200.0, -jnp.inf]])
    own = jnp.asarray([[True, True, False]])
    value, grads = jax.value_and_grad(lambda x: function(teacher, x, own, 1.0).sum())(student)
    assert np.isfinite(value) and np.isfinite(grads).all() and grads[0, 2] == 0
    assert float(value) == pytest.approx(500 if name == "class_divergence" else 250, rel=1e-6)


# --- Model ---------------------------------------------------------------------------------------


@functools.cache
def run(model):
    return jax.jit(lambda params, batch: model.loss_sums(params, batch))


def check(model, params, batch, prompts, tasks=None, multi=None):
    """Every term's sums [G] are those of NumPy; returns the terms of each example."""
    tasks = tasks or TASKS
    student = features(tasks, model.runs, batch, plain(model, params))
    teacher = features(tasks, model.runs, batch, by_site(model.prompt, prompts))
    terms = expected_terms(student, teacher, multi or [False] * len(batch["label"]))
    sums, _ = run(model)(params, batch)
    assert list(model.objective.coefficients()) == ["cross_entropy", *TERMS]
    assert sums.keys() == model.objective.coefficients().keys()
    for name, values in terms.items():
        expected = reference_classes.group_sums(values, batch, model.runs)
        np.testing.assert_allclose(sums[name], expected, rtol=2e-4, atol=1e-7, err_msg=name)
    return terms


@pytest.mark.parametrize("name", ["text", "image", "both", "classes", "mpt"])
def test_terms_match_numpy(name):
    model, params, prompts = shared(name)
    terms = check(model, params, BATCH, prompts)
    sites = model.prompt.parts
    assert (min(terms["hidden_image"]) > 1e-4) == (IMAGE in sites)
    assert (min(terms["hidden_text"]) > 1e-4) == (TEXT in sites)
    assert max(terms["kl"]) > 1e-4
    normalizers = model.loss_normalizers(BATCH)
    assert {name: x.tolist() for name, x in normalizers.items()} == dict.fromkeys(
        ("cross_entropy", *TERMS), [5.0]
    )


@pytest.mark.parametrize("chunk", [3, 128])
@pytest.mark.parametrize("softmax", ["own", "union"])
def test_terms_of_independent_runs_with_padding(softmax, chunk):
    """The KL is over the classes of the task, also if all classes compete. Texts of the run without
    examples may be left out."""
    runs = Runs(["pets", "shapes", "pets"], ["pets_s1", "shapes", "pets_s2"], "independent")
    model, params, prompts = made("both", ALL, runs, softmax, text_chunk=chunk)
    batch = tiny_clip.batch([2, 0, 2, 1], [0, 2, 1, -1], weights=[1.0, 1.0, 1.0, 0.0])
    check(model, params, batch, prompts)
    assert model.loss_normalizers(batch)["hidden_text"].tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("softmax", ["own", "union"])
def test_terms_of_multi_label_tasks(softmax):
    shapes = dataclasses.replace(tiny_clip.SHAPES, multi_label=True)
    texts = tiny_clip.texts(tasks=(tiny_clip.PETS, shapes))
    model, params, prompts = made("both", softmax=softmax, texts=texts)
    batch = {
        **tiny_clip.batch([0, 1, 1], [2, -1, -1]),
        "labels": jnp.asarray([[0, 0, 0], [1, 1, 0], [0, 0, 0]], jnp.float32),
    }
    tasks = {**TASKS, "shapes": shapes}
    check(model, params, batch, prompts, tasks, [False, True, True])


@pytest.mark.parametrize("name", ["text", "image", "both", "classes", "mpt"])
def test_zero_shot_terms_match_numpy(name):
    """Features of the teacher are those of the templates, and of images without tokens."""
    model, params, _ = shared(name, FROM_CLIP)
    assert list(params["teacher"]) == ["class_features"] and not model.reads_teachers
    check(model, params, BATCH, {})


def test_teacher_class_features_match_numpy():
    model, params, prompts = shared("both")
    found, first = np.asarray(params["teacher"]["class_features"]), 0
    for row, task in enumerate(model.runs.task_names):
        expected = reference_classes.texts(CONFIG, WHOLE, TASKS[task], prompts[TEXT][row])
        np.testing.assert_allclose(found[first : first + len(expected)], expected, atol=1e-5)
        first += len(expected)
    np.testing.assert_array_equal(params["teacher"][IMAGE], prompts[IMAGE])
    assert first == len(found) == 5


def test_zero_shot_tasks_of_equal_names_have_their_own_templates():
    """With a context, the texts of both tasks are the same, and are shared."""
    tasks = {
        "first": TaskClasses("first", ("cat", "dog"), ("a {}.",)),
        "second": TaskClasses("second", ("cat", "dog"), ("the {}.", "{}.")),
    }
    texts = tiny_clip.texts(tasks=tuple(tasks.values()))
    assert texts.num_classes == 2
    runs = Runs(["second", "first", "second"], list("abc"))
    model, params, _ = made("text", FROM_CLIP, runs, texts=texts)
    found = np.asarray(params["teacher"]["class_features"]).reshape(3, 2, -1)
    for row, task in enumerate(runs.task_names):
        expected = reference_classes.texts(CONFIG, WHOLE, tasks[task], None)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["both", "mpt"])
def test_gradients_match_finite_differences_of_numpy(name):
    """The total loss without cross entropy, along one direction of all prompts."""
    model, params, prompts = shared(name)
    coefficients = {name: jnp.asarray(x) for name, x in model.objective.coefficients().items()}
    coefficients["cross_entropy"] = jnp.asarray(0.0)
    batch = {key: value[:3] for key, value in BATCH.items()}
    normalizers = model.loss_normalizers(batch)

    @jax.jit
    @jax.grad
    def gradient(prompt):
        sums, _ = model.loss_sums({**params, "prompt": prompt}, batch)
        return total_loss(model.objective, sums, normalizers, coefficients)[0]

    direction = jax.tree.map(lambda x: draw(x.shape, 3), params["prompt"])
    grads = jax.tree.leaves(gradient(params["prompt"]))
    found = sum(
        float((a * b).sum()) for a, b in zip(grads, jax.tree.leaves(direction), strict=True)
    )
    teacher = features(TASKS, model.runs, batch, by_site(model.prompt, prompts))

    def total(size):
        moved = jax.tree.map(
            lambda x, d: np.asarray(x, np.float64) + size * d, params["prompt"], direction
        )
        with jax.enable_x64(True):
            composed = plain(model, {"prompt": jax.tree.map(jnp.asarray, moved)})
        student = features(TASKS, model.runs, batch, composed)
        terms = expected_terms(student, teacher, [False] * 3)
        return sum(float(coefficients[name]) * np.mean(values) for name, values in terms.items())

    step = 1e-4
    np.testing.assert_allclose(found, (total(step) - total(-step)) / (2 * step), rtol=1e-3)


def test_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    model, params, prompts = shared("both")
    prompt = {site: {"table": jnp.asarray(x)} for site, x in prompts.items()}

    def loss(prompt):
        sums, _ = model.loss_sums({**params, "prompt": prompt}, BATCH)
        return sum(sums[name].sum() for name in TERMS)

    value, grads = jax.jit(jax.value_and_grad(loss))(prompt)
    assert abs(float(value)) < 1e-5
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(grads)) < 1e-4


def test_settings_choose_terms_and_coefficients():
    assert ALL.coefficients() == pytest.approx(
        {"kl": 0.7 * TAU**2, "hidden_image": 0.7 * 3, "hidden_text": 0.7 * 5}
    )
    assert list(ClassDistillation(hidden=False).coefficients()) == ["kl"]
    only = ClassDistillation(logits=False, text_weight=0.0)
    assert only.coefficients() == {"hidden_image": 0.9}
    model, params, _ = made("both", only)
    sums, metrics = run(model)(params, BATCH)
    assert sorted(sums) == ["cross_entropy", "hidden_image"] and "loss" in metrics
    without = tiny_clip.model(METHODS["both"], config=CONFIG)
    rest = {name: value for name, value in params.items() if name != "teacher"}
    expected = jax.jit(without.loss_sums)(rest, BATCH)[0]["cross_entropy"]
    np.testing.assert_allclose(sums["cross_entropy"], expected, rtol=1e-6)


def test_objective_text_without_distillation_is_unchanged():
    """The fingerprints of jobs hold it."""
    assert repr(ClassObjective()) == "ClassObjective(softmax='own')"
    assert "temperature=2.5" in repr(ClassObjective("union", ALL))


def test_evaluation_with_precomputed_texts_has_the_same_terms():
    model, params, _ = shared("both")
    expected, _ = run(model)(params, BATCH)
    prepared = model.params_for_evaluation(params)
    assert prepared["class_features"]["table"].shape == (5, 10)
    found, _ = jax.jit(model.loss_sums)(prepared, BATCH)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_image_features_in_the_batch_serve_student_and_teacher():
    model, params, _ = shared("text")
    images = reference_clip.image_features(CONFIG, WHOLE, BATCH["image"])
    rest = {key: value for key, value in BATCH.items() if key != "image"}
    batch = {**rest, "image_features": jnp.asarray(images, jnp.float32)}
    found, expected = (run(model)(params, x)[0] for x in (batch, BATCH))
    for name in ("kl", "hidden_text"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


def test_loss_fn_of_t5x_adds_the_terms():
    model, params, _ = shared("both")
    sums, _ = run(model)(params, BATCH)
    total, metrics = jax.jit(model.eval_fn)(params, BATCH)
    coefficients = model.objective.coefficients()
    expected = sum(coefficients[name] * float(x[0]) / 5 for name, x in sums.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert {f"term/{name}" for name in coefficients} <= set(metrics)
    grads = jax.jit(jax.grad(lambda p: model.loss_fn(p, BATCH, None)[0]))(params)
    assert not any(np.any(x) for k in grads if k != "prompt" for x in jax.tree.leaves(grads[k]))


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": 0.0}, "must be positive, got 0.0 and 1.0.*DISTILLATION = None"),
        ({"weight": float("nan")}, "must be positive, got nan"),
        ({"temperature": 0.0}, "must be positive, got 0.9 and 0.0"),
        ({"teacher": "zeroshot"}, "DISTILL_FROM 'zeroshot'.* Did you mean 'zero_shot'"),
        ({"logits": False, "hidden": False}, "both False"),
        ({"image_weight": -1.0}, "-1.0 and 1.0; they must not be negative"),
        ({"image_weight": 0.0, "text_weight": 0.0}, "nor both 0"),
        ({"logits": False, "temperature": 2.0}, "temperature=2.0 would have no effect"),
        ({"hidden": False, "text_weight": 2.0}, "text_weight=2.0 would have no effect"),
    ],
)
def test_settings_out_of_range_fail(settings, words):
    with pytest.raises(ValueError, match=words):
        ClassDistillation(**settings)


def test_models_that_cannot_have_teachers_fail():
    with pytest.raises(ValueError, match="backbone cannot be trainable. Set TRAINABLE = "):
        made("text", labels=((r"text_encoder/.*", "backbone"),))
    model, _, _ = made("mpt", labels=((r"prompt/.*/task_left", "frozen"),))
    assert model.has_teacher, "only the backbone has to be frozen"
    reads = SitePrompts(CoCoOp(C, init_prompt=WIDE))
    objective = ClassObjective("own", ALL)
    with pytest.raises(ValueError, match="text_weight = 0"):
        tiny_clip.model(reads, objective=objective, config=CONFIG)
    with pytest.raises(ValueError, match="no tokenizer"):
        made("text", FROM_CLIP, tokenizer=None)


def test_contexts_that_depend_on_the_image_learn_from_teachers():
    """CoCoOp has no class features, but class distributions."""
    settings = dataclasses.replace(FROM_CLIP, text_weight=0.0)
    objective = ClassObjective("own", settings)
    reads = SitePrompts(CoCoOp(C, init_prompt=WIDE))
    model = tiny_clip.model(reads, objective=objective, config=CONFIG)
    params = {**tiny_clip.params(model)}
    params["teacher"] = jax.tree.map(jnp.asarray, model.teacher_params(params, {}))
    sums, _ = jax.jit(model.loss_sums)(params, BATCH)
    student = np.asarray(jax.jit(model.own_logits)(params, BATCH))
    teacher = features(TASKS, model.runs, BATCH, {})
    scale = np.exp(float(params["logit_scale"]))
    each = [
        kl(softmax(scale * texts @ image / TAU), softmax(np.float64(own[: len(texts)]) / TAU))
        for own, image, texts in zip(student, *teacher, strict=True)
    ]
    np.testing.assert_allclose(sums["kl"], [sum(each)], rtol=2e-4)


@pytest.mark.parametrize(
    ("own", "theirs", "words"),
    [
        ("both", "text", "positions of image_tokens: saved nothing, current 4"),
        ("text", "both", "positions of image_tokens: saved 4, current nothing"),
        ("text", "classes", "positions of text_context: saved 9, current 3; .*text_classes"),
    ],
)
def test_teachers_at_other_sites_fail(own, theirs, words):
    model, _, _ = shared(own)
    with pytest.raises(ValueError, match=words):
        model.check_teacher(METHODS[theirs])
    model.check_teacher(METHODS[own])


def test_texts_of_teachers_are_those_of_the_tokenizer():
    model, _, _ = shared("text", FROM_CLIP)
    tasks = (tiny_clip.PETS, tiny_clip.SHAPES)
    assert model.teacher_texts.sha256 == class_texts(tasks, tiny_clip.Tokenizer(), 12).sha256
    assert shared("image", FROM_CLIP)[0].teacher_texts.context_length == 0

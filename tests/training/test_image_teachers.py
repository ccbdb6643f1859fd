"""Teachers of image jobs: where they come from, and steps in all layouts of a job."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.checkpointing import fingerprint
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_distillation import ClassDistillation
from mpt_jax.models.class_losses import ClassObjective
from mpt_jax.prompts.init import Normal, Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from mpt_jax.prompts.upt import UPT, PromptTransformer
from mpt_jax.t5x_compat import train_state_adapter
from mpt_jax.training import train_step, trainer
from mpt_jax.training.initialization import Origins, initialize_params
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.partitioning import PjitPartitioner, to_host
from mpt_jax.training.row_compaction import RowCompactor
from mpt_jax.training.schedules import EpochCosine
from mpt_jax.training.state import create_train_state, param_shapes, trainable_labels
from tests.fixtures import clip_models, saved_artifacts, tiny, tiny_clip

KEY = jax.random.PRNGKey(0)
CONFIG = clip_models.shallow()
C, TOKENS, LAYERS = tiny_clip.CONTEXT, 4, 2
WIDE = Uniform(0.5)
STUDENT = SitePrompts(MPT(C, 1, WIDE), MPT(TOKENS, 1, WIDE), image_layers=LAYERS)
SINGLE = SitePrompts(PromptTuning(C, WIDE), PromptTuning(TOKENS, WIDE), image_layers=LAYERS)
TASKS, NAMES = ["pets", "shapes", "pets"], ["pets_s1", "shapes_s1", "pets_s2"]
APART, JOINT = Runs(TASKS, NAMES, "independent"), Runs(TASKS, NAMES)
SETTINGS = ClassDistillation(2.0, temperature=2.0, image_weight=20.0, text_weight=20.0)
RECIPE = PromptOptimizer(
    {label: EpochCosine(0.05, 12, 2, 0.01) for label in ("shared", "task")},
    weight_decay=0.0,
    clip_norm=None,
    absent_tasks="hold",
    rule=functools.partial(sgd, 0.9, 0.01),
)
TERMS = ("cross_entropy", "kl", "hidden_image", "hidden_text")


def model_of(method=STUDENT, runs=JOINT, distillation=SETTINGS, **settings: Any):
    objective = ClassObjective("own", distillation)
    settings = {"config": CONFIG, "optimizer_def": RECIPE, **settings}
    return tiny_clip.model(method, runs, objective=objective, **settings)


# --- Origins -------------------------------------------------------------------------------------


@functools.cache
def backbone():
    """A random backbone's parameters and digests, as jobs from scratch have."""
    model = tiny_clip.model(SINGLE, config=CONFIG)
    return initialize_params(model, Origins(scratch=True), KEY)


def saved(path, method=SINGLE, runs=APART, seed=0, **digests: Any):
    """An artifact of teachers with random parameters; returns its folder and these."""
    model = tiny_clip.model(method, runs, config=CONFIG)
    start = model.init_prompt(KEY, jnp.asarray(model.embedding(backbone().params)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), start)
    saved_artifacts.save(path, method, params, runs, **{**backbone().digests, **digests})
    return str(path), params


def loaded(model, *paths, **settings):
    origins = Origins(scratch=True, teachers=[str(path) for path in paths], **settings)
    return initialize_params(model, origins, KEY)


def test_teachers_by_run_name_or_by_task(tmp_path):
    """pets_s1 has a teacher of its name; shapes has one teacher, whatever its name."""
    first, one = saved(tmp_path / "a", runs=Runs(["pets", "pets"], ["pets_s1", "pets_s2"]))
    second, two = saved(tmp_path / "b", runs=Runs(["shapes"], ["shapes"]), seed=1)
    model = model_of()
    found = loaded(model, first, second).params["teacher"]
    tables = one[IMAGE]["table"], two[IMAGE]["table"]
    np.testing.assert_array_equal(found[IMAGE], [tables[0][0], tables[1][0], tables[0][1]])
    contexts = np.stack([one[TEXT]["table"][0], two[TEXT]["table"][0], one[TEXT]["table"][1]])
    teacher = tiny_clip.model(SINGLE, JOINT, config=CONFIG)
    prompt = {TEXT: {"table": contexts}, IMAGE: {"table": found[IMAGE]}}
    expected = jax.jit(teacher.text_features)({**backbone().params, "prompt": prompt})
    np.testing.assert_allclose(found["class_features"], expected, atol=1e-6)
    assert found["class_features"].dtype == np.float32 and len(expected) == 8


def test_teachers_of_other_methods_are_plain_prompts(tmp_path):
    """UPT's transformer mixes both sites; MPT multiplies its factors."""
    mixed = UPT(
        SharedPrompt(C, Normal()),
        SharedPrompt(TOKENS, Normal()),
        image_layers=LAYERS,
        transformer=PromptTransformer(8),
    )
    for name, method in (("upt", mixed), ("mpt", STUDENT)):
        path, params = saved(tmp_path / name, method)
        found = loaded(model_of(), path).params["teacher"]
        rows = method.compose_site(IMAGE, jax.tree.map(jnp.asarray, params), APART, jnp.arange(3))
        np.testing.assert_allclose(found[IMAGE], np.reshape(rows, found[IMAGE].shape), atol=1e-6)


def test_teachers_frozen_in_the_state_and_in_no_record(tmp_path):
    path, _ = saved(tmp_path / "a")
    model = model_of()
    result = loaded(model, path)
    shapes = {name: leaf.shape for name, leaf in flatten(param_shapes(model)[0]).items()}
    assert shapes == {name: leaf.shape for name, leaf in flatten(result.params).items()}
    assert shapes["teacher/class_features"] == (8, 10)
    assert shapes["teacher/image_tokens"] == (3, TOKENS, 24)
    assert trainable_labels(model, result.params) == {"shared", "task"}
    state = create_train_state(model, result.params, PjitPartitioner())
    assert sorted(state.trainable) == ["prompt"] and "teacher" in state.frozen


def test_zero_shot_teacher_needs_no_artifact():
    settings = dataclasses.replace(SETTINGS, teacher="zero_shot")
    result = loaded(model_of(distillation=settings), "not read")
    assert list(result.params["teacher"]) == ["class_features"] and result.teacher_sha256 is None
    plain = tiny_clip.prompts(text=False, layers=LAYERS)
    model = model_of(plain, distillation=settings)
    result = loaded(model)
    assert "text_encoder" not in result.params
    features = result.params["class_features"]["table"]
    np.testing.assert_allclose(result.params["teacher"]["class_features"], features, atol=1e-6)


def test_teachers_errors_say_what_to_do(tmp_path):
    command = "train the teachers"
    with pytest.raises(ValueError, match=f"Origins.teachers names no artifact.*run: {command}"):
        loaded(model_of(), teachers_command=command)
    with pytest.raises(FileNotFoundError, match=f"No prompt artifact.*run: {command}"):
        loaded(model_of(), tmp_path / "no", teachers_command=command)
    pets, _ = saved(tmp_path / "a", runs=Runs(["pets"], ["one"]))
    with pytest.raises(ValueError, match=f"No teacher for the tasks shapes.*.{command}. and add"):
        loaded(model_of(), pets, teachers_command=command)
    again, _ = saved(tmp_path / "b", runs=Runs(["pets", "shapes"], ["two", "s"]))
    with pytest.raises(ValueError, match="Several teachers match the same run: pets_s1 .one in"):
        loaded(model_of(), pets, again)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("site", {}, "positions of image_tokens: saved nothing, current 4"),
        ("length", {}, "positions of image_tokens: saved 6, current 4"),
        ("layers", {}, "image_layers: saved 1, current 2"),
        ("same", {"embedding_sha256": "0" * 64}, "another backbone"),
        ("same", {"context_position_sha256": "0" * 64}, "other inputs: its context_position"),
        ("same", {"vocabulary_sha256": "0" * 64}, "another vocabulary"),
    ],
)
def test_incompatible_teachers_fail(tmp_path, name, change, words):
    text, tokens = PromptTuning(C), lambda n: PromptTuning(n, WIDE)
    methods = {
        "site": SitePrompts(text),
        "length": SitePrompts(text, tokens(6), image_layers=LAYERS),
        "layers": SitePrompts(text, tokens(4), image_layers=1),
        "same": SINGLE,
    }
    path, _ = saved(tmp_path / "a", methods[name], **change)
    with pytest.raises(ValueError, match=words):
        loaded(model_of(), path)


def test_teachers_of_texts_and_images_are_not_exchanged():
    with pytest.raises(ValueError, match="text_context and image_tokens, which are .* of images"):
        tiny.model().check_teacher(SINGLE)
    with pytest.raises(ValueError, match="positions of texts: saved 3, current nothing"):
        model_of().check_teacher(PromptTuning(3))


def test_teachers_of_class_contexts_know_only_their_own_classes(tmp_path):
    """Every class of a task has a context. The artifact of one task has no digest of another's."""
    method = SitePrompts(PromptTuning(3 * C, WIDE), text_classes=3)
    paths = []
    for task in ("pets", "shapes"):
        runs = Runs([task])
        model = tiny_clip.model(method, runs, config=CONFIG)
        names = [name for name in model.input_digests if f"of_{task}_" in name]
        digests: dict[str, Any] = {name: model.input_digests[name] for name in names}
        paths.append(saved(tmp_path / task, method, runs, **digests)[0])
    runs = Runs(["pets", "shapes"], groups="independent")
    found = loaded(model_of(method, runs), *paths).params["teacher"]
    assert found["class_features"].shape == (5, 10)


# --- Fingerprint ---------------------------------------------------------------------------------


def printed(model, result):
    found = fingerprint.run_fingerprint(model, result, 8, 0, {})
    assert json.loads(json.dumps(found)) == found
    return found


def test_fingerprint_has_the_digest_of_teachers(tmp_path):
    first, second = (saved(tmp_path / str(seed), seed=seed)[0] for seed in range(2))
    model = model_of()
    ours = printed(model, loaded(model, first))
    fingerprint.check_can_resume(ours, printed(model, loaded(model, first)), "RUN")
    with pytest.raises(ValueError, match="RUN .*teacher_sha256"):
        fingerprint.check_can_resume(ours, printed(model, loaded(model, second)), "RUN")
    other = model_of(distillation=dataclasses.replace(SETTINGS, temperature=3.0))
    with pytest.raises(ValueError, match="RUN .*objective"):
        fingerprint.check_can_resume(ours, printed(other, loaded(other, first)), "RUN")


def test_fingerprint_has_the_texts_of_a_zero_shot_teacher():
    """With a context, the student's texts do not depend on templates."""
    settings = dataclasses.replace(SETTINGS, teacher="zero_shot")
    other = dataclasses.replace(tiny_clip.PETS, templates=("a {}.",))
    texts = tiny_clip.texts(tasks=(other, tiny_clip.SHAPES))
    first = model_of(distillation=settings)
    second = model_of(distillation=settings, texts=texts)
    assert first.texts.sha256 == second.texts.sha256
    ours, theirs = (printed(model, loaded(model)) for model in (first, second))
    with pytest.raises(ValueError, match="RUN .*teacher_texts_sha256"):
        fingerprint.check_can_resume(ours, theirs, "RUN")
    assert "teacher_texts_sha256" not in model_of().training_settings


# --- Steps ---------------------------------------------------------------------------------------

ROWS, LABELS = [0, 1, 2, 0, 1, 2], [2, 1, 0, 1, 0, 2]


def prompts_of_run(name, seed=3):
    """Random teachers of a run, which depend only on its name."""
    rng = np.random.default_rng([seed, *name.encode()])
    draw = lambda *shape: rng.normal(0, 0.5, shape).astype(np.float32)  # noqa: E731
    return {TEXT: draw(C, 16), IMAGE: draw(TOKENS, 24)}


def made(runs=APART, method=STUDENT, **settings):
    model = model_of(method, runs, **settings)
    params = {**tiny_clip.params(model), "logit_scale": jnp.float32(3.0)}  # KLs are not tiny
    each = [prompts_of_run(name) for name in runs.run_names]
    prompts = {site: np.stack([x[site] for x in each]) for site in (TEXT, IMAGE)}
    teacher = model.teacher_params(params, prompts if model.reads_teachers else {})
    return model, {**params, "teacher": jax.tree.map(jnp.asarray, teacher)}


shared = functools.cache(made)  # tests of the same model share its programs


def batch_of(seed=0, **settings):
    return tiny_clip.batch(ROWS, LABELS, seed, **settings)


def pick(batch, rows):
    return {name: value[jnp.asarray(rows)] for name, value in batch.items()}


def state_of(model, params):
    return create_train_state(model, jax.tree.map(jnp.array, params), PjitPartitioner())


@functools.cache
def step_of(model, parts):
    return jax.jit(functools.partial(train_step.gradients, model, num_microbatches=parts))


def gradients(model, params, batch, parts=1):
    state = state_of(model, params)
    grads, metrics = step_of(model, parts)(state.trainable, state.frozen, batch, None)
    return grads["prompt"], metrics


def close(found, expected, tolerance=1e-5):
    """Equal except for rounding, which is relative to the largest gradient."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    relative = lambda tree: jax.tree.map(lambda x: np.asarray(x) / scale, tree)  # noqa: E731
    tiny.close(relative(found), relative(expected), tolerance)


def row_of(tree, row):
    return {name: np.asarray(leaf)[row] for name, leaf in flatten(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3])
def test_microbatches_change_only_rounding(parts):
    model, params = made(JOINT)
    batch = batch_of(weights=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    found, expected = gradients(model, params, batch, parts), gradients(model, params, batch)
    close(found[0], expected[0])
    tiny.close(found[1], expected[1], 1e-5)
    assert expected[1]["term/kl"].weight.tolist() == [5.0]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["artifacts", "zero_shot"])
def test_independent_runs_match_separate_jobs(teacher):
    """Every term and gradient of the first step, and parameters after three."""
    settings = dataclasses.replace(SETTINGS, teacher=teacher)
    together, params = made(distillation=settings)
    batches = [batch_of(seed) for seed in range(3)]
    grads, metrics = gradients(together, params, batches[0])

    def train(model, params, batches):
        step = jax.jit(lambda s, b: train_step.train_step(model, 1, s, b, KEY)[0])
        return functools.reduce(step, batches, state_of(model, params))

    state = train(together, params, batches)
    for row in (0, 1):
        alone, own = made(Runs([TASKS[row]], [NAMES[row]]), distillation=settings)
        mine = [
            {**pick(batch, [row, row + 3]), "task_ids": jnp.zeros(2, jnp.int32)}
            for batch in batches
        ]
        own_grads, own_metrics = gradients(alone, own, mine[0])
        close(row_of(grads, row), row_of(own_grads, 0))
        for term in TERMS:
            value, expected = (
                np.asarray(x[f"term/{term}"].sum)[i] for x, i in ((metrics, row), (own_metrics, 0))
            )
            np.testing.assert_allclose(value, expected, 1e-5, 1e-6, err_msg=term)
            assert value > 0
        trained = train(alone, own, mine)
        found, expected = (
            row_of(x.trainable["prompt"], i) for x, i in ((state, row), (trained, 0))
        )
        tiny.close(found, expected, 1e-5)
        moved = {k: np.abs(v - row_of(own["prompt"], 0)[k]).max() for k, v in found.items()}
        assert min(moved.values()) > 1e-3, moved


@pytest.mark.parametrize("chunk", [3, pytest.param(128, marks=pytest.mark.slow)])
def test_nan_of_one_run_leaves_others_equal(chunk):
    model, params = made(text_chunk=chunk)
    batch = batch_of()
    expected, _ = gradients(model, params, batch)
    spoiled = {
        **params, "prompt": jax.tree.map(lambda x: x.at[1].set(jnp.nan), params["prompt"])
    }  # fmt: skip
    found, metrics = gradients(model, spoiled, batch)
    for row in (0, 2):
        tiny.close(row_of(found, row), row_of(expected, row), 0)
    for term in TERMS:
        finite = np.isfinite(np.asarray(metrics[f"term/{term}"].sum))
        assert finite.tolist() == [True, False, True], term


def test_padding_changes_nothing():
    model, params = shared()
    whole = pick(batch_of(), [0, 1, 3])
    padding = tiny_clip.batch([2, 0], [-1, -1], seed=9, weights=[0.0, 0.0])
    padded = jax.tree.map(lambda *x: jnp.concatenate(x), whole, padding)
    found, expected = gradients(model, params, padded), gradients(model, params, whole)
    close(found[0], expected[0])
    tiny.close(found[1], expected[1], 1e-5)


def test_rows_of_finished_runs_are_left_out():
    """Teachers of the other runs are still those of their bank rows."""
    model, params = shared()
    order = np.argsort(ROWS, kind="stable")
    batch = {name: np.asarray(value)[order] for name, value in batch_of().items()}
    packed = RowCompactor(APART).pack(batch, [False, True, False])
    assert packed["task_ids"].tolist() == [1, 1, 1], "padding names an active run"
    assert packed["loss_weights"].tolist() == [1, 1, 0]
    arrays = [{k: jnp.asarray(v) for k, v in x.items()} for x in (packed, batch)]
    found, expected = (gradients(model, params, x) for x in arrays)
    close(row_of(found[0], 1), row_of(expected[0], 1))
    for term in TERMS:
        value, other = (np.asarray(x[1][f"term/{term}"].sum)[1] for x in (found, expected))
        np.testing.assert_allclose(value, other, 1e-5, 1e-6)


@pytest.mark.parametrize(
    "kind",
    ["each", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rows", "tied"))],
)
def test_factors_of_ones_equal_the_shared_prompt(kind):
    """MPT without noise is MVLPT's shared prompt at step 0: the same loss, and the same gradient of
    the shared prompt."""
    ones = lambda key, length, width, rank: (  # noqa: E731
        jnp.ones((length, rank)),
        jnp.ones((rank, width)),
    )
    shared = SitePrompts(SharedPrompt(C, WIDE), SharedPrompt(TOKENS, WIDE), image_layers=LAYERS)
    expected_model, params = made(JOINT, shared)
    expected, expected_metrics = gradients(expected_model, params, batch_of())
    layered = MPT(TOKENS, 1, WIDE, ones, layers=LAYERS, layer_factors=kind)
    method = SitePrompts(MPT(C, 1, WIDE, ones), layered, image_layers=LAYERS)
    model, own = made(JOINT, method)
    for site in (TEXT, IMAGE):
        np.testing.assert_array_equal(
            own["prompt"][site]["shared"], params["prompt"][site]["shared"]
        )
    found, metrics = gradients(model, own, batch_of())
    tiny.close(metrics, expected_metrics, 1e-6)
    close({x: found[x]["shared"] for x in found}, {x: expected[x]["shared"] for x in found})


def test_trainer_learns_from_its_teacher():
    """With the terms of distillation, a student comes closer to its teacher."""
    settings = ClassDistillation(1.0, image_weight=100.0, text_weight=100.0)
    model, params = made(APART, SINGLE, distillation=settings, optimizer_def=tiny.optimizer(0.1))
    one = trainer.Trainer(model, state_of(model, params), PjitPartitioner(), KEY)
    batch = {name: np.asarray(value) for name, value in batch_of().items()}
    before = one.evaluate([batch])
    for _ in range(30):
        one.train(batch)
    after = one.evaluate([batch])
    for term in ("hidden_image", "hidden_text"):
        assert after[f"term/{term}"] < 0.5 * before[f"term/{term}"], term


@pytest.mark.slow
@pytest.mark.devices(8)
def test_runs_over_several_devices_match_one_device():
    """Prompts of runs are on the shard of their examples; teachers are on every device."""
    runs = Runs(["pets", "shapes"] * 2, list("abcd"), "independent")
    batch = tiny_clip.batch([0, 0, 1, 1, 2, 2, 3, 3], [0, 2, 1, 0, 1, 0, 0, 1])
    batch = {name: np.asarray(value) for name, value in batch.items()}
    found = []
    for number in (1, 4):
        model, params = made(runs)
        mesh = PjitPartitioner(devices=jax.devices()[:number])
        state = create_train_state(model, jax.tree.map(jnp.array, params), mesh, number > 1)
        one = trainer.Trainer(model, state, mesh, KEY, rows_by_run=number > 1)
        for _ in range(2):
            one.train(batch)
        metrics = one.read_metrics() | one.evaluate([batch])
        found.append((to_host(one.state.trainable), metrics))
        if number > 1:
            frozen, trainable = one.state.frozen["teacher"], one.state.trainable["prompt"]
            assert all(leaf.sharding.is_fully_replicated for leaf in frozen.values())
            assert not trainable[TEXT]["task_left"].sharding.is_fully_replicated
    tiny.close(found[1][0], found[0][0], 1e-5)
    for name in ("term/kl", "term/hidden_image", "term/hidden_text", "loss/d"):
        assert found[1][1][name] == pytest.approx(found[0][1][name], rel=1e-4)


# --- T5X -----------------------------------------------------------------------------------------


def test_t5x_replicates_teachers_and_saves_none():
    model, params = shared()
    origins = Origins(scratch=True)
    host = train_state_adapter.Host(model, origins, model.optimizer_def, partitioner=None)
    assert host.axes["teacher/class_features"] == (None, None)
    assert host.axes["teacher/image_tokens"] == (None, None, None)
    opt_state = host.optimizer.init(host.split(params)[0])
    state = train_state_adapter.HostState(jnp.zeros((), jnp.int32), params, opt_state, host)
    saved = flatten(state.state_dict())
    assert any("prompt/" in name for name in saved)
    assert not any("teacher" in name for name in saved)

"""The linear probe, compared with NumPy and with scikit-learn's logistic regression."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.prompts.base import method_from_config
from mpt_jax.prompts.heads import HEAD, LinearProbe
from mpt_jax.prompts.sites import SiteContext
from mpt_jax.training import trainer
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import EpochCosine
from mpt_jax.training.state import create_train_state, num_trainable_params
from tests.fixtures import clip_models, reference_clip, saved_artifacts, tiny_clip, tiny_lanes

CONFIG, KEY = clip_models.tiny(), jax.random.PRNGKey(0)
ROWS = [0, 1, 2, 1, 0]
U = 10
DECAY, SIZE, STEPS = 5e-4, 150, 300


def made(**settings):
    return tiny_lanes.model(LinearProbe(4), **{"config": CONFIG, **settings})


def batch():
    labels = np.random.default_rng(0).integers(0, 2, (5, 4))
    labels[[0, 1, 3, 4]] = 0
    images = tiny_clip.batch(ROWS, [2, 0, -1, 1, 0])
    return {**images, "labels": jnp.asarray(labels, jnp.float32)}


def losses(features, head, given, temperature=1.0):
    """The logits of each example, and the sum of the losses, in float64."""
    total, every = 0.0, []
    counts = [len(task.names) for task in tiny_lanes.TASKS]
    for feature, row, label, labels in zip(
        features, ROWS, np.asarray(given["label"]), np.asarray(given["labels"]), strict=True
    ):
        logits = (head["kernel"][row] @ feature + head["bias"][row])[: counts[row]] / temperature
        if label >= 0:
            total += np.log(np.exp(logits).sum()) - logits[label]
        else:
            signs = np.where(labels > 0, 1, -1)
            total += np.log1p(np.exp(-signs * logits)).mean()
        every.append(logits)
    return every, total


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_logits_and_gradient_equal_numpy(temperature):
    model = made(temperature=temperature)
    params, given = tiny_lanes.params(model), batch()
    assert set(params) == {"image_encoder", "prompt"} and set(params["prompt"]) == {HEAD}
    assert num_trainable_params(model, params) == 3 * 4 * (U + 1)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["prompt"][HEAD])
    features = reference_clip.image_features(CONFIG, params, given["image"])
    expected, total = losses(features, head, given, temperature)
    found = np.asarray(jax.jit(model.own_logits)(params, given))
    for row, logits in zip(found, expected, strict=True):
        np.testing.assert_allclose(row[: len(logits)], logits, atol=2e-5 / temperature)
        assert (row[len(logits) :] == -np.inf).all()

    def loss(head):
        return model.loss_sums({**params, "prompt": {HEAD: head}}, given)[0]["cross_entropy"].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params["prompt"][HEAD])
    np.testing.assert_allclose(value, total, rtol=1e-4)
    for name, leaf in head.items():
        for place in np.ndindex(leaf.shape):
            moved = []
            for sign in (1, -1):
                other = {key: x.copy() for key, x in head.items()}
                other[name][place] += sign * 1e-5
                moved.append(losses(features, other, given, temperature)[1])
            slope = (moved[0] - moved[1]) / 2e-5
            np.testing.assert_allclose(gradient[name][place], slope, atol=1e-4 / temperature)


def clusters(count, seed):
    """Features of length 1 around three centers, with labels."""
    centers = np.random.default_rng(7).normal(size=(3, U))
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    points = centers[labels] + 1.2 * rng.normal(size=(count, U))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def test_trained_probe_equals_logistic_regression():
    """Each of two independent runs has the accuracy of scikit-learn, within 1.5 points, and nearly
    its probabilities. Ours also decays biases."""
    task = TaskClasses("points", ("one", "two", "three"))
    runs = Runs(["points"] * 2, ["a", "b"], "independent")
    rule = lambda: sgd(0.9, DECAY)  # noqa: E731
    rates = {"head": EpochCosine(1.0, STEPS, 1, 0.1)}
    optimizer = PromptOptimizer(
        rates, rule=rule, weight_decay=0.0, clip_norm=None, absent_tasks="hold"
    )
    model = made(tasks=(task,), runs=runs, optimizer_def=optimizer)
    partitioner = PjitPartitioner()
    state = create_train_state(model, tiny_lanes.params(model), partitioner)
    running = trainer.Trainer(model, state, partitioner, KEY)
    data = [clusters(SIZE, seed) for seed in (1, 2)]
    given = {
        "image_features": np.concatenate([x for x, _ in data]),
        "task_ids": np.repeat(np.arange(2, dtype=np.int32), SIZE),
        "label": np.concatenate([y for _, y in data]).astype(np.int32),
        "loss_weights": np.ones(2 * SIZE, np.float32),
    }
    for _ in range(STEPS):
        running.train(given)
    params = {**running.state.frozen, **running.state.trainable}
    points, labels = clusters(400, 3)
    for row, (features, targets) in enumerate(data):
        test = {"image_features": jnp.asarray(points), "task_ids": jnp.full(400, row, jnp.int32)}
        scores = np.asarray(jax.jit(model.score_batch)(params, test))
        expected = LogisticRegression(C=1 / (SIZE * DECAY), max_iter=5000).fit(features, targets)
        accuracy = 100 * np.mean(scores.argmax(1) == labels)
        assert accuracy == pytest.approx(100 * expected.score(points, labels), abs=1.5)
        assert accuracy > 60
        assert np.abs(np.exp(scores) - expected.predict_proba(points)).mean() < 0.02


def test_heads_of_known_runs_are_kept_and_others_start_new():
    context = SiteContext(jnp.zeros((0, 8)), None, 8, U)
    old, method = Runs(["a", "b"]), LinearProbe(5)
    source = LinearProbe(3).init(KEY, old, context)
    runs = Runs(["b", "c"])
    new = method.init(jax.random.PRNGKey(1), runs, context)
    found = method.transfer(source, LinearProbe(3), old, runs, lambda: new)
    for name in ("kernel", "bias"):
        kept, fresh, values = source[HEAD][name], new[HEAD][name], found[HEAD][name]
        np.testing.assert_array_equal(values[0, :3], kept[1])
        np.testing.assert_array_equal(values[0, 3:], fresh[0, 3:])
        np.testing.assert_array_equal(values[1], fresh[1])
    with pytest.raises(ValueError, match=r"LinearProbe.num_classes to the number of classes"):
        LinearProbe(2).transfer(
            source, LinearProbe(3), old, runs, lambda: LinearProbe(2).init(KEY, runs, context)
        )
    with pytest.raises(ValueError, match="'multi_lane'.* is not a linear probe"):
        method.transfer({}, tiny_lanes.method(), old, runs)
    with pytest.raises(ValueError, match="without prompts has no single plain prompt"):
        method.compose({}, runs, jnp.arange(2))


def test_artifact_round_trip(tmp_path):
    model = made()
    prompt = tiny_lanes.params(model)["prompt"]
    saved_artifacts.save(
        tmp_path / "a", model.prompt, prompt, model.runs, **model.input_digests,
        images=model.input_settings, include_folded=True,
    )  # fmt: skip
    found = artifacts.load_artifact(tmp_path / "a")
    assert found.method == model.prompt and found.runs == model.runs
    for name, values in flatten(prompt).items():
        np.testing.assert_array_equal(flatten(found.params)[name], values)
    assert "Runs have no prompts." in (tmp_path / "a" / "README.md").read_text()
    for change, words in (({"num_classes": 0}, "num_classes"), ({"extra": 1}, "extra")):
        with pytest.raises(ValueError, match=words):
            method_from_config("linear_probe", {"num_classes": 3, **change}, "config.json")


def test_settings_that_contradict():
    with pytest.raises(ValueError, match="num_classes is 0"):
        LinearProbe(0)
    with pytest.raises(ValueError, match=r"4 classes, but LinearProbe.num_classes is 3"):
        tiny_lanes.model(dataclasses.replace(LinearProbe(4), num_classes=3), config=CONFIG)
    with pytest.raises(ValueError, match="NORMALIZE is False"):
        made(normalize=False)

"""Tests of the model with every registered method: batches, labels, loss, inference."""

import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, label_tree, merge, split, unflatten
from mpt_jax.models import decoding, encoder_decoder, losses, metrics
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts import method_names
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.optimizers import STEP_COUNTER
from mpt_jax.training.state import trainable_labels
from mpt_jax.training.train_step import gradients
from tests.fixtures import tiny
from tests.fixtures.reference_decoding import cut, slow_beam

DISTILLED = Objective(z_loss=1e-2, distillation=Distillation(hidden_layers="all"))
GROUPED = Runs(tiny.RUNS.task_names, groups=[1, 0, 1])
APART = Runs(tiny.RUNS.task_names, groups="independent")


class Case:
    """A model, random parameters, a mixed batch, and its compiled functions."""

    def __init__(self, model: encoder_decoder.PromptedEncoderDecoder):
        self.model = model
        self.params = tiny.params(model)
        self.batch = tiny.batch([2, 0, 1, 0], prompt_length=model.prompt.prompt_length)
        self.trainable, self.frozen = split(
            self.params, model.labels, trainable_labels(model, self.params)
        )
        self.logits = jax.jit(model.logits)
        self.predict = jax.jit(model.predict_batch_with_aux)
        self.score = jax.jit(model.score_batch)
        self._loss = jax.jit(jax.value_and_grad(self._total, has_aux=True))

    def _total(self, trainable, frozen, batch):
        sums, found = self.model.loss_sums(merge(trainable, frozen), batch)
        weights = self.model.loss_normalizers(batch)
        total, _ = losses.total_loss(self.model.objective, sums, weights)
        return total, (sums, weights, found)

    def loss(self, batch, **frozen):
        """Returns (sums, normalizers, metrics) and the gradients of trainable parameters."""
        (_, found), grads = self._loss(self.trainable, {**self.frozen, **frozen}, batch)
        return found, grads


@pytest.fixture(scope="module", params=method_names())
def case(request) -> Case:
    method = tiny.method(request.param)
    # Without a prompt, something else must be trainable.
    labels = () if method.labels else encoder_decoder.LAYER_NORMS
    objective = DISTILLED if method.prompt_length else Objective(label_smoothing=0.1)
    return Case(
        tiny.model(
            GROUPED if method.labels else tiny.RUNS, method, labels=labels, objective=objective
        )
    )


@pytest.fixture(scope="module")
def mpt() -> Case:
    return Case(tiny.model(APART, objective=DISTILLED))


# --- The contract of every method ----------------------------------------------------------------


def test_gradients_only_for_trainable_labels(case):
    labels = flatten(label_tree(case.params.get("prompt", {}), case.model.prompt.labels))
    expected = {
        f"prompt/{name}" for name, label in labels.items() if label != encoder_decoder.FROZEN
    }
    counted = {f"prompt/{name}" for name, label in labels.items() if label == STEP_COUNTER}
    if not expected:
        expected = {name for name in flatten(case.params) if name.endswith("norm/scale")}
    assert set(flatten(case.trainable)) == expected
    _, grads = case.loss(case.batch)
    assert set(flatten(grads)) == expected
    for name, grad in flatten(grads).items():
        has_one = np.abs(grad).max() > 0
        assert has_one == (name not in counted), f"{name} has a gradient: {has_one}"


def test_packed_batch_equals_unpacked(case):
    (sums, weights, found), grads = case.loss(case.batch)
    packed = tiny.pack(case.batch, [[1, 3], [0, 2]])
    (packed_sums, packed_weights, packed_found), packed_grads = case.loss(packed)
    tiny.close(packed_weights, weights, 1e-6)
    tiny.close(packed_sums, sums, 1e-5)
    tiny.close(of_runs(packed_found), of_runs(found), 1e-5)
    tiny.close(packed_grads, grads, 1e-5)


def of_runs(found):
    """Returns the metrics that do not depend on how examples are placed in rows."""
    return {name: metric for name, metric in found.items() if not name.startswith("batch/")}


@pytest.mark.parametrize("reduce", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
def test_prompt_distance_packed_equals_unpacked(reduce):
    alone = Distillation(logits=False, hidden=False, prompt_distance=True, reduce=reduce)
    case = Case(tiny.model(APART, objective=Objective(distillation=alone)))
    (sums, weights, _), grads = case.loss(case.batch)
    packed = tiny.pack(case.batch, [[1, 3], [0, 2]])
    (packed_sums, packed_weights, _), packed_grads = case.loss(packed)
    tiny.close(packed_weights, weights, 1e-6)
    tiny.close(packed_sums, sums, 1e-5)
    tiny.close(packed_grads, grads, 1e-5)


def test_batch_metrics_count_padding_and_examples():
    batch = tiny.batch([2, 0, None], seed=1)
    found = metrics.batch_metrics(tiny.arrays(batch))
    text = np.count_nonzero(batch["encoder_input_tokens"])
    rows, positions = batch["encoder_input_tokens"].shape
    assert found["batch/encoder_padding"].sum == rows * positions - text - 2 * tiny.PROMPT
    assert found["batch/encoder_padding"].weight == rows * positions
    targets = np.count_nonzero(batch["decoder_target_tokens"])
    assert found["batch/decoder_padding"].sum == batch["decoder_target_tokens"].size - targets
    per_row = found["batch/examples_per_row"]
    assert (per_row.sum, per_row.weight) == (2, 3)
    packed = metrics.batch_metrics(tiny.arrays(tiny.pack(batch, [[0, 1]])))[
        "batch/examples_per_row"
    ]
    assert (packed.sum, packed.weight) == (2, 1)


def test_predict_batch_equals_teacher_forced_argmax(case):
    tokens, found = case.predict(case.params, case.batch)
    tokens = np.asarray(tokens)
    assert tokens.shape == case.batch["decoder_target_tokens"].shape
    shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    logits = case.logits(case.params, {**case.batch, "decoder_input_tokens": shifted})
    ended = np.cumsum(shifted == tiny.EOS, axis=1) > 0
    expected = np.where(ended, 0, np.argmax(logits, -1))
    np.testing.assert_array_equal(tokens, expected)
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)[
        ..., 0
    ]
    np.testing.assert_allclose(found["scores"], np.where(ended, 0, chosen).sum(1), atol=1e-4)


def test_predict_batch_ignores_targets(case):
    garbled = {**case.batch, "decoder_input_tokens": case.batch["decoder_input_tokens"] * 0 + 7}
    found = case.predict(case.params, garbled)[0]
    np.testing.assert_array_equal(found, case.predict(case.params, case.batch)[0])


def test_score_batch_is_log_probability_of_targets(case):
    found = case.score(case.params, case.batch)
    logits = np.asarray(case.logits(case.params, case.batch), np.float64)
    for i, weights in enumerate(case.batch["decoder_loss_weights"]):
        expected = 0.0
        for position in np.flatnonzero(weights):
            row = logits[i, position]
            target = case.batch["decoder_target_tokens"][i, position]
            expected += row[target] - np.log(np.exp(row).sum())
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)


def test_artifact_round_trip_same_logits(case, tmp_path):
    prompt = case.params.get("prompt", {})
    model = case.model
    read = tiny.read_back(tmp_path / "artifact", model.prompt, prompt, model.runs)
    assert read.method.name == case.model.prompt.name
    again = {**case.params, **({"prompt": read.params} if prompt else {})}
    np.testing.assert_array_equal(
        case.logits(again, case.batch), case.logits(case.params, case.batch)
    )


# --- Prompts -------------------------------------------------------------------------------------


def test_mpt_unit_factors_equal_prompt_tuning(mpt):
    prompt = mpt.params["prompt"]
    ones = {name: jnp.ones_like(prompt[name]) for name in ("task_left", "task_right")}
    table = prompt["shared"][np.asarray(APART.group_of_row)]
    plain = tiny.model(APART, PromptTuning(tiny.PROMPT))
    params = {**mpt.params, "prompt": {"table": table}}
    params.pop("teacher")
    student = {**mpt.params, "prompt": {"shared": prompt["shared"], **ones}}
    np.testing.assert_allclose(
        mpt.logits(student, mpt.batch),
        jax.jit(plain.logits)(params, mpt.batch),
        atol=1e-6,
    )


def test_distillation_student_with_teacher_prompts_zero_loss(mpt):
    folded = materialize(mpt.model.prompt, mpt.params["prompt"], APART)
    (sums, _, _), _ = mpt.loss(mpt.batch, teacher={"table": folded})
    for term in ("kl", "hidden_encoder", "hidden_decoder"):
        np.testing.assert_allclose(sums[term], 0, atol=1e-5)
        assert np.all(np.asarray(mpt.loss(mpt.batch)[0][0][term]) > 1e-2), (
            "other prompts have a positive loss"
        )


def test_forward_uses_prompt_of_each_examples_task(mpt):
    swap = np.array([1, 0, 2], np.int32)
    other = {k: swap[v] if k.endswith("task_ids") else v for k, v in mpt.batch.items()}
    prompt = {name: leaf[swap] for name, leaf in mpt.params["prompt"].items()}
    before = np.asarray(mpt.logits(mpt.params, mpt.batch))
    both = mpt.logits({**mpt.params, "prompt": prompt}, other)
    np.testing.assert_array_equal(both, before)
    moved = np.abs(np.asarray(mpt.logits(mpt.params, other)) - before).max((1, 2))
    assert mpt.batch["encoder_task_ids"][:, 0].tolist() == [2, 0, 1, 0]
    assert moved[0] == 0 and (moved[1:] > 1e-3).all()


# --- Batches -------------------------------------------------------------------------------------


def test_loss_mixed_batch_equals_sum_over_tasks(mpt):
    rows = [2, 0, 1, 0]
    (sums, weights, _), grads = mpt.loss(tiny.batch(rows))
    singles = [
        mpt.loss(tiny.batch([row if row == task else None for row in rows])) for task in range(3)
    ]
    add = functools.partial(jax.tree.map, lambda *parts: sum(parts))
    tiny.close(add(*(single[0][0] for single in singles)), sums, 1e-5)
    tiny.close(add(*(single[0][1] for single in singles)), weights, 1e-6)
    tiny.close(add(*(single[1] for single in singles)), grads, 1e-6)
    # ABSENT_TASKS = 'hold' relies on gradients of absent rows being exactly zero.
    for task, (_, alone) in enumerate(singles):
        for leaf in alone["prompt"].values():
            assert not np.delete(np.asarray(leaf), task, axis=0).any()
            assert np.asarray(leaf[task]).any()


def test_loss_padding_contents_ignored(mpt):
    batch = tiny.batch([2, None, 1, 0])
    found, grads = mpt.loss(batch)
    rng = np.random.default_rng(5)
    garbage = {name: value.copy() for name, value in batch.items()}
    encoder = (batch["encoder_input_tokens"] == 0) & (batch["encoder_prompt_slots"] == 0)
    decoder = batch["decoder_loss_weights"] == 0
    garbage["encoder_task_ids"][encoder] = rng.integers(0, 3, encoder.sum())
    for name in ("decoder_target_tokens", "decoder_task_ids"):
        garbage[name][decoder] = rng.integers(0, 3, decoder.sum())
    tiny.close(mpt.loss(garbage), (found, grads), 1e-6)


def test_loss_padding_rows_ignored(mpt):
    padded = tiny.batch([2, None, 1, 0])
    (*found, metrics_found), grads = mpt.loss(padded)
    (*expected, metrics_expected), grads_expected = mpt.loss(tiny.pick(padded, [0, 2, 3]))
    tiny.close((found, grads), (expected, grads_expected), 1e-6)
    tiny.close(of_runs(metrics_found), of_runs(metrics_expected), 1e-6)


def test_loss_normalizers_add_up_over_parts_of_batch(mpt):
    batch = tiny.batch([2, None, 1, 0])
    whole = mpt.model.loss_normalizers(tiny.arrays(batch))
    parts = [
        mpt.model.loss_normalizers(tiny.arrays(tiny.pick(batch, rows))) for rows in ([0, 1], [2, 3])
    ]
    tiny.close(jax.tree.map(jnp.add, *parts), whole, 1e-6)
    order = [3, 2, 0]  # the batch row of each task
    tokens = batch["decoder_loss_weights"].sum(1)[order]
    np.testing.assert_array_equal(whole["cross_entropy"], tokens)
    # Three encoder states (two layers) of three prompt positions and the text, two decoder states.
    real = (batch["encoder_input_tokens"] > 0) | (batch["encoder_prompt_slots"] > 0)
    positions = real.sum(1)[order]
    np.testing.assert_array_equal(whole["hidden_encoder"], positions * 3 * tiny.WIDTH)
    np.testing.assert_array_equal(whole["hidden_decoder"], tokens * 2 * tiny.WIDTH)


def test_loss_metric_excludes_label_smoothing(mpt):
    """`token_losses.values_of_logits` itself is checked in float64 by test_token_losses.py."""
    plain, smoothed = (
        tiny.model(APART, objective=Objective(label_smoothing=smoothing))
        for smoothing in (0.0, 0.3)
    )
    batch = tiny.arrays(mpt.batch)
    sums, found = jax.jit(smoothed.loss_sums)(mpt.params, batch)
    expected, _ = jax.jit(plain.loss_sums)(mpt.params, batch)
    np.testing.assert_allclose(found["loss"].sum, expected["cross_entropy"], rtol=1e-6)
    assert np.all(np.abs(sums["cross_entropy"] - expected["cross_entropy"]) > 1e-2)


# --- Hidden states and the teacher ---------------------------------------------------------------


def test_hidden_layers_selects_states_to_compare(mpt):
    choices = {"last": (-1,), "all": (0, 1, 2), (0, -1): (0, -1), (1,): (1,)}

    @jax.jit
    def encoder_states(params, batch):
        found = {}
        for layers in choices:
            objective = Objective(distillation=Distillation(hidden_layers=layers))
            model = tiny.model(APART, objective=objective)
            found[str(layers)] = model.forward(params, batch, hidden=True).encoder_hidden
        return found

    found = encoder_states(mpt.params, mpt.batch)
    for layers, indices in choices.items():
        chosen = found[str(layers)]
        assert len(chosen) == len(indices)
        for state, index in zip(chosen, indices, strict=True):
            np.testing.assert_array_equal(state, found["all"][index])
    # Embeddings come first: prompts at the slots.
    prompts = materialize(mpt.model.prompt, mpt.params["prompt"], APART)
    first = mpt.batch["encoder_task_ids"][:, 0]
    np.testing.assert_allclose(found["all"][0][:, : tiny.PROMPT], prompts[first], atol=1e-6)


def test_hidden_layers_out_of_range_raises(mpt):
    objective = Objective(distillation=Distillation(hidden_layers=(2,)))
    model = tiny.model(APART, objective=objective)
    with pytest.raises(ValueError, match=r"\[2\], but .* only 2 hidden states"):
        jax.eval_shape(functools.partial(model.forward, hidden=True), mpt.params, mpt.batch)


# --- T5X's loss ----------------------------------------------------------------------------------


def test_t5x_loss_fn_same_gradients_and_zero_for_frozen(mpt):
    differentiate = jax.jit(jax.value_and_grad(mpt.model.loss_fn, has_aux=True))
    (total, found), grads = differentiate(mpt.params, mpt.batch, None)
    (sums, weights, _), expected = mpt.loss(mpt.batch)
    ours, _ = losses.total_loss(mpt.model.objective, sums, weights)
    np.testing.assert_allclose(total, ours, rtol=1e-6)
    tiny.close(grads["prompt"], expected["prompt"], 1e-6)
    for name, grad in flatten(grads).items():
        assert name.startswith("prompt/") or not np.any(grad), name
    np.testing.assert_allclose(
        found["term/kl"].compute(), sums["kl"].sum() / weights["kl"].sum(), rtol=1e-5
    )


# --- Errors --------------------------------------------------------------------------------------


def test_predict_and_score_packed_batch_raise(mpt):
    packed = tiny.arrays(tiny.pack(mpt.batch, [[0, 1]]))
    for use in (mpt.model.predict_batch, mpt.model.score_batch):
        with pytest.raises(ValueError, match="pack = False"):
            use(mpt.params, packed)


def test_num_decodes_greedy_raises_sampling_returns_them(mpt):
    with pytest.raises(ValueError, match="num_decodes is 2"):
        mpt.model.predict_batch(mpt.params, tiny.arrays(mpt.batch), num_decodes=2)
    sampler = tiny.model(APART, decode_fn=decoding.temperature_sample)
    sample = functools.partial(
        sampler.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
    )
    tokens, found = jax.jit(sample)(mpt.params, mpt.batch, jax.random.PRNGKey(1))
    assert tokens.shape == (4, 3, tiny.TARGET)
    assert np.all(np.diff(found["scores"], axis=1) >= 0), "worst first, as in T5X"


@pytest.fixture(scope="module")
def undecided() -> Case:
    """A model with smaller embeddings, so that its predictions are less certain."""
    case = Case(tiny.model(APART))
    case.params["token_embedder"]["embedding"] *= 0.3
    return case


class Prefixes:
    """The language model interface of the slow beam search, by teacher-forced passes."""

    def __init__(self, case: Case):
        self.case = case

    def log_probabilities(self, example: int, prefix: tuple[int, ...]) -> np.ndarray:
        inputs = np.zeros_like(self.case.batch["decoder_input_tokens"])
        inputs[example, 1 : len(prefix) + 1] = prefix
        batch = {**self.case.batch, "decoder_input_tokens": inputs}
        logits = np.asarray(self.case.logits(self.case.params, batch), np.float64)
        logits = logits[example, len(prefix)]
        return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize(
    ("given", "bound", "width"),
    [
        pytest.param(None, None, 4, id="the function's default", marks=pytest.mark.slow),
        pytest.param(None, 2, 2, id="bound by gin"),
        pytest.param(3, 2, 3, id="asked for by the caller"),
    ],
)
def test_num_decodes_sets_beam_width(undecided, given, bound, width, request):
    request.addfinalizer(gin.clear_config)
    search = gin.external_configurable(
        decoding.beam_search, f"beam_of_{width}", module="test_models"
    )
    if bound is not None:
        gin.bind_parameter(f"test_models.beam_of_{width}.num_decodes", bound)
    model, arguments = tiny.model(APART, decode_fn=search), (undecided.params, undecided.batch)
    ask = functools.partial(model.predict_batch_with_aux, num_decodes=given)
    tokens, found = jax.jit(functools.partial(ask, return_all_decodes=True))(*arguments)
    assert tokens.shape == (4, width, tiny.TARGET)
    one = jax.jit(functools.partial(model.predict_batch, num_decodes=given))
    np.testing.assert_array_equal(one(*arguments), tokens[:, -1])
    for example in range(4):
        expected = slow_beam(Prefixes(undecided), example, width, tiny.TARGET, alpha=0.6)[::-1]
        assert [cut(row) for row in tokens[example]] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(found["scores"][example], [s for _, s in expected], atol=1e-4)
    greedy = np.asarray(undecided.predict(*arguments)[0])
    assert np.any(greedy != tokens[:, -1]), "beam search differs from greedy"


def test_feature_converter_missing_raises_with_binding(mpt):
    with pytest.raises(ValueError, match="feature_converter_cls"):
        mpt.model.FEATURE_CONVERTER_CLS  # noqa: B018


def test_distillation_without_prompt_raises(mpt):
    with pytest.raises(ValueError, match="the method 'none' has no prompt"):
        tiny.model(prompt=tiny.method("none"), objective=DISTILLED)


def test_t5x_loss_fn_microbatch_raises(mpt):
    model = tiny.model(APART, MPT(tiny.PROMPT))
    model.expected_rows = 8
    with pytest.raises(ValueError, match="4 rows of a batch of 8.*num_microbatches"):
        model.loss_fn(mpt.params, tiny.arrays(mpt.batch), None)


def test_bfloat16_loss_and_gradients_are_close_to_those_of_float32():
    """At T5's initial values: within 0.1% and 10% (docs/benchmarks-peft.md)."""
    batch, found = tiny.arrays(tiny.batch([0, 1, 2, 1])), {}
    values = flatten(tiny.model().get_initial_variables(jax.random.key(0))["params"])
    prompt = {name: leaf for name, leaf in values.items() if name.startswith("prompt/")}
    for dtype in ("float32", "bfloat16"):
        model = tiny.model(config=tiny.config(dtype=dtype))
        backbone = {k: leaf.astype(dtype) for k, leaf in values.items() if k not in prompt}
        step = jax.jit(functools.partial(gradients, model, dropout_rng=None))
        grads, counted = step(unflatten(prompt), unflatten(backbone), batch)
        sums = counted["term/cross_entropy"]
        found[dtype] = flatten(grads), float(sums.sum[0] / sums.weight[0])
    (expected, loss), (narrow, narrow_loss) = found["float32"], found["bfloat16"]
    assert 0 < abs(narrow_loss - loss) < 1e-3 * loss
    for name, leaf in expected.items():
        gap = np.linalg.norm(narrow[name] - leaf)
        assert 0 < gap < 0.1 * np.linalg.norm(leaf), name

"""Tests of the losses over the vocabulary, in chunks of positions: values, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, merge, split
from mpt_jax.models import encoder_decoder, token_losses
from mpt_jax.models.losses import Distillation, Objective
from tests.fixtures import tiny

B, H, V = 3, 16, 40
KL = Objective(distillation=Distillation(hidden=False))
ALL = Objective(0.1, 1e-2, Distillation(temperature=2.5, t2_scale=True, hidden=False))


def drawn(length: int) -> dict[str, np.ndarray]:
    """States, head and targets, float32, with some targets that are predicted."""
    rng = np.random.default_rng(length)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    found = {"states": draw(B, length, H), "teacher": draw(B, length, H), "kernel": draw(H, V)}
    found |= {"bias": draw(V), "weights": draw(3, B, length)}
    found["targets"] = rng.integers(0, V, (B, length)).astype(np.int32)
    right = (found["states"] @ found["kernel"] + found["bias"]).argmax(-1)
    found["targets"][:, ::3] = right[:, ::3]
    return found


def found_values(objective: Objective, cached: bool, given):
    """The values of the library, and the gradients of the sum of its terms, weighted at random."""
    names = ("cross_entropy", "z_loss", "kl")

    def total(states, kernel, bias):
        head = lambda x: x @ kernel + bias[None, None]  # noqa: E731
        batch = {"decoder_target_tokens": given["targets"]}
        if cached:
            batch["teacher_logits"] = head(given["teacher"])
        teacher = None if cached else given["teacher"]
        values = token_losses.token_values(objective, batch, head, states, teacher)
        terms = [w * values[n] for n, w in zip(names, given["weights"], strict=True) if n in values]
        return sum(terms).sum(), values  # type: ignore

    arguments = [jnp.asarray(given[name]) for name in ("states", "kernel", "bias")]
    given = {name: jnp.asarray(value) for name, value in given.items()}
    differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, values), grads = differentiate(*arguments)
    return values, dict(zip(("states", "kernel", "bias"), grads, strict=True))


def expected_values(objective: Objective, given):
    """The same from whole logits in float64, with gradients written out by hand."""
    wide = {name: np.asarray(x, np.float64) for name, x in given.items() if name != "targets"}
    logits = wide["states"] @ wide["kernel"] + wide["bias"]
    exact = np.eye(V)[given["targets"]]
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p, smoothing = logits - log_z, objective.label_smoothing
    goal = exact * (1 - smoothing) + (1 - exact) * smoothing / (V - 1)
    entropy = -(goal * np.log(np.where(goal > 0, goal, 1))).sum(-1)
    values = {
        "cross_entropy": -(goal * log_p).sum(-1) - entropy,
        "z_loss": log_z[..., 0] ** 2,
        "loss": -(exact * log_p).sum(-1),
        "token_accuracy": (logits.argmax(-1) == given["targets"]).astype(np.float64),
    }
    first, second, third = wide["weights"][..., None]
    slope = first * (np.exp(log_p) - goal) + second * 2 * log_z * np.exp(log_p)
    if objective.distillation is not None:
        hot = objective.distillation.temperature
        taught = (wide["teacher"] @ wide["kernel"] + wide["bias"]) / hot
        log_taught = taught - np.log(np.exp(taught).sum(-1, keepdims=True))
        log_q = logits / hot - np.log(np.exp(logits / hot).sum(-1, keepdims=True))
        values["kl"] = (np.exp(log_taught) * (log_taught - log_q)).sum(-1)
        slope = slope + third * (np.exp(log_q) - np.exp(log_taught)) / hot
    return values, {
        "states": slope @ wide["kernel"].T,
        "kernel": np.einsum("blh,blv->hv", wide["states"], slope),
        "bias": slope.sum((0, 1)),
    }


def check(found, expected, smallest: float = 0.0) -> None:
    """Asserts equality to 1e-6 of the largest value of each array, or of `smallest`."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        scale = max(smallest, np.abs(value).max())
        assert scale > 0, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * scale, err_msg=name)


# --- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 16, 17, 128])
@pytest.mark.parametrize(
    ("objective", "cached"),
    [
        pytest.param(Objective(label_smoothing=0.1, z_loss=1e-2), False, id="smoothed"),
        pytest.param(KL, False, id="kl"),
        pytest.param(ALL, True, id="all, cached teachers"),
    ],
)
def test_token_values_in_chunks_match_whole_logits(objective, cached, length):
    given = drawn(length)
    found, expected = found_values(objective, cached, given), expected_values(objective, given)
    assert 0 < expected[0]["token_accuracy"].mean() < 1
    for ours, theirs in zip(found, expected, strict=True):
        check(ours, theirs)


@pytest.mark.parametrize("length", [1, 16, 17, 100, 128])
def test_token_values_at_most_16_positions_at_a_time_and_short_targets_not_recomputed(length):
    given, seen = {name: jnp.asarray(x) for name, x in drawn(length).items()}, []

    def head(states):
        seen.append(states.shape[1])
        return states @ given["kernel"]

    batch = {"decoder_target_tokens": given["targets"]}
    total = lambda x: token_losses.token_values(KL, batch, head, x, x)["kl"].sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(total))(given["states"]))
    assert max(seen) <= 16 and max(seen) > 16 / 2 or length == 1
    assert ("scan" in program) == ("checkpoint" in program or "remat" in program) == (length > 16)


def test_token_losses_perfect_prediction_is_zero():
    targets = jnp.array([[3, 0]])
    sure = 60.0 * jax.nn.one_hot(targets, 5)
    found = token_losses.values_of_logits(sure, targets)["cross_entropy"]
    np.testing.assert_allclose(found, 0, atol=1e-5)
    share = jnp.log(jnp.where(jax.nn.one_hot(targets, 5) > 0, 0.9, 0.1 / 4))
    found = token_losses.values_of_logits(share, targets, 0.1)["cross_entropy"]
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_kl_divergence_zero_for_equal_logits_and_from_teacher():
    student, teacher = jnp.array([[[0.0, 0.0]]]), jnp.array([[[2.0, 0.0]]])
    assert token_losses.kl_divergence(teacher, teacher, 1.0).item() == 0
    p = 1 / (1 + np.exp(-2.0))
    forward = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    found = token_losses.kl_divergence(teacher, student, 1.0)
    np.testing.assert_allclose(found, forward, rtol=1e-5)


def test_token_losses_bfloat16_logits_computed_in_float32():
    given = drawn(tiny.TARGET)
    low = jnp.asarray(given["states"] @ given["kernel"], jnp.bfloat16)
    targets = jnp.asarray(given["targets"])
    found = token_losses.values_of_logits(low, targets)
    expected = token_losses.values_of_logits(low.astype(jnp.float32), targets)
    for name, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, expected[name])


# --- Models --------------------------------------------------------------------------------------

APART = Runs(tiny.RUNS.task_names, groups="independent")
TRAINED = Objective(0.1, 1e-2, Distillation(temperature=2.0))
# Of logits and gradients: a small KL, or a gradient of zero, has the rounding of larger numbers.
SCALE = 10.0
TIED, UNTIED = {"logits_via_embedding": True}, {"logits_via_embedding": False}


def reference_terms(model, params, batch):
    """Sums of terms and metrics by group, from whole logits of the model, by one-hot vectors."""
    targets, objective = batch["decoder_target_tokens"], model.objective
    logits = model.logits(params, batch)
    frozen = jax.tree.map(jax.lax.stop_gradient, params)
    taught = model.head(frozen)(model.forward(frozen, batch, teacher=True).states)
    values = token_losses.values_of_logits(logits, targets, objective.label_smoothing)
    temperature = objective.distillation.temperature
    values["kl"] = token_losses.kl_divergence(taught, logits, temperature)
    groups = jax.nn.one_hot(model.groups(batch).decoder, model.runs.num_groups)
    groups = groups * batch["decoder_loss_weights"][..., None]
    return {name: jnp.einsum("bl,blg->g", x, groups) for name, x in values.items()}


def trained(labels, config: T5Config, batch, runs: Runs):
    """Terms, metrics and gradients of a model in chunks, and from whole logits."""
    model = tiny.model(runs, config=config, objective=TRAINED, labels=labels)
    params = tiny.params(model)
    trainable, frozen = split(params, model.labels, {"shared", "task", "backbone"})
    batch = tiny.arrays(batch)

    def chunks(trainable):
        sums, found = model.loss_sums(merge(trainable, frozen), batch)
        rows = {name: found[name].sum for name in ("loss", "token_accuracy")}
        terms = {name: sums[name] for name in ("cross_entropy", "z_loss", "kl")}
        return sum(x.sum() for x in terms.values()), terms | rows  # type: ignore

    def whole(trainable):
        found = reference_terms(model, merge(trainable, frozen), batch)
        return sum(found[name].sum() for name in ("cross_entropy", "z_loss", "kl")), found

    for function in (chunks, whole):
        (_, found), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(trainable)
        yield found, flatten(grads)


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        pytest.param(encoder_decoder.BITFIT, UNTIED | {"biases": True}, id="bitfit"),
        pytest.param(encoder_decoder.FULL_FINETUNING, TIED, id="full, tied"),
        pytest.param(encoder_decoder.FULL_FINETUNING, UNTIED, id="full, untied"),
    ],
)
def test_loss_sums_in_chunks_same_gradients_of_trainable_head(labels, head):
    batch = tiny.batch([2, 0, None, 1], targets=40)
    (found, grads), (expected, expected_grads) = trained(labels, tiny.config(**head), batch, APART)
    check(found, expected, SCALE)
    check(grads, expected_grads, SCALE)
    biased, tied = head.get("biases"), head["logits_via_embedding"]
    part = "logits_bias" if biased else "token_embedder" if tied else "logits_dense"
    assert any(part in name for name in grads)


def test_loss_sums_in_chunks_packed_batch_same_sums_and_gradients():
    batch = tiny.pack(tiny.batch([2, 0, 1, 0], targets=20), [[1, 3], [0, 2]])
    assert batch["decoder_target_tokens"].shape[1] % 16
    runs = Runs(tiny.RUNS.task_names, groups="independent")
    (found, grads), expected = trained((), tiny.config(), batch, runs)
    check(found, expected[0], SCALE)
    check(grads, expected[1], SCALE)


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [None, "states", "cached"])
def test_token_values_temporaries_at_most_a_quarter_of_whole_logits(teacher, optimized):
    """Value and gradient for targets of 128 with the vocabulary of T5."""
    length, width, vocabulary = 128, 16, 32128
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct((2, length, *shape), dtype)  # noqa: E731
    kernel = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    objective = Objective() if teacher is None else KL
    batch = {"decoder_target_tokens": shaped(jnp.int32)}
    if teacher == "cached":
        batch["teacher_logits"] = shaped(jnp.bfloat16, vocabulary)

    def chunks(states, taught, batch, kernel):
        head = lambda x: x @ kernel  # noqa: E731
        values = token_losses.token_values(objective, batch, head, states, taught)
        return values["cross_entropy"].sum() + (values["kl"].sum() if teacher else 0.0)

    def whole(states, taught, batch, kernel):
        logits = states @ kernel
        found = token_losses.values_of_logits(logits, batch["decoder_target_tokens"])
        total = found["cross_entropy"].sum()
        if teacher:
            other = batch["teacher_logits"] if teacher == "cached" else taught @ kernel
            total += token_losses.kl_divergence(other, logits, 1.0).sum()
        return total

    def temporaries(function) -> int:
        states = shaped(jnp.float32, width)
        program = jax.jit(jax.value_and_grad(function)).lower(states, states, batch, kernel)
        return program.compile().memory_analysis().temp_size_in_bytes

    ours, theirs = temporaries(chunks), temporaries(whole)
    assert theirs >= 2 * length * vocabulary * 4, "whole logits are a temporary"
    assert ours <= theirs / 4, (ours, theirs)

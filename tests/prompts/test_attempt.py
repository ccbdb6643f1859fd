"""Tests of ATTEMPT: composition, trainable parameters, transfer, and pooling of the text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5.config import t5_config
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, label_tree, merge, split
from mpt_jax.models import losses
from mpt_jax.prompts import materialize
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.base import PromptContext
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training import train_step
from mpt_jax.training.state import num_params, param_shapes, trainable_labels
from tests.fixtures import reference_mixing as by_hand
from tests.fixtures import tiny
from tests.fixtures.prompt_methods import (
    BANKS,
    BY_GROUP,
    CONTEXT,
    KEY,
    WIDTH,
    H,
    K,
    P,
    compose,
    mixture,
    random_params,
    texts,
)

SOURCES = ("mnli", "sst2", "qnli")
ROUTER = {
    "sub": {"down", "up", "norm_scale", "norm_bias"},
    "token": {"down", "up", "norm_scale", "norm_bias"},
    "linear": {"linear", "norm_scale", "norm_bias"},
    "dot": set(),
    "constant": set(),
}
VARIANTS = pytest.mark.parametrize("attention", ROUTER)


def make(attention: str = "sub", **overrides) -> ATTEMPT:
    """A method whose temperature is low enough for weights to differ."""
    settings = {"width": WIDTH, "temperature": 3.0, **overrides}
    return ATTEMPT(P, SOURCES, attention, **settings)


# --- The formula ---------------------------------------------------------------------------------


@BY_GROUP
@VARIANTS
def test_attempt_init_every_variant_shapes_and_labels(attention, bank):
    method, runs = make(attention), BANKS[bank]
    made = method.init(KEY, runs, CONTEXT)
    groups = runs.num_groups
    sizes = {
        "down": (groups, H, WIDTH),
        "up": (groups, WIDTH, H),
        "linear": (groups, H, H),
        "norm_scale": (groups, H),
        "norm_bias": (groups, H),
    }
    expected = {"sources": (len(SOURCES), P, H), "target": (K, P, H)}
    expected |= {name: sizes[name] for name in ROUTER[attention]}
    assert {name: leaf.shape for name, leaf in made.items()} == expected
    labels = label_tree(made, method.labels)
    assert labels.pop("sources") == "frozen" and labels.pop("target") == "task"
    assert set(labels.values()) <= {"router"}
    if "norm_scale" in made:
        assert (made["norm_scale"] == 1).all() and (made["norm_bias"] == 0).all()


@BY_GROUP
@pytest.mark.parametrize("attend_target", [True, False])
@VARIANTS
def test_attempt_prompts_and_weights_match_definition(attention, attend_target, bank):
    method, runs = make(attention, attend_target=attend_target), BANKS[bank]
    params = random_params(method, runs)
    ids = np.array([[3, 0, 0], [4, 1, 2]])
    x = texts(ids)
    found, weights = (use(method, params, runs, ids, x) for use in (compose, mixture))
    assert method.candidates == (*SOURCES, *(["target"] if attend_target else []))
    assert found.shape == (2, 3, P, H) and weights.shape == (2, 3, len(method.candidates))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    for at in np.ndindex(ids.shape):
        group = runs.group_of_row[ids[at]]
        by_row, expected = by_hand.attempt(method, params, group, ids[at], x[at].astype(np.float64))
        np.testing.assert_allclose(found[at], expected, 1e-5, 1e-5)
        # With weights per prompt row, `mixture` returns their mean.
        np.testing.assert_allclose(weights[at], by_row.mean(0), 1e-5, 1e-5)
    different = np.abs(weights[0, 1] - weights[0, 2]).max()
    assert (different == 0) if attention == "constant" else (different > 1e-3), (
        "one bank row, two texts"
    )


@VARIANTS
def test_reads_text_flag_matches_behavior(attention):
    method, runs = make(attention), BANKS["joint"]
    params, ids = random_params(method, runs), np.array([1, 1])
    prompts = compose(method, params, runs, ids, texts(ids))
    assert method.reads_text == bool(np.any(prompts[0] != prompts[1]))
    assert not method.is_random and method.schedule_steps == 0
    assert method.prompt_lengths(runs) == (P,) * K


def test_materialize_text_dependent_prompts_raises():
    method, runs = make(), BANKS["joint"]
    with pytest.raises(ValueError, match="attempt"):
        materialize.materialize(method, random_params(method, runs), runs)


@pytest.mark.parametrize("attention", ["sub", "linear", "token"])
def test_attention_temperature_divides_scores(attention):
    runs, ids = BANKS["joint"], np.arange(K)
    cold, hot = make(attention, temperature=0.05), make(attention, temperature=1e6)
    params = random_params(cold, runs)
    even = mixture(hot, params, runs, ids, texts(ids))
    np.testing.assert_allclose(even, 1 / (len(SOURCES) + 1), atol=1e-4)
    if attention == "token":
        return  # `mixture` averages its weights over prompt rows, which choose separately
    sharp = mixture(cold, params, runs, ids, texts(ids))
    assert sharp.max(-1).min() > 0.6
    warm = mixture(make(attention, temperature=1.5), params, runs, ids, texts(ids))
    warmer = mixture(make(attention, temperature=3.0), params, runs, ids, texts(ids))
    ratio = lambda w: np.log(w[:, 0] / w[:, 1])  # noqa: E731 - a logit's difference
    np.testing.assert_allclose(ratio(warm), 2 * ratio(warmer), 1e-4, 1e-4)


@pytest.mark.parametrize("attention", ["sub", "linear"])
def test_attention_layer_norm_small_input_uses_torch_epsilon(attention):
    """If features hardly vary, as at the start, the epsilon 1e-5 dominates the normalization."""
    method, runs, ids = make(attention), BANKS["joint"], np.arange(K)
    params = random_params(method, runs)
    last = "up" if attention == "sub" else "linear"
    params[last] *= np.float32(1e-3)
    x = texts(ids)
    weights = mixture(method, params, runs, ids, x)
    for row in range(K):
        expected, _ = by_hand.attempt(method, params, 0, row, x[row].astype(np.float64))
        np.testing.assert_allclose(weights[row], expected[0], 1e-5, 1e-5)


def test_attention_dot_ignores_temperature():
    runs, ids = BANKS["joint"], np.arange(K)
    params = random_params(make("dot"), runs)
    found = [mixture(make("dot", temperature=t), params, runs, ids, texts(ids)) for t in (1.0, 9.0)]
    np.testing.assert_array_equal(*found)


def test_attempt_defaults_match_released_code():
    method = ATTEMPT(100, SOURCES)
    assert (method.attention, method.width, method.temperature) == ("sub", 100, 2000.0)
    assert method.attend_target and method.start_from == "first"


@pytest.mark.parametrize(
    ("attention", "attend_target"),
    [
        *((attention, True) for attention in ROUTER),
        *(
            pytest.param(attention, False, marks=[] if attention == "sub" else pytest.mark.slow)
            for attention in ROUTER
        ),
    ],
)
def test_attempt_gradients_match_finite_differences(attention, attend_target):
    """Central differences in float64 of the formula written by hand."""
    method, runs = make(attention, attend_target=attend_target), BANKS["groups"]
    params, ids = random_params(method, runs), np.array([3, 0, 2, 4])
    x = texts(ids)
    along = np.random.default_rng(2).normal(size=(len(ids), P, H)).astype(np.float32)

    def ours(params):
        return (
            method.compose(params, runs, jnp.asarray(ids), PromptContext(jnp.asarray(x))) * along
        ).sum()

    def theirs(params) -> float:
        prompts = [
            by_hand.attempt(method, params, runs.group_of_row[i], i, text.astype(np.float64))[1]
            for i, text in zip(ids, x, strict=True)
        ]
        return float((np.stack(prompts) * along).sum())

    grads = jax.grad(ours)(jax.tree.map(jnp.asarray, params))
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    rng = np.random.default_rng(3)
    for name in ({"target"} | ROUTER[attention]) & set(params):
        size = params[name].size
        for entry in rng.choice(size, min(size, 6), replace=False):
            sides = []
            for step in (1e-5, -1e-5):
                moved = {**wide, name: wide[name].copy()}
                moved[name].flat[entry] += step
                sides.append(theirs(moved))
            slope = (sides[0] - sides[1]) / 2e-5
            np.testing.assert_allclose(np.asarray(grads[name]).flat[entry], slope, 2e-4, 2e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "additive"}, "'additive'"),
        ({"temperature": 0.0}, "0.0"),
        ({"width": 0}, "0"),
        ({"sources": ()}, "source"),
        ({"sources": ("mnli", "sst2", "mnli")}, "mnli"),
    ],
)
def test_attempt_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        ATTEMPT(**{"prompt_length": P, "sources": SOURCES, **settings})


def test_attempt_init_targets_differ_by_run():
    method = ATTEMPT(P, SOURCES, init_prompt=Uniform(0.5))
    made = method.init(KEY, BANKS["joint"], CONTEXT)["target"]
    assert len({row.tobytes() for row in np.asarray(made)}) == K and np.abs(made).max() <= 0.5


@VARIANTS
def test_attempt_init_alone_and_in_fleet_same_values(attention):
    method, fleet = make(attention), BANKS["independent"]
    together = method.init(KEY, fleet, CONTEXT)
    for row in (0, 3):
        alone = method.init(KEY, Runs([f"task{row}"]), CONTEXT)
        np.testing.assert_array_equal(alone.pop("sources"), together["sources"])
        for name, leaf in alone.items():
            np.testing.assert_array_equal(leaf[0], together[name][row], err_msg=name)


# --- Parameter counts ----------------------------------------------------------------------------

SIX = ("mnli", "sst2", "qnli", "qqp", "squad", "record")
GLUE = ["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"]


def numbers(tasks: list[str], **overrides) -> tuple[int, int]:
    """Returns the trainable and the frozen parameter counts of the prompts of a T5-base."""
    config = t5_config("t5_1_0_base", num_encoder_layers=1, num_decoder_layers=1)
    model = tiny.model(Runs(tasks), ATTEMPT(100, SIX), config, **overrides)
    tree, _ = param_shapes(model)
    learns, stays = split(tree, model.labels, trainable_labels(model, tree))
    assert set(learns) == {"prompt"}
    return num_params(learns), num_params(stays["prompt"])


def test_attempt_one_task_trains_231936_parameters():
    prompt, net, norm = 100 * 768, 2 * 768 * 100, 2 * 768
    assert numbers(["rte"]) == (prompt + net + norm, 6 * prompt) == (231_936, 460_800)


def test_attempt_eight_joint_tasks_train_96192_parameters_each():
    found, frozen = numbers(GLUE)
    assert (found, found / 8, frozen) == (769_536, 96_192, 460_800)


def test_attempt_frozen_layer_norm_trains_230400_parameters():
    frozen = ((r"prompt/norm_(scale|bias)", "frozen"),)
    assert numbers(["rte"], labels=frozen)[0] == 230_400


# --- Transfer ------------------------------------------------------------------------------------

ARTIFACT = Runs(["qqp", "mnli", "rte", "sst2", "qnli"])


def start(method, source, source_method, source_runs, runs):
    """Returns the initial parameters, and the parameters after a transfer."""
    initial = method.init(KEY, runs, CONTEXT)
    return initial, method.transfer(source, source_method, source_runs, runs, lambda: initial)


@BY_GROUP
def test_attempt_transfer_sources_by_name_targets_from_first(bank):
    table = np.random.default_rng(4).normal(size=(5, P, H)).astype(np.float32)
    method = make()
    initial, started = start(method, {"table": table}, PromptTuning(P), ARTIFACT, BANKS[bank])
    np.testing.assert_array_equal(started["sources"], table[[1, 3, 4]])
    for row in range(K):
        np.testing.assert_array_equal(started["target"][row], table[1])
    assert set(started) == set(initial)
    for name in ROUTER["sub"]:
        np.testing.assert_array_equal(
            started[name], initial[name], "the artifact has no attention parameters"
        )


def test_attempt_transfer_named_start_from_sets_targets():
    table = np.random.default_rng(4).normal(size=(5, P, H)).astype(np.float32)
    method = make(start_from="rte")
    _, started = start(method, {"table": table}, PromptTuning(P), ARTIFACT, BANKS["independent"])
    np.testing.assert_array_equal(started["target"], np.stack([table[2]] * K))


def test_attempt_transfer_unknown_source_raises_with_known_names():
    method = ATTEMPT(P, ("mnli", "qnlo"))
    with pytest.raises(ValueError, match="'qnlo'.*'qnli'.*mnli, qnli, qqp, rte, sst2"):
        start(method, {"table": np.zeros((5, P, H))}, PromptTuning(P), ARTIFACT, BANKS["joint"])


def test_attempt_transfer_own_artifact_keeps_rows_by_name():
    before, after = BANKS["independent"], Runs(["task3", "task0"], groups="independent")
    method = make(start_from="same")
    trained = random_params(method, before)
    _, started = start(method, trained, make(), before, after)
    ids, x = np.array([1, 0, 1]), texts(np.zeros(3))
    np.testing.assert_array_equal(
        compose(method, started, after, ids, x),
        compose(method, trained, before, np.array([0, 3, 0]), x),
    )


def test_attempt_transfer_own_artifact_keeps_groups():
    before, after = BANKS["groups"], Runs(["task4", "task2", "task1"], groups=(1, 0, 1))
    method = make(start_from="same")
    trained = random_params(method, before)
    _, started = start(method, trained, make(), before, after)
    x = texts(np.zeros(3))
    np.testing.assert_array_equal(
        compose(method, started, after, np.array([0, 1, 2]), x),
        compose(method, trained, before, np.array([4, 2, 1]), x),
    )


# --- Through the model ---------------------------------------------------------------------------


class Mixed:
    """A model of some bank with random parameters and texts of several tasks."""

    def __init__(self, attention: str = "sub", groups="joint", rows=(2, 0, 1, 0), **overrides):
        settings = {"width": WIDTH, "temperature": 3.0, **overrides}
        self.method = ATTEMPT(tiny.PROMPT, SOURCES, attention, **settings)
        self.runs = Runs(tiny.RUNS.task_names, groups=groups)
        self.model = tiny.model(self.runs, self.method)
        self.params = tiny.params(self.model)
        self.batch = tiny.batch(list(rows))
        self.trainable, self.frozen = split(
            self.params, self.model.labels, trainable_labels(self.model, self.params)
        )
        self.forward = jax.jit(self.model.forward)
        self.logits = jax.jit(self.model.logits)
        self.losses = jax.jit(jax.value_and_grad(self._total, has_aux=True))

    def _total(self, trainable, frozen, batch):
        sums, found = self.model.loss_sums(merge(trainable, frozen), batch)
        weights = self.model.loss_normalizers(batch)
        return losses.total_loss(self.model.objective, sums, weights)[0], (sums, found)

    def loss(self, batch):
        """Returns the loss, the gradients of trainable parameters, and metrics."""
        (total, (_, found)), grads = self.losses(self.trainable, self.frozen, batch)
        return total, grads, found

    def pooled(self, example: int) -> np.ndarray:
        """Returns an example's pooled text [H], from the tokens and the embedding."""
        embedding = np.asarray(self.params["token_embedder"]["embedding"])
        return by_hand.pooled(embedding, self.batch["encoder_input_tokens"][example])

    def expected(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weights and the prompt of an example, from the reference formula."""
        row = int(self.batch["encoder_task_ids"][example, 0])
        params = {name: np.asarray(leaf) for name, leaf in self.params["prompt"].items()}
        group = self.runs.group_of_row[row]
        return by_hand.attempt(self.method, params, group, row, self.pooled(example))


@pytest.fixture(scope="module", params=list(ROUTER))
def mixed(request) -> Mixed:
    return Mixed(request.param, groups=[1, 0, 1])


@pytest.fixture(scope="module", params=list(ROUTER))
def apart(request) -> Mixed:
    return Mixed(request.param, groups="independent")


def some(*fast: str):
    """Parametrizes the fixture `mixed` with all variants; those not in `fast` are slow."""
    marks = {name: [] if name in fast else [pytest.mark.slow] for name in ROUTER}
    variants = [pytest.param(name, marks=marks[name]) for name in ROUTER]
    return pytest.mark.parametrize("mixed", variants, indirect=True)


def test_attempt_prompts_pool_only_text_tokens(mixed):
    """Recomputes every prompt of a batch from token ids and the embedding."""
    lengths = (mixed.batch["encoder_input_tokens"] > 0).sum(1)
    assert len(set(lengths)) > 1 and lengths.min() < tiny.TEXT, "some texts are padded"
    found = np.asarray(mixed.forward(mixed.params, mixed.batch).prompts)
    for example in range(4):
        np.testing.assert_allclose(found[example], mixed.expected(example)[1], 1e-5, 1e-5)


def test_attempt_padding_embedding_not_read():
    """Its embedding is overwritten at prompt slots and masked after the text.

    A maximum over padding would change the prompts.
    """
    mixed = Mixed()
    before = mixed.forward(mixed.params, mixed.batch).prompts
    embedding = mixed.params["token_embedder"]["embedding"].at[0].set(50.0)
    loud = {**mixed.params, "token_embedder": {"embedding": embedding}}
    np.testing.assert_array_equal(mixed.forward(loud, mixed.batch).prompts, before)
    loud["token_embedder"] = {"embedding": embedding.at[2:].add(1.0)}
    assert np.abs(mixed.forward(loud, mixed.batch).prompts - before).max() > 1e-3, "tokens are read"


@some("sub")
def test_attempt_more_padding_same_loss_and_logits(mixed):
    wider = {
        name: np.pad(value, ((0, 0), (0, 4 if name.startswith("encoder") else 0)))
        for name, value in mixed.batch.items()
    }
    tiny.close(mixed.loss(wider)[:2], mixed.loss(mixed.batch)[:2], 1e-5)
    np.testing.assert_allclose(
        mixed.logits(mixed.params, wider),
        mixed.logits(mixed.params, mixed.batch),
        1e-5,
        1e-5,
    )


@some("token")
def test_attempt_padding_rows_same_loss_and_gradients(mixed):
    padded = tiny.batch([2, None, 1, 0])
    (total, grads, _), (expected, expected_grads, _) = (
        mixed.loss(batch) for batch in (padded, tiny.pick(padded, [0, 2, 3]))
    )
    tiny.close((total, grads), (expected, expected_grads), 1e-6)


def test_attempt_pooled_text_independent_of_prompts():
    """Targets are no candidates here, so the mixed part does not depend on them."""
    mixed = Mixed(attend_target=False)
    first = mixed.batch["encoder_task_ids"][:, 0]
    target = mixed.params["prompt"]["target"]
    added = mixed.forward(mixed.params, mixed.batch).prompts - target[first]
    moved = {**mixed.params, "prompt": {**mixed.params["prompt"], "target": 3 - 2 * target}}
    again = mixed.forward(moved, mixed.batch).prompts - moved["prompt"]["target"][first]
    np.testing.assert_allclose(again, added, 1e-5, 1e-5)


def test_attempt_gradients_only_for_target_and_attention(mixed):
    _, grads, _ = mixed.loss(mixed.batch)
    found = flatten(grads)
    assert set(found) == {f"prompt/{name}" for name in {"target"} | ROUTER[mixed.method.attention]}
    for name, grad in found.items():
        assert np.abs(grad).max() > 0, f"{name} is trainable but has no gradient"
    assert "sources" in mixed.frozen["prompt"]


@some("sub", "token")
def test_attempt_packed_equals_unpacked(mixed):
    packed = tiny.pack(mixed.batch, [[1, 3], [0, 2]])
    total, grads, found = mixed.loss(packed)
    expected, expected_grads, expected_found = mixed.loss(mixed.batch)
    tiny.close((total, grads), (expected, expected_grads), 1e-5)
    for name in expected_found:
        if name.startswith("attention"):
            tiny.close(values(found, name), values(expected_found, name), 1e-5)


FAST = {("sub", 0)}  # the composed prompts are checked against the formula above


def values(found, name) -> dict[str, np.ndarray]:
    metric = found[name]
    return {"sum": np.asarray(metric.sum), "weight": np.asarray(metric.weight)}


def test_attempt_metrics_weights_and_entropy_by_run(mixed):
    _, _, found = mixed.loss(mixed.batch)
    rows = mixed.batch["encoder_task_ids"][:, 0]
    weights = np.stack([mixed.expected(example)[0].mean(0) for example in range(4)])
    entropies = -(weights * np.log(weights)).sum(1)
    for row in range(3):
        told = {
            name: m.sum[row] / m.weight[row] for name, m in found.items() if "attention" in name
        }
        assert len(told) == len(mixed.method.candidates) + 1
        for j, candidate in enumerate(mixed.method.candidates):
            expected = weights[rows == row, j].mean()
            np.testing.assert_allclose(told[f"attention/{candidate}"], expected, 1e-5)
        np.testing.assert_allclose(told["attention_entropy"], entropies[rows == row].mean(), 1e-5)


@pytest.mark.parametrize(
    ("apart", "row"),
    [
        pytest.param(name, row, marks=[] if (name, row) in FAST else pytest.mark.slow)
        for name in ROUTER
        for row in (0, 2)
    ],
    indirect=["apart"],
)
def test_attempt_fleet_matches_each_run_alone(apart, row):
    _, grads, _ = apart.loss(apart.batch)
    prompts = np.asarray(apart.forward(apart.params, apart.batch).prompts)
    alone = tiny.model(Runs([tiny.RUNS.task_names[row]]), apart.method)
    prompt = {
        leaf: value if leaf == "sources" else value[row : row + 1]
        for leaf, value in apart.params["prompt"].items()
    }
    params = {**apart.params, "prompt": prompt}
    mine = np.flatnonzero(apart.batch["encoder_task_ids"][:, 0] == row)
    batch = tiny.pick(apart.batch, mine)
    for side in ("encoder", "decoder"):
        batch[f"{side}_task_ids"] = np.zeros_like(batch[f"{side}_task_ids"])
    found = jax.jit(alone.forward)(params, batch).prompts
    np.testing.assert_allclose(found, prompts[mine], 1e-6, 1e-6)
    learns, stays = split(params, alone.labels, trainable_labels(alone, params))
    solo = jax.jit(lambda p, f, b: train_step.gradients(alone, p, f, b, None)[0])(
        learns, stays, batch
    )
    expected = {leaf: grad[row : row + 1] for leaf, grad in grads["prompt"].items()}
    tiny.close(expected, solo["prompt"], 1e-6)


@some("token", "linear", "constant")
def test_attempt_artifact_same_logits(mixed, tmp_path):
    method, params = mixed.method.for_inference(mixed.params["prompt"])
    read = tiny.read_back(tmp_path / "artifact", method, params, mixed.runs)
    assert read.method.candidates == mixed.method.candidates
    again = tiny.model(read.runs, read.method)
    found = jax.jit(again.logits)({**mixed.params, "prompt": read.params}, mixed.batch)
    np.testing.assert_array_equal(found, mixed.logits(mixed.params, mixed.batch))

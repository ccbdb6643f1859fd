"""Tests of the objective against a float64 reference, and of its gradient by differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import merge, split
from mpt_jax.models import losses, token_losses
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts.mpt import MPT
from tests.fixtures import tiny

H, V = tiny.WIDTH, tiny.VOCABULARY
RUNS = Runs(["alpha", "beta", "gamma"], groups=[0, 1, 0])
ONE = Runs(["alpha", "beta", "gamma"])
BATCH = tiny.batch([0, 1, None, 2, 1, 0], seed=1)
HEAD = np.random.default_rng(7).normal(size=(H, V)) * 3 / H**0.5


def outputs(seed: int, layers: tuple[int, int] = (1, 1)) -> losses.ModelOutputs:
    """Random model outputs, with hidden states also at masked positions."""
    rng = np.random.default_rng(seed)
    size, text = BATCH["encoder_input_tokens"].shape
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    length = BATCH["decoder_input_tokens"].shape[1]
    return losses.ModelOutputs(
        draw(size, length, H),
        tuple(draw(size, text, H) for _ in range(layers[0])),
        tuple(draw(size, length, H) for _ in range(layers[1])),
        draw(size, tiny.PROMPT, H),
    )


def head(states):
    return states @ jnp.asarray(HEAD, jnp.float32)


def logits_at(outputs: losses.ModelOutputs, row: int, position: int) -> np.ndarray:
    return np.asarray(outputs.states[row, position], np.float64) @ HEAD


def sums_of(objective: Objective, batch, groups: losses.GroupIds, student, teacher):
    tokens = token_losses.token_values(objective, batch, head, student.states, teacher.states)
    return losses.term_sums(objective, batch, groups, tokens, student, teacher)


def log_softmax(logits) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()


class Oracle:
    """Every term's sum and normalizer by group, computed position by position."""

    def __init__(self, objective: Objective, runs: Runs, student, teacher=None, batch=BATCH):
        self.objective, self.distil = objective, objective.distillation
        self.student, self.teacher, self.batch, self.runs = student, teacher, batch, runs
        self.factors = self.factors_of_terms()
        self.sums = {name: np.zeros(runs.num_groups) for name in self.factors}
        self.weights = {name: np.zeros(runs.num_groups) for name in self.factors}
        for i, slots in enumerate(batch["encoder_prompt_slots"]):
            if not slots.any():
                continue
            group = runs.group_of_row[batch["encoder_task_ids"][i, 0]]
            self.tokens(i, group)
            if self.distil is not None:
                if self.distil.hidden:
                    self.hidden(i, group)
                if self.distil.prompt_distance:
                    weight = 1 if self.distil.reduce == "sum" else tiny.PROMPT * H
                    self.add("prompt_distance", group, self.prompts(i), weight)

    def factors_of_terms(self) -> dict[str, float]:
        factors = {"cross_entropy": 1.0, "z_loss": self.objective.z_loss}
        if (distil := self.distil) is not None:
            squared = distil.temperature**2 if distil.t2_scale else 1.0
            factors["kl"] = distil.logits * distil.weight * squared
            for side in ("encoder", "decoder"):
                part = getattr(distil, f"{side}_weight")
                factors[f"hidden_{side}"] = distil.hidden * distil.weight * part
            factors["prompt_distance"] = distil.prompt_distance * distil.weight
        return {name: factor for name, factor in factors.items() if factor}

    def add(self, term: str, group: int, value: float, weight: float) -> None:
        self.sums[term][group] += value
        self.weights[term][group] += weight

    def tokens(self, i: int, group: int) -> None:
        for position in np.flatnonzero(self.batch["decoder_loss_weights"][i]):
            target = self.batch["decoder_target_tokens"][i, position]
            logits = logits_at(self.student, i, position)
            smooth = np.full(V, self.objective.label_smoothing / (V - 1))
            smooth[target] = 1 - self.objective.label_smoothing
            entropy = -np.sum(smooth[smooth > 0] * np.log(smooth[smooth > 0]))
            cross_entropy = -np.sum(smooth * log_softmax(logits)) - entropy
            self.add("cross_entropy", group, cross_entropy, 1)
            if self.objective.z_loss:
                self.add("z_loss", group, np.log(np.exp(logits).sum()) ** 2, 1)
            if self.distil is not None and self.distil.logits:
                hot = self.distil.temperature
                p = log_softmax(logits_at(self.teacher, i, position) / hot)
                q = log_softmax(logits / hot)
                self.add("kl", group, np.sum(np.exp(p) * (p - q)), 1)

    def hidden(self, i: int, group: int) -> None:
        text = self.batch["encoder_input_tokens"][i] > 0
        prompt = self.batch["encoder_prompt_slots"][i] > 0
        encoder = text & self.distil.include_text_positions
        encoder |= prompt & self.distil.include_prompt_positions
        decoder = self.batch["decoder_loss_weights"][i] > 0
        for side, real in (("encoder", encoder), ("decoder", decoder)):
            states = [getattr(who, f"{side}_hidden") for who in (self.student, self.teacher)]
            for ours, theirs in zip(*states, strict=True):
                if f"hidden_{side}" not in self.factors:
                    continue
                gap = np.asarray(ours[i], np.float64) - np.asarray(theirs[i], np.float64)
                weight = 1 if self.distil.reduce == "sum" else real.sum() * H
                self.add(f"hidden_{side}", group, np.sum(gap[real] ** 2), weight)

    def prompts(self, i: int) -> float:
        ours, theirs = self.student.prompts[i], self.teacher.prompts[i]
        return np.sum((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2)

    def total(self) -> float:
        return sum(self.factors[t] * (self.sums[t] / self.weights[t]).sum() for t in self.sums)


def groups_of(runs: Runs, batch=BATCH) -> losses.GroupIds:
    table = jnp.asarray(runs.group_of_row)
    sides = (table[batch[f"{side}_task_ids"]] for side in ("encoder", "decoder"))
    return losses.GroupIds(runs.num_groups, *sides)


def check(objective: Objective, runs: Runs, layers: tuple[int, int] = (1, 1)) -> None:
    student, teacher = outputs(0, layers), outputs(1, layers)
    oracle = Oracle(objective, runs, student, teacher)
    batch = tiny.arrays(BATCH)
    groups = groups_of(runs)
    sums = sums_of(objective, batch, groups, student, teacher)
    weights = losses.normalizers(objective, batch, groups, H, layers)
    assert sorted(sums) == sorted(weights) == sorted(oracle.sums)
    for term in oracle.sums:
        np.testing.assert_allclose(sums[term], oracle.sums[term], rtol=1e-5, err_msg=term)
        np.testing.assert_allclose(weights[term], oracle.weights[term], rtol=1e-6, err_msg=term)
    total, means = losses.total_loss(objective, sums, weights)
    np.testing.assert_allclose(total, oracle.total(), rtol=1e-5)
    for term, mean in means.items():
        np.testing.assert_allclose(mean, oracle.sums[term] / oracle.weights[term], rtol=1e-5)


OBJECTIVES = {
    "cross entropy": Objective(),
    "smoothed": Objective(label_smoothing=0.1),
    "z": Objective(z_loss=1e-2, label_smoothing=0.2),
    "the paper's": Objective(distillation=Distillation()),
    "hot": Objective(distillation=Distillation(temperature=2.5, hidden=False)),
    "hot t2": Objective(distillation=Distillation(temperature=2.5, t2_scale=True, hidden=False)),
    "no logits": Objective(distillation=Distillation(logits=False)),
    "text only": Objective(distillation=Distillation(include_prompt_positions=False)),
    "prompt positions only": Objective(distillation=Distillation(include_text_positions=False)),
    "encoder only": Objective(distillation=Distillation(decoder_weight=0.0)),
    "decoder only": Objective(distillation=Distillation(encoder_weight=0.0)),
    "two weights": Objective(distillation=Distillation(encoder_weight=0.2, decoder_weight=3.0)),
    "summed": Objective(distillation=Distillation(reduce="sum", weight=0.3)),
    "prompts": Objective(
        distillation=Distillation(logits=False, hidden=False, prompt_distance=True)
    ),
    "prompts summed": Objective(
        distillation=Distillation(logits=False, hidden=False, prompt_distance=True, reduce="sum")
    ),
}


@pytest.mark.parametrize("runs", [ONE, RUNS], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_terms_match_definition(name, runs):
    check(OBJECTIVES[name], runs)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_hidden_terms_several_layers_averaged(reduce):
    check(Objective(distillation=Distillation(hidden_layers="all", reduce=reduce)), RUNS, (3, 2))


def test_distillation_repr_is_that_of_earlier_versions_at_defaults():
    """Fingerprints of jobs hold it."""
    assert repr(Distillation()) == (
        "Distillation(weight=0.9, logits=True, hidden=True, prompt_distance=False, "
        "temperature=1.0, t2_scale=False, hidden_layers='last', include_prompt_positions=True, "
        "reduce='mean')"
    )
    assert "decoder_weight=0.5" in repr(Objective(distillation=Distillation(decoder_weight=0.5)))


def test_objective_defaults_match_documented_values():
    distil = Distillation()
    assert (distil.weight, distil.temperature, distil.t2_scale) == (0.9, 1.0, False)
    assert (distil.hidden_layers, distil.include_prompt_positions) == ("last", True)
    assert (distil.reduce, distil.prompt_distance) == ("mean", False)
    assert Objective(distillation=distil).coefficients() == {
        "cross_entropy": 1.0,
        "kl": 0.9,
        "hidden_encoder": 0.9,
        "hidden_decoder": 0.9,
    }
    assert Objective().coefficients() == {"cross_entropy": 1.0}


def test_total_loss_group_without_examples_is_zero_and_finite():
    objective = Objective(distillation=Distillation())
    keep = [i for i in range(6) if BATCH["encoder_task_ids"][i, 0] != 1]
    batch = tiny.arrays(tiny.pick(BATCH, keep))
    take = functools.partial(jax.tree.map, lambda x: x[np.array(keep)])
    student, teacher = take(outputs(0)), take(outputs(1))
    groups = groups_of(RUNS, batch)
    sums = sums_of(objective, batch, groups, student, teacher)
    total, means = losses.total_loss(
        objective, sums, losses.normalizers(objective, batch, groups, H, (1, 1))
    )
    assert np.isfinite(total)
    assert all(mean[1] == 0 and mean[0] > 0 for mean in means.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"reduce": "max"}, "'max'"),
        ({"hidden_layers": "first"}, "'first'"),
        ({"logits": False, "hidden": False}, "would do nothing"),
        ({"logits": False, "temperature": 2.0}, "temperature=2.0 would have no .* logits=False"),
        ({"logits": False, "t2_scale": True}, "t2_scale=True would"),
        ({"hidden": False, "hidden_layers": "all"}, "hidden_layers='all' would .* 'last'"),
        ({"hidden": False, "hidden_layers": [0, -1]}, r"hidden_layers=\[0, -1\] would"),
        ({"hidden": False, "include_prompt_positions": False}, "positions=False would"),
        ({"hidden": False, "decoder_weight": 0.5}, "decoder_weight=0.5 would have no effect"),
        ({"encoder_weight": 0.0, "include_text_positions": False}, "positions=False would"),
        ({"encoder_weight": 0.0, "decoder_weight": 0.0}, "nor both 0"),
        ({"encoder_weight": -1.0}, "must not be negative"),
        (
            {"include_prompt_positions": False, "include_text_positions": False},
            "no encoder state would count",
        ),
        ({"hidden": False, "reduce": "sum"}, "'sum' .* hidden=False and prompt_distance=False"),
    ],
)
def test_distillation_invalid_or_ineffective_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_raises(smoothing):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        Objective(label_smoothing=smoothing)


# --- Gradients -----------------------------------------------------------------------------------

# Smooth activations, so that differences converge. float32 limits them: with a fourth-order
# stencil of this step both errors are below 1e-3 of a derivative of order one.
SMOOTH = tiny.config(mlp_activations=("gelu", "linear"))
STEP = 3e-2
GRADIENT_OBJECTIVES = {
    "all terms": Objective(
        label_smoothing=0.1,
        z_loss=1e-2,
        distillation=Distillation(temperature=2.0, t2_scale=True, hidden_layers="all"),
    ),
    "prompts": OBJECTIVES["prompts"],
}


@pytest.mark.parametrize("name", GRADIENT_OBJECTIVES)
def test_objective_gradients_match_finite_differences(name):
    model = tiny.model(RUNS, MPT(tiny.PROMPT, rank=2), SMOOTH, objective=GRADIENT_OBJECTIVES[name])
    params = tiny.params(model)
    batch = tiny.arrays(BATCH)
    trainable, frozen = split(params, model.labels, {"shared", "task"})
    weights = model.loss_normalizers(batch)

    @jax.jit
    def loss(trainable):
        sums, _ = model.loss_sums(merge(trainable, frozen), batch)
        return losses.total_loss(model.objective, sums, weights)[0]

    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(trainable))
    rng = np.random.default_rng(0)
    for leaf in ("shared", "task_left", "task_right"):
        gradient = grads["prompt"][leaf].astype(np.float64)
        along = rng.normal(size=gradient.shape) + 2 * gradient / np.abs(gradient).max()
        along /= np.linalg.norm(along)

        def at(step, leaf=leaf, along=along):
            moved = trainable["prompt"][leaf] + jnp.asarray(step * along, jnp.float32)
            return float(loss({"prompt": {**trainable["prompt"], leaf: moved}}))

        steps = (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
        expected = np.sum(gradient * along)
        assert abs(expected) > 1e-2, "the direction must be one in which the loss changes"
        np.testing.assert_allclose(steps, expected, rtol=5e-3, atol=1e-4, err_msg=leaf)

"""Tests of every registered method: composition, initialization and parameter counts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from mpt_jax.backbones.t5.config import t5_config
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import label_tree, split
from mpt_jax.models import prompt_insertion
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.prompts import base, get_method, materialize, method_names, register
from mpt_jax.prompts.init import SampledVocabulary, signs
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.state import num_params, param_shapes, trainable_labels
from tests.fixtures import tiny
from tests.fixtures.prompt_methods import CONTEXT, H, K, P, random_arrays, random_params
from tests.golden.make_peft_mpt import TASK_IDS, compose, numbers

GROUPS = ("joint", "independent", (1, 0, 1, 2, 0))
PROMPTED = [name for name in method_names() if name != "none"]


def bank(groups="joint", count: int = K) -> Runs:
    return Runs([f"task{i}" for i in range(count)], groups=groups)


def every_prompt(method, params, runs: Runs) -> np.ndarray:
    """Returns all prompts [K, P, H]; methods that read the text get the same text for all."""
    params = jax.tree.map(jnp.asarray, params)
    given = base.PromptContext(jnp.ones((runs.num_rows, H)))
    return np.asarray(method.compose(params, runs, jnp.arange(runs.num_rows), given))


# --- The protocol --------------------------------------------------------------------------------


def test_method_registry_lists_methods_and_rejects_duplicates():
    assert set(method_names()) >= {"mpt", "none", "prompt_tuning"}
    with pytest.raises(ValueError, match=r"'mtp'.*Did you mean 'mpt'.*Known: .*prompt_tuning"):
        get_method("mtp")
    with pytest.raises(ValueError, match="'mpt' is already registered"):
        register(MPT)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", method_names())
def test_method_init_parameters_have_labels_axes_and_float32(name, groups):
    method, runs = tiny.method(name, P), bank(groups)
    assert isinstance(method, base.PromptMethod)
    params = method.init(jax.random.PRNGKey(0), runs, CONTEXT)
    label_tree(params, method.labels)
    for leaf_name, leaf in params.items():
        assert leaf.dtype == jnp.float32
        axes = method.axes[leaf_name]
        rows = {"groups": runs.num_groups, "tasks": K, "sources": len(tiny.SOURCES)}
        assert len(axes) == leaf.ndim and leaf.shape[0] == rows[axes[0]]
    rebuilt = get_method(name)(**method.config())
    assert rebuilt.config() == method.config()


@pytest.mark.parametrize("name", PROMPTED)
def test_method_init_alone_and_in_fleet_same_prompts(name):
    method, key = tiny.method(name, P), jax.random.PRNGKey(7)
    names = [f"task{i}" for i in range(K)]
    together = Runs(names, groups="independent")
    turned = Runs(names[::-1], groups="independent")
    folded = every_prompt(method, method.init(key, together, CONTEXT), together)
    back = every_prompt(method, method.init(key, turned, CONTEXT), turned)
    np.testing.assert_array_equal(folded, back[::-1])
    for row in (0, 3):
        alone = Runs([names[row]])
        solo = every_prompt(method, method.init(key, alone, CONTEXT), alone)
        np.testing.assert_array_equal(solo[0], folded[row])
    assert len({prompt.tobytes() for prompt in folded}) == K, (
        "all runs have different initial prompts"
    )


def test_prompt_tuning_init_two_runs_of_task_differ():
    runs = Runs(["cb", "cb"], ["cb_s1", "cb_s2"], "independent")
    params = PromptTuning(P).init(jax.random.PRNGKey(0), runs, CONTEXT)
    assert not np.array_equal(params["table"][0], params["table"][1])


# --- Composition ---------------------------------------------------------------------------------


def by_hand(params, runs: Runs) -> np.ndarray:
    """Returns the prompts [K, P, H] by definition, entry by entry in float64."""
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    if "table" in wide:
        return wide["table"]
    if "task_left" not in wide:
        return wide["shared"][list(runs.group_of_row)]
    prompts = np.zeros((runs.num_rows, P, H))
    for k, group in enumerate(runs.group_of_row):
        for p in range(P):
            for h in range(H):
                factors = wide["task_left"][k, p] * wide["task_right"][k, :, h]
                prompts[k, p, h] = wide["shared"][group, p, h] * factors.sum()
    return prompts


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "method", [MPT(P), MPT(P, rank=3), PromptTuning(P)], ids=["mpt", "mpt_rank3", "prompt_tuning"]
)
def test_compose_and_materialize_match_definition(method, groups):
    runs = bank(groups)
    params = random_params(method, runs)
    expected = by_hand(params, runs)
    np.testing.assert_allclose(
        materialize.materialize(method, params, runs), expected, atol=1e-6, rtol=1e-6
    )
    params = jax.tree.map(jnp.asarray, params)
    task_ids = np.array([3, 0, 0, 4, 1, 2])
    per_example = method.compose(params, runs, jnp.asarray(task_ids))
    np.testing.assert_allclose(per_example, expected[task_ids], atol=1e-6, rtol=1e-6)
    per_segment = method.compose(params, runs, jnp.asarray(task_ids.reshape(3, 2)))
    np.testing.assert_array_equal(per_segment.reshape(6, P, H), per_example)


def products(jaxpr) -> list:
    """Returns every matrix product of a traced program, including inner programs."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                found += products(getattr(inner, "jaxpr", inner))
    return found


def test_mpt_compose_and_gradients_use_highest_precision():
    """On a TPU, products use bfloat16 unless a higher precision is requested."""
    method, runs = MPT(P, rank=3), bank()
    params = random_arrays(method, runs)
    use = lambda params: method.compose(params, runs, jnp.array([[0, 1]])).sum()  # noqa: E731
    found = products(jax.make_jaxpr(jax.value_and_grad(use))(params).jaxpr)
    assert len(found) == 3, "forward, and a gradient for each factor"
    for product in found:
        highest = jax.lax.Precision.HIGHEST
        assert product.params["precision"] == (highest, highest)


@pytest.mark.parametrize("rank", [1, 3])
def test_mpt_compose_matches_peft_golden(rank):
    golden = np.load(Path(__file__).parents[1] / "golden" / "peft_mpt.npz")
    given = {name: golden[f"rank{rank}/{name}"] for name in ("shared", "left", "right")}
    np.testing.assert_allclose(
        compose_ours(given, rank), golden[f"rank{rank}/prompts"], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parity
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_mpt_compose_matches_installed_peft(rank):
    given = numbers(rank)
    expected = compose(**given, task_ids=TASK_IDS)
    np.testing.assert_allclose(compose_ours(given, rank), expected, atol=1e-6, rtol=1e-6)


def compose_ours(given: dict[str, np.ndarray], rank: int) -> jax.Array:
    method = MPT(given["shared"].shape[0], rank=rank)
    params = {
        "shared": given["shared"][None],
        "task_left": given["left"],
        "task_right": given["right"],
    }
    runs = bank(count=given["left"].shape[0])
    return method.compose(jax.tree.map(jnp.asarray, params), runs, jnp.asarray(TASK_IDS))


def test_mpt_rank_below_one_raises():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MPT(P, rank=0)


# --- Placement -----------------------------------------------------------------------------------


def test_place_writes_only_reserved_positions():
    rng = np.random.default_rng(0)
    embedded = jnp.asarray(rng.normal(size=(2, 7, H)), jnp.float32)
    prompts = jnp.asarray(rng.normal(size=(2, P, H)), jnp.float32)
    placed = np.asarray(prompt_insertion.place(prompts, embedded))
    np.testing.assert_array_equal(placed[:, :P], prompts)
    np.testing.assert_array_equal(placed[:, P:], embedded[:, P:])
    slots = np.array([[0, 1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 0, 1, 2]])
    rows = jnp.asarray(rng.normal(size=(2, 7, H)), jnp.float32)
    placed = np.asarray(prompt_insertion.place_rows(rows, embedded, jnp.asarray(slots)))
    np.testing.assert_array_equal(placed[slots > 0], np.asarray(rows)[slots > 0])
    np.testing.assert_array_equal(placed[slots == 0], np.asarray(embedded)[slots == 0])


def test_place_keeps_backbone_dtype():
    embedded = jnp.zeros((1, 6, H), jnp.bfloat16)
    assert prompt_insertion.place(jnp.ones((1, P, H)), embedded).dtype == jnp.bfloat16
    slots = jnp.ones((1, 6), jnp.int32)
    assert prompt_insertion.place_rows(jnp.ones((1, 6, H)), embedded, slots).dtype == jnp.bfloat16


def test_place_prompt_longer_than_row_raises():
    with pytest.raises(ValueError, match="4 positions does not fit into a row of 3"):
        prompt_insertion.place(jnp.ones((1, P, H)), jnp.ones((1, 3, H)))


# --- Trainable parameter counts ------------------------------------------------------------------

SOURCES = ["mnli", "qqp", "qnli", "sst2", "squad", "record"]
GLUE = ["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"]


def trained(size: str, prompt, runs: Runs, depth: int | None = 1, **overrides) -> int:
    """Returns the trainable parameter count of a T5 1.0; depth None is the size's own depth."""
    layers = {} if depth is None else {"num_encoder_layers": depth, "num_decoder_layers": depth}
    model = tiny.model(runs, prompt, t5_config(f"t5_1_0_{size}", **layers), **overrides)
    tree, _ = param_shapes(model)
    return num_params(split(tree, model.labels, trainable_labels(model, tree))[0])


@pytest.mark.parametrize("depth", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("size", "prompt", "tasks", "expected"),
    [
        ("base", MPT(100), ["rte"], 77_668),
        ("base", MPT(100), SOURCES, 82_008),
        ("base", MPT(100), GLUE, 83_744),
        ("small", MPT(100), ["rte"], 51_812),
        ("large", MPT(100), ["rte"], 103_524),
        ("base", PromptTuning(100), ["rte"], 76_800),
    ],
)
def test_trainable_parameter_counts_match_paper(size, prompt, tasks, expected, depth):
    assert trained(size, prompt, Runs(tasks), depth) == expected


def test_mpt_glue_as_one_group_trains_10468_parameters_per_task():
    assert trained("base", MPT(100), Runs(GLUE)) / len(GLUE) == 10_468


def test_trainable_parameter_count_excludes_teachers():
    objective = Objective(distillation=Distillation())
    assert trained("base", MPT(100), Runs(SOURCES), objective=objective) == 82_008


def test_mpt_independent_runs_and_rank_parameter_counts():
    runs = Runs(GLUE[:3], groups="independent")
    assert trained("small", MPT(100), runs) == 3 * 51_812
    assert trained("small", MPT(100, rank=4), Runs(["rte"])) == 100 * 512 + 4 * (100 + 512)


def test_mpt_defaults_match_paper():
    assert MPT(100).rank == 1
    assert isinstance(MPT(100).init_prompt, SampledVocabulary)
    assert MPT(100).start_from == "average"
    assert MPT(P, init_factors=signs).init(jax.random.PRNGKey(0), bank(), CONTEXT)

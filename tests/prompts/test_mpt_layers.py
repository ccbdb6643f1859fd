"""MPT's factors of image tokens that are replaced in several layers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts.artifacts import load_artifact
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.base import InitContext, method_from_config, row_axes
from mpt_jax.prompts.init import Uniform, ones_noise, signs
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.sites import IMAGE, SitePrompts
from tests.fixtures import saved_artifacts

LAYERS, P, H = 3, 4, 6
KEY = jax.random.PRNGKey(0)
RUNS = Runs(["a", "b", "c"], groups=[0, 1, 0])
SOURCES = Runs(["a", "b", "c"])
CONTEXT = InitContext(jnp.zeros((0, H)))
KINDS = ["rows", "each", "tied"]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def made(kind, rank=2, **settings):
    return MPT(LAYERS * P, rank, Uniform(), layers=LAYERS, layer_factors=kind, **settings)


def random(method, runs=RUNS, seed=0):
    """Random parameters of the shapes that `init` returns."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: method.init(KEY, runs, CONTEXT))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


def by_hand(kind, params, runs=RUNS):
    """The prompts [K, n P, H] in float64, one layer at a time."""
    shared, left, right = (
        np.asarray(params[name], np.float64) for name in ("shared", "task_left", "task_right")
    )
    prompts = []
    for row, group in enumerate(runs.group_of_row):
        layers = []
        for layer in range(LAYERS):
            rows = slice(layer * P, layer * P + P)
            u = left[row] if kind == "tied" else left[row][rows]
            v = right[row][layer] if kind == "each" else right[row]
            layers.append(shared[group][rows] * (u @ v))
        prompts.append(np.concatenate(layers))
    return np.stack(prompts)


# --- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rank", "count"),
    [
        ("rows", 1, 960),
        ("each", 1, 9_408),
        ("tied", 1, 784),
        ("rows", 3, 2_880),
        ("each", 3, 28_224),
        ("tied", 3, 2_352),
    ],
)
def test_num_factors_at_the_published_size(kind, rank, count):
    """ViT-B/16: 12 layers of 16 tokens of width 768."""
    method = MPT(192, rank, Uniform(), layers=12, layer_factors=kind)
    wide = InitContext(jnp.zeros((0, 768)))
    shapes = jax.eval_shape(lambda: method.init(KEY, Runs(["a", "b"]), wide))
    assert shapes["shared"].shape == (1, 192, 768)
    assert sum(x.size for name, x in shapes.items() if name != "shared") == 2 * count


@pytest.mark.parametrize("rank", [1, 2])
@EACH_KIND
def test_compose_matches_numpy(kind, rank):
    method = made(kind, rank)
    params = random(method)
    expected = by_hand(kind, params)
    ids = jnp.asarray([[2, 0], [1, 1]])
    found = jax.jit(lambda ids: method.compose(params, RUNS, ids))(ids)
    np.testing.assert_allclose(found, expected[np.asarray(ids)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(materialize(method, params, RUNS), expected, rtol=1e-5, atol=1e-5)
    both = SitePrompts(image_tokens=method, image_layers=LAYERS)
    tokens = both.compose_site(IMAGE, {IMAGE: params}, RUNS, jnp.asarray([1]))
    assert tokens.shape == (1, LAYERS, P, H)
    of_layers = expected[1].reshape(LAYERS, P, H)
    np.testing.assert_allclose(tokens[0], of_layers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@EACH_KIND
def test_gradients_match_finite_differences(kind, rank):
    method = made(kind, rank)
    params, weights = random(method), random(method, seed=1)
    cotangent = np.random.default_rng(2).normal(size=(3, LAYERS * P, H))

    def loss(params):
        prompts = method.compose(params, RUNS, jnp.arange(3))
        return (prompts * jnp.asarray(cotangent, jnp.float32)).sum()

    found = jax.grad(loss)(params)
    step = 1e-4
    for name, value in params.items():
        moved = [
            {
                **params,
                name: np.asarray(value, np.float64) + sign * step * np.asarray(weights[name]),
            }
            for sign in (1, -1)
        ]
        up, down = ((by_hand(kind, x) * cotangent).sum() for x in moved)
        slope = float((found[name] * weights[name]).sum())
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-4)


@EACH_KIND
def test_axes_name_every_dimension(kind):
    method = made(kind)
    params = method.init(KEY, RUNS, CONTEXT)
    assert {name: x.ndim for name, x in params.items()} == {
        name: len(axes) for name, axes in method.axes.items()
    }
    kinds = {"shared": "groups", "task_left": "tasks", "task_right": "tasks"}
    assert row_axes(method) == {f"prompt/{name}": axis for name, axis in kinds.items()}


@EACH_KIND
def test_init_starts_near_the_shared_prompt(kind):
    """Every factor is one, plus noise with standard deviation 0.02."""
    method = made(kind, init_factors=ones_noise)
    params = method.init(KEY, RUNS, CONTEXT)
    prompts = np.asarray(materialize(method, params, RUNS))
    shared = np.asarray(params["shared"])[np.asarray(RUNS.group_of_row)]
    ratio = prompts / shared
    assert 0 < np.abs(ratio - 1).max() < 0.2 and ratio.std() < 0.05
    again = method.init(KEY, Runs(["c", "a"]), CONTEXT)
    for name in ("task_left", "task_right"):
        np.testing.assert_array_equal(again[name], params[name][jnp.asarray([2, 0])])


def test_init_each_layer_draws_a_pair():
    """Products of random signs of rank 2 have variance one in every layer, and layers differ."""
    params = made("each", init_factors=signs).init(KEY, RUNS, CONTEXT)
    left, right = np.asarray(params["task_left"]), np.asarray(params["task_right"])
    assert right.shape == (3, LAYERS, 2, H) and (np.abs(left) == np.float32(2**-0.5)).all()
    pairs = itertools.combinations(range(LAYERS), 2)
    assert all((right[:, i] != right[:, j]).any() for i, j in pairs)


def test_rows_are_the_default_with_the_same_parameters():
    plain = MPT(LAYERS * P, 2, Uniform())
    for name, value in plain.init(KEY, RUNS, CONTEXT).items():
        np.testing.assert_array_equal(value, made("rows").init(KEY, RUNS, CONTEXT)[name])
    assert plain.config() == made("rows").config() == {"prompt_length": LAYERS * P, "rank": 2}


# --- Transfer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("average_of", ["factors", "products"])
@EACH_KIND
def test_transfer_from_one_run_is_exact(kind, average_of):
    method = made(kind, start_from="b", average_of=average_of)
    source = random(method, SOURCES)
    found = method.transfer(source, method, SOURCES, Runs(["x", "y"]))
    np.testing.assert_array_equal(found["shared"], source["shared"])
    for name in ("task_left", "task_right"):
        assert found[name].shape == (2, *source[name].shape[1:])
        for row in range(2):
            np.testing.assert_array_equal(found[name][row], source[name][1])


def closest(matrix, rank):
    left, values, right = np.linalg.svd(matrix)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("average_of", ["factors", "products"])
@EACH_KIND
def test_transfer_averages_match_numpy(kind, average_of):
    """The products of a new task, one layer at a time; of rank 1, so that pairs have one form."""
    method = made(kind, 1, average_of=average_of)
    source = random(method, SOURCES)
    found = method.transfer(source, method, SOURCES, Runs(["x"]))
    left, right = (np.asarray(source[f"task_{side}"], np.float64) for side in ("left", "right"))
    layers = LAYERS if kind == "each" else 1
    left = left.reshape(3, layers, -1, 1)
    right = right.reshape(3, layers, 1, H)
    expected = []
    for layer in range(layers):
        if average_of == "products":
            expected.append(closest((left[:, layer] @ right[:, layer]).mean(0), 1))
            continue
        scale = np.linalg.norm(left[:, layer], axis=1, keepdims=True) / left.shape[2] ** 0.5
        scale *= np.sign(left[:, layer].sum(1, keepdims=True))
        expected.append((left[:, layer] / scale).mean(0) @ (right[:, layer] * scale).mean(0))
    rows = np.concatenate(expected)
    ones = {**found, "shared": jnp.ones_like(found["shared"])}
    product = np.asarray(materialize(method, ones, Runs(["x"])))[0]
    tiled = np.tile(rows, (LAYERS if kind == "tied" else 1, 1))
    np.testing.assert_allclose(product, tiled, rtol=1e-4, atol=1e-5)


@EACH_KIND
def test_transfer_products_to_another_rank(kind):
    source_method, method = made(kind, 3), made(kind, 2, average_of="products", start_from="a")
    source = random(source_method, SOURCES)
    found = method.transfer(source, source_method, SOURCES, Runs(["x"]))
    assert found["task_left"].shape[-1] == found["task_right"].shape[-2] == 2
    assert jax.tree.structure(found) == jax.tree.structure(random(method, Runs(["x"])))
    for name, value in random(method, Runs(["x"])).items():
        assert found[name].shape == value.shape


@pytest.mark.parametrize(("own", "other"), itertools.permutations(KINDS, 2))
def test_transfer_from_other_layer_factors_fails(own, other):
    theirs = made(other)
    with pytest.raises(ValueError, match=f"layer_factors is '{own}', .* has '{other}'"):
        made(own).transfer(random(theirs, SOURCES), theirs, SOURCES, RUNS)


def test_transfer_from_other_layers_fails():
    theirs = MPT(12, 2, Uniform(), layers=2, layer_factors="tied")
    with pytest.raises(ValueError, match="MPT.layers is 3, .* has 2 layers. .*IMAGE_LAYERS"):
        made("tied").transfer(random(theirs, SOURCES), theirs, SOURCES, RUNS)


# --- Statistics ----------------------------------------------------------------------------------


@EACH_KIND
def test_statistics_match_numpy(kind):
    """The share of the squared norm along P*, from whole prompts; norms and signs of factors."""
    method = made(kind)
    params = {name: np.asarray(x) for name, x in random(method, SOURCES).items()}
    found = method.statistics(params, SOURCES)
    prompts, shared = by_hand(kind, params, SOURCES), params["shared"][0].astype(np.float64)
    along = np.square(np.einsum("kph,ph->k", prompts, shared)).sum() / np.square(shared).sum()
    assert found["shared_variance"] == pytest.approx(along / np.square(prompts).sum(), rel=1e-6)
    for side in ("left", "right"):
        rms = np.sqrt(np.mean(np.square(params[f"task_{side}"], dtype=np.float64)))
        assert found[f"{side}_norm"] == pytest.approx(rms, rel=1e-6)
    left, right = params["task_left"], params["task_right"]
    pairs = left.reshape(3, LAYERS if kind == "each" else 1, -1, 2)
    sign = np.sign(pairs.sum(2))  # [tasks, layers, R]
    right = right.reshape(3, pairs.shape[1], 2, H) * sign[..., None]
    left = pairs * sign[:, :, None]
    same = [
        np.mean([np.mean(np.sign(x[i]) == np.sign(x[j])) for x in (left, right)])
        for i, j in itertools.combinations(range(3), 2)
    ]
    assert found["sign_agreement"] == pytest.approx(np.mean(same), rel=1e-6)


# --- Settings and artifacts ----------------------------------------------------------------------


@EACH_KIND
def test_config_and_artifact_round_trip(kind, tmp_path):
    both = SitePrompts(image_tokens=made(kind), image_layers=LAYERS)
    settings = json.loads(json.dumps(both.config()))
    again = method_from_config("site_prompts", settings, "FILE")
    assert again.config() == both.config()
    params = {IMAGE: random(made(kind))}
    path = saved_artifacts.save(tmp_path / "a", both, params, RUNS, include_folded=True)
    loaded = load_artifact(path)
    assert isinstance(loaded.method, SitePrompts)
    for row in range(3):
        found = loaded.method.compose_site(IMAGE, loaded.params, RUNS, jnp.asarray(row))
        expected = by_hand(kind, params[IMAGE])[row].reshape(LAYERS, P, H)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_artifact_without_the_new_settings_loads(tmp_path):
    """As written by versions without layers."""
    method = MPT(P, 2)
    params = random(MPT(P, 2, Uniform()))
    path = saved_artifacts.save(tmp_path / "a", method, params, RUNS)
    config = json.loads((path / "config.json").read_text())
    assert config["method_config"] == {"prompt_length": P, "rank": 2}
    assert load_artifact(path).method == MPT(P, 2)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"layer_factors": "all"}, "LAYER_FACTORS.*'all'"),
        ({"layer_factors": 3}, "a string was expected"),
        ({"layers": 5, "layer_factors": "each"}, "12 rows .* MPT.layers = 5"),
        ({"layers": 0}, "MPT.layers = 0"),
        ({"layers": -3}, "MPT.layers = -3"),
        ({"layers": 10**30}, "MPT.layers = 10+ equal parts"),
        ({"layers": 1.5}, "an integer"),
    ],
)
def test_hostile_settings_are_value_errors(settings, problem):
    with pytest.raises(ValueError, match=problem):
        method_from_config("mpt", {"prompt_length": 12, **settings}, "FILE")


def test_artifact_of_other_shapes_fails(tmp_path):
    """Factors of all rows under the settings of factors of each layer."""
    params = random(made("rows"))
    path = saved_artifacts.save(tmp_path / "a", made("each"), params, RUNS)
    with pytest.raises(ValueError, match=r"task_right .* needs floats \[tasks, layers, rank, emb"):
        load_artifact(path)
    two = MPT(LAYERS * P, 2, Uniform(), layers=2, layer_factors="each")
    path = saved_artifacts.save(tmp_path / "b", made("each"), random(two), RUNS)
    with pytest.raises(ValueError, match="does not match the settings of 'mpt'"):
        load_artifact(path)


def test_sites_with_another_number_of_layers_fail():
    with pytest.raises(ValueError, match="image_tokens has layers = 3, .*image_layers is 2"):
        SitePrompts(image_tokens=made("each"), image_layers=2)
    with pytest.raises(ValueError, match="text_context has layers = 3, .*text_classes is 1"):
        SitePrompts(made("tied"))
    assert SitePrompts(made("tied"), text_classes=3).parts

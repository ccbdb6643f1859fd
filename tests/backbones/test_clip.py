"""CLIP's towers: outputs and gradients equal to a NumPy version written from the papers, visual
prompts, scanned layers, bfloat16, sizes of published models, initialization, and errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.clip import CLIP, CLIPConfig, clip_config, parameter_shapes
from mpt_jax.backbones.clip.config import CLIP_MEAN, CLIP_STD, architecture
from mpt_jax.backbones.clip.layers import layer_norm
from mpt_jax.backbones.clip.network import abstract_variables
from mpt_jax.backbones.clip.published import NAMES
from mpt_jax.backbones.t5.scanned_params import is_stacked, stack_layers, unstack_layers
from mpt_jax.core.tree import flatten
from mpt_jax.training.partitioning import standard_logical_axis_rules
from tests.fixtures.clip_models import (
    IMAGE,
    TEXT,
    VIT,
    features,
    random_images,
    random_params,
    tiny,
)

P = 2
ERF = np.vectorize(math.erf)
ACTIVATE = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


# --- A NumPy version in float64, one sequence [T,H] at a time -------------------------------------


def norm(x, p, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * p[
        "scale"
    ] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def block(x, p, heads, causal, config):
    normed = norm(x, p["pre_attention_layer_norm"], config.layer_norm_epsilon)
    query, key, value = (dense(normed, p["attention"][name]) for name in ("query", "key", "value"))
    width, mixed = x.shape[1] // heads, []
    for n in range(heads):
        columns = slice(n * width, (n + 1) * width)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(width)
        if causal:
            scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value[:, columns])
    x = x + dense(np.concatenate(mixed, axis=1), p["attention"]["out"])
    inner = dense(norm(x, p["pre_mlp_layer_norm"], config.layer_norm_epsilon), p["mlp"]["wi"])
    return x + dense(ACTIVATE[config.activation](inner), p["mlp"]["wo"])


def numpy_image(params, config, image, prompts=None):
    """The feature of an image [S,S,3] with prompts [n,P,H]: VPT shallow if n is 1, else deep."""
    p, tower = params["image_encoder"], config.image
    pixels = (image / 255 - np.asarray(config.image_mean)) / np.asarray(config.image_std)
    size = tower.patch_size
    corners = range(0, tower.image_size, size)
    patches = [pixels[y : y + size, x : x + size].ravel() for y in corners for x in corners]
    x = np.stack(patches) @ p["patch_embedding"]["kernel"] + p["patch_embedding"].get("bias", 0)
    x = np.concatenate([p["class_embedding"][None], x]) + p["position_embedding"]["embedding"]
    if config.input_norm:
        x = norm(x, p["input_norm"], config.layer_norm_epsilon)
    for i in range(tower.num_layers):
        if prompts is not None and i == 0:
            x = np.concatenate([x[:1], prompts[0], x[1:]])
        elif prompts is not None and len(prompts) > 1:
            x = np.concatenate([x[:1], prompts[i], x[1 + prompts.shape[1] :]])
        x = block(x, p[f"layers_{i}"], tower.num_heads, False, config)
    x = norm(x[0], p["output_norm"], config.layer_norm_epsilon)
    return x @ p["projection"]["kernel"] if config.joint_dim else x


def numpy_text(params, config, embeddings, eot):
    """The feature of a text of embeddings [T,H]."""
    p = params["text_encoder"]
    x = embeddings + p["position_embedding"]["embedding"][: len(embeddings)]
    for i in range(config.text.num_layers):
        x = block(x, p[f"layers_{i}"], config.text.num_heads, True, config)
    x = norm(x[eot], p["output_norm"], config.layer_norm_epsilon)
    return x @ p["projection"]["kernel"]


# --- Models ---------------------------------------------------------------------------------------


@functools.cache
def params_of(config: CLIPConfig) -> dict:
    return random_params(dataclasses.replace(config, scan_layers=False, remat="none"))


def wide(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def images() -> jax.Array:
    return random_images(tiny())


def prompts(layers: int) -> np.ndarray:
    """Random prompts for two images."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(2, layers, P, IMAGE.emb_dim)).astype(np.float32)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings and end positions of three texts."""
    embeddings = np.random.default_rng(4).normal(size=(3, 9, TEXT.emb_dim)).astype(np.float32)
    return embeddings, np.asarray([8, 2, 5], np.int32)


def run(config, method, *inputs, **settings):
    """Calls a method of a model with the random parameters, stacked if layers are scanned."""
    params = params_of(config)
    variables = {"params": stack_layers(params) if config.scan_layers else params}
    call = jax.jit(
        lambda *inputs: CLIP(config).apply(variables, *inputs, method=method, **settings)
    )
    return jax.tree.map(np.asarray, call(*map(jnp.asarray, inputs)))


# --- Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("layers", [0, 1, IMAGE.num_layers])
def test_encode_image_matches_numpy(activation, layers):
    config = tiny(activation=activation)
    given = [prompts(layers)] if layers else []
    found = run(config, "encode_image", images(), *given)
    params = wide(params_of(config))
    for i, image in enumerate(np.asarray(images(), np.float64)):
        expected = numpy_image(params, config, image, *(x[i] for x in given))
        np.testing.assert_allclose(found[i], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layers", [0, 1, IMAGE.num_layers])
def test_encode_image_of_plain_vit_matches_numpy(layers):
    config = tiny(**VIT, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7))
    assert not [x for x in parameter_shapes(config) if not x.startswith("image_encoder/")]
    given = [prompts(layers)] if layers else []
    found = run(config, "encode_image", images(), *given)
    assert found.shape == (2, IMAGE.emb_dim)
    expected = numpy_image(
        wide(params_of(config)), config, np.asarray(images()[1], np.float64), *(x[1] for x in given)
    )
    np.testing.assert_allclose(found[1], expected, atol=1e-5 * np.abs(expected).max())


def test_encode_text_matches_numpy():
    config = tiny()
    embeddings, eot = texts()
    found = run(config, "encode_text", embeddings, eot)
    for i in range(3):
        expected = numpy_text(wide(params_of(config)), config, wide(embeddings[i]), eot[i])
        np.testing.assert_allclose(found[i], expected, atol=1e-5 * np.abs(expected).max())


def test_encode_image_normalized_floats_match_bytes():
    mean, std = np.asarray(CLIP_MEAN, np.float32), np.asarray(CLIP_STD, np.float32)
    normalized = (np.asarray(images(), np.float32) / 255 - mean) / std
    found = run(tiny(), "encode_image", normalized)
    np.testing.assert_allclose(found, run(tiny(), "encode_image", images()), atol=1e-5)


def test_encode_image_one_prompt_for_all_images_matches_one_per_image():
    for layers in (1, IMAGE.num_layers):
        shared = prompts(layers)[:1]
        expected = run(tiny(), "encode_image", images(), np.repeat(shared, 2, axis=0))
        for form in (shared, shared[0]):
            found = run(tiny(), "encode_image", images(), form)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_encode_text_ignores_padding_exactly():
    config, eot = tiny(), np.asarray([4, 7], np.int32)
    tokens = np.random.default_rng(5).integers(0, 40, (2, 12))
    other = np.where(np.arange(12) > eot[:, None], 39 - tokens, tokens)
    found, expected = (
        run(config, "encode_text", run(config, "embed_tokens", x), eot) for x in (tokens, other)
    )
    np.testing.assert_array_equal(found, expected)
    short = run(config, "encode_text", run(config, "embed_tokens", tokens[:, :8]), eot)
    np.testing.assert_allclose(short, expected, atol=1e-5)


def test_call_returns_features_of_both_towers():
    config = tiny()
    tokens, eot = np.asarray([[1, 2, 3]]), np.asarray([2])
    found = run(config, "__call__", images(), tokens, eot)
    expected = features(config, params_of(config), images(), tokens, eot)
    np.testing.assert_allclose(found[0], expected["image_features"], atol=1e-5)
    np.testing.assert_allclose(found[1], expected["text_features"], atol=1e-5)


def test_bfloat16_features_match_float32_in_direction():
    config, half = tiny(), tiny(dtype="bfloat16")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of(config))
    embeddings, eot = map(jnp.asarray, texts())
    image, text = (
        jax.jit(lambda *x, m=method: CLIP(half).apply({"params": params}, *x, method=m))(*inputs)
        for method, inputs in (
            ("encode_image", (images(), jnp.asarray(prompts(3)))),
            ("encode_text", (embeddings, eot)),
        )
    )
    expected_image = run(config, "encode_image", images(), prompts(3))
    expected_text = run(config, "encode_text", embeddings, eot)
    for found, expected in ((image, expected_image), (text, expected_text)):
        assert found.dtype == jnp.float32
        found = np.asarray(found)
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((found * expected).sum(-1) / lengths).min() >= 0.999


# --- Scanned and rematerialized layers ------------------------------------------------------------


@functools.cache
def outputs_and_slopes(layers: int, **fields):
    """Features, hidden states, and gradients of weights, prompts and embeddings."""
    config = tiny(**fields)
    model, (embeddings, eot) = CLIP(config), map(jnp.asarray, texts())
    params = jax.tree.map(jnp.asarray, params_of(config))
    rng = np.random.default_rng(6)
    weights = [jnp.asarray(rng.normal(size=(n, 10)), jnp.float32) for n in (2, 3)]

    @jax.jit
    def call(params, prompts, embeddings):
        def loss(params, prompts, embeddings):
            variables, keep = {"params": params}, {"return_hidden": True}
            image = model.apply(variables, images(), prompts, method="encode_image", **keep)
            text = model.apply(variables, embeddings, eot, method="encode_text", **keep)
            return jnp.sum(image[0] * weights[0]) + jnp.sum(text[0] * weights[1]), (image, text)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, prompts, embeddings)

    slopes, outputs = call(
        stack_layers(params) if config.scan_layers else params,
        jnp.asarray(prompts(layers)),
        embeddings,
    )
    if config.scan_layers:
        assert is_stacked(slopes[0])
        slopes = (unstack_layers(slopes[0]), *slopes[1:])
    return outputs, slopes


@pytest.mark.parametrize(
    ("layers", "remat", "scan_layers"),
    [
        (3, "full", True),
        pytest.param(1, "none", True, marks=pytest.mark.slow),
        pytest.param(3, "minimal", False, marks=pytest.mark.slow),
        pytest.param(3, "minimal", True, marks=pytest.mark.slow),
        pytest.param(1, "full", False, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_outputs_and_gradients_match(layers, remat, scan_layers):
    expected = flatten(outputs_and_slopes(layers))
    found = flatten(outputs_and_slopes(layers, remat=remat, scan_layers=scan_layers))
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        tolerance = 1e-6 * max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(found[name], leaf, atol=tolerance, err_msg=name)


def test_hidden_states_are_input_and_output_of_every_layer():
    (image, text), _ = outputs_and_slopes(1)
    assert [x.shape for x in image[1]] == [(2, 1 + P + 16, 24)] * 4
    assert [x.shape for x in text[1]] == [(3, 9, 16)] * 3
    np.testing.assert_array_equal(image[1][0][:, 1 : 1 + P], prompts(1)[:, 0])


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, IMAGE.num_layers])
def test_gradient_of_prompts_matches_finite_differences(layers):
    config, rng = tiny(), np.random.default_rng(7)
    weights, direction = rng.normal(size=10), rng.normal(size=(layers, P, IMAGE.emb_dim))
    variables = {"params": params_of(config)}

    @jax.jit
    @jax.grad
    def slope(prompts):
        found = CLIP(config).apply(variables, images()[:1], prompts, method="encode_image")
        return jnp.sum(found[0] * jnp.asarray(weights, jnp.float32))

    def loss(step):
        given = prompts(layers)[0] + step * direction
        image = np.asarray(images()[0], np.float64)
        return numpy_image(wide(variables["params"]), config, image, given) @ weights

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    found = np.sum(np.asarray(slope(jnp.asarray(prompts(layers)[0])), np.float64) * direction)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_gradient_of_embeddings_matches_finite_differences():
    config, rng, (embeddings, eot) = tiny(), np.random.default_rng(8), texts()
    weights, direction = rng.normal(size=10), rng.normal(size=embeddings.shape[1:])
    variables = {"params": params_of(config)}

    @jax.jit
    @jax.grad
    def slope(embeddings):
        found = CLIP(config).apply(
            variables, embeddings, jnp.asarray(eot[:1]), method="encode_text"
        )
        return jnp.sum(found[0] * jnp.asarray(weights, jnp.float32))

    def loss(step):
        given = embeddings[0] + step * direction
        return numpy_text(wide(variables["params"]), config, given, eot[0]) @ weights

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    found = np.sum(np.asarray(slope(jnp.asarray(embeddings[:1])), np.float64)[0] * direction)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_layer_norm_gradients_match_automatic_differentiation():
    rng = np.random.default_rng(9)
    shapes = ((3, 5, 8), (8,), (8,), (3, 5, 8))
    x, scale, bias, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def plain(x, scale, bias):
        mean, var = (f(x, axis=-1, keepdims=True) for f in (jnp.mean, jnp.var))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale[None, None] + bias[None, None]

    def slopes(f):
        return jax.grad(lambda *args: jnp.sum(f(*args) * weights), argnums=(0, 1, 2))(
            x, scale, bias
        )

    ours = slopes(lambda *args: layer_norm(*args, 1e-5, jnp.dtype("float32")))
    for found, expected in zip(ours, slopes(plain), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


# --- Sizes and initialization ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "leaves"),
    [
        ("clip_vit_b32", 151_277_313, 398),
        ("clip_vit_b16", 149_620_737, 398),
        ("clip_vit_l14", 427_616_513, 590),
        ("clip_vit_l14_336", 427_944_193, 590),
        ("vit_b16", 85_798_656, 198),
    ],
)
def test_published_models_have_published_sizes(name, parameters, leaves):
    shapes = parameter_shapes(clip_config(name))
    assert sum(map(math.prod, shapes.values())) == parameters
    assert len(shapes) == leaves
    scanned = parameter_shapes(clip_config(name, scan_layers=True))
    assert sum(map(math.prod, scanned.values())) == parameters


def test_b16_towers_have_published_sizes():
    sizes = dict.fromkeys(("image_encoder", "text_encoder", "logit_scale"), 0)
    for name, shape in parameter_shapes(clip_config("clip_vit_b16")).items():
        sizes[name.split("/")[0]] += math.prod(shape)
    assert sizes == {"image_encoder": 86_192_640, "text_encoder": 63_428_096, "logit_scale": 1}


AXES = {
    "image_encoder/patch_embedding/kernel": ("patch", "embed"),
    "image_encoder/class_embedding": ("embed",),
    "image_encoder/position_embedding/embedding": ("abspos_buckets", "embed"),
    "image_encoder/input_norm/scale": ("embed",),
    "image_encoder/layers_1/attention/query/kernel": ("embed", "joined_kv"),
    "image_encoder/layers_1/attention/key/bias": ("joined_kv",),
    "image_encoder/layers_1/attention/out/kernel": ("joined_kv", "embed"),
    "image_encoder/layers_1/attention/out/bias": ("embed",),
    "text_encoder/layers_1/mlp/wi/kernel": ("embed", "mlp"),
    "text_encoder/layers_1/mlp/wi/bias": ("mlp",),
    "text_encoder/layers_1/mlp/wo/kernel": ("mlp", "embed"),
    "text_encoder/layers_0/pre_mlp_layer_norm/bias": ("embed",),
    "text_encoder/token_embedder/embedding": ("vocab", "embed"),
    "text_encoder/projection/kernel": ("embed", "joint"),
    "text_encoder/output_norm/bias": ("embed",),
    "logit_scale": (),
}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_have_logical_axes_with_rules(scan_layers):
    variables = abstract_variables(tiny(scan_layers=scan_layers))
    axes = flatten(variables["params_axes"], is_leaf=lambda x: hasattr(x, "names"))
    axes = {name.removesuffix("_axes"): tuple(x.names) for name, x in axes.items()}
    params = flatten(variables["params"])
    assert {name: len(x) for name, x in axes.items()} == {k: x.ndim for k, x in params.items()}
    ruled = {axis for axis, _ in standard_logical_axis_rules()}
    assert {axis for names in axes.values() for axis in names} <= ruled
    if not scan_layers:
        assert {name: axes[name] for name in AXES} == AXES


@pytest.mark.slow
def test_initial_values_have_standard_deviations_of_openai():
    image = dataclasses.replace(IMAGE, emb_dim=96, num_layers=2, mlp_dim=384)
    text = dataclasses.replace(TEXT, emb_dim=64, mlp_dim=256, vocab_size=500, context_length=200)
    config = tiny(image=image, text=text, joint_dim=48)
    abstract = abstract_variables(config)["params"]
    arguments = jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, int)
    params = flatten(jax.jit(CLIP(config).init)(jax.random.key(0), *arguments)["params"])
    assert set(params) == set(flatten(abstract))
    expected = {
        "text_encoder/token_embedder/embedding": 0.02,
        "text_encoder/position_embedding/embedding": 0.01,
        "text_encoder/layers_1/attention/query/kernel": 64**-0.5,
        "text_encoder/layers_1/attention/out/kernel": (64 * 4) ** -0.5,
        "image_encoder/layers_0/mlp/wi/kernel": (2 * 96) ** -0.5,
        "image_encoder/layers_0/mlp/wo/kernel": (96 * 4) ** -0.5,
        "text_encoder/projection/kernel": 64**-0.5,
        "image_encoder/projection/kernel": 96**-0.5,
        "image_encoder/position_embedding/embedding": 96**-0.5,
        "image_encoder/patch_embedding/kernel": (3 * 4 * 4) ** -0.5 / math.sqrt(3),  # uniform
    }
    for name, std in expected.items():
        np.testing.assert_allclose(np.std(params[name]), std, rtol=0.05, err_msg=name)
    limit = float(np.abs(params["image_encoder/patch_embedding/kernel"]).max())
    assert 0.95 * 48**-0.5 < limit <= 48**-0.5
    np.testing.assert_allclose(params["logit_scale"], 2.6593, atol=1e-4)
    assert not params["text_encoder/layers_0/attention/key/bias"].any()


# --- Errors ---------------------------------------------------------------------------------------


def test_encode_image_wrong_inputs_error():
    with pytest.raises(
        ValueError, match="the shape 8 x 16 x 3, but the image tower needs 16 x 16 x 3"
    ):
        run(tiny(), "encode_image", images()[:, :8])
    with pytest.raises(ValueError, match="have 2 layers and width 24, .*prompts for 1 or 3 layers"):
        run(tiny(), "encode_image", images(), prompts(2))
    with pytest.raises(ValueError, match="have 1 layers and width 23"):
        run(tiny(), "encode_image", images(), prompts(1)[..., :23])
    with pytest.raises(ValueError, match="visual prompts for 2 images, but the batch has 3 images"):
        run(tiny(), "encode_image", random_images(tiny(), 3), prompts(1))


def test_encode_text_wrong_inputs_error():
    embeddings, eot = texts()
    with pytest.raises(ValueError, match="have 18 positions, but the text tower has 12"):
        run(tiny(), "encode_text", np.concatenate([embeddings] * 2, axis=1), eot)
    with pytest.raises(ValueError, match="no text tower"):
        run(tiny(**VIT), "encode_text", embeddings, eot)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"joint_dim": None}, "joint_dim is None, but a text tower needs"),
        ({"joint_dim": 0}, "joint_dim must be an integer from 1"),
        (
            {"activation": "relu"},
            "activation must be 'quick_gelu', 'gelu' or 'gelu_tanh', got 'relu'",
        ),
        ({"remat": "some"}, "remat must be"),
        ({"dtype": "float16"}, "dtype='float16' is not supported"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be between 0 and 1"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must have 3 finite values"),
        ({"image_std": (0.5, 0.5, 0.0)}, "image_std must have 3 finite values, all above 0"),
    ],
)
def test_config_wrong_field_error(fields, problem):
    with pytest.raises(ValueError, match=problem):
        tiny(**fields)


@pytest.mark.parametrize(
    ("tower", "fields", "problem"),
    [
        (IMAGE, {"num_heads": 5}, "num_heads=5 does not divide emb_dim=24"),
        (IMAGE, {"patch_size": 5}, "16 pixels cannot be divided .* patches of 5 pixels"),
        (IMAGE, {"image_size": 2**20}, "cannot be divided"),
        (IMAGE, {"num_layers": 1025}, "num_layers must be an integer from 1 to 1,024, got 1025"),
        (TEXT, {"vocab_size": 2**40}, "vocab_size must be an integer from 1 to 1,048,576"),
        (TEXT, {"mlp_dim": True}, "mlp_dim must be an integer"),
    ],
)
def test_tower_wrong_size_error(tower, fields, problem):
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(tower, **fields)


def test_clip_config_names_and_overrides(tmp_path):
    assert clip_config("CLIP_ViT_B32", dtype="bfloat16").dtype == jnp.bfloat16
    assert clip_config(checkpoint=tmp_path / "absent") == clip_config("clip_vit_b16")
    with pytest.raises(ValueError, match=f"Unknown CLIP model 'b99'.*{NAMES[0]}"):
        clip_config("b99")
    fields = architecture(clip_config("clip_vit_l14_336", scan_layers=True))
    assert fields == architecture(clip_config("clip_vit_l14_336", dtype="bfloat16"))
    assert fields["image.image_size"] == 336 and fields["activation"] == "quick_gelu"

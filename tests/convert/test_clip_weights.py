"""CLIP folders: outputs equal to Hugging Face's (1e-5), both namings, round trips, and errors.

Default tests read golden files from `tests/golden/make_clip_hf.py`; tests marked `parity` compare
with Hugging Face's own models.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.backbones.clip import CLIP, clip_config, parameter_shapes
from mpt_jax.backbones.clip.config import CLIP_MEAN, architecture
from mpt_jax.convert import clip_names
from mpt_jax.convert.clip import (
    OPEN_CLIP_WEIGHTS,
    load_clip,
    read_clip_config,
    save_clip,
    save_open_clip,
)
from mpt_jax.core.tree import flatten, unflatten
from tests.fixtures.clip_models import TEXT, VIT, features, random_images, random_params, tiny
from tests.fixtures.hf_checkpoints import GOLDEN, write_folder

ACTIVATIONS = ("quick_gelu", "gelu")
WEIGHTS = "model.safetensors"


@pytest.fixture(params=ACTIVATIONS)
def golden(request) -> dict:
    return golden_of(request.param)


def golden_of(activation: str) -> dict:
    return dict(np.load(GOLDEN / f"clip_hf_{activation}.npz"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "hf", golden_of("quick_gelu"))


def check_outputs(found: dict, expected: dict) -> None:
    for name, x in found.items():
        if name.endswith("hidden"):
            tolerance = 1e-5 * float(np.abs(expected[name]).max())
        else:
            tolerance = 1e-5 * max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(x, expected[name], atol=tolerance, rtol=0, err_msg=name)


def check_equal(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def edit(path: Path, change) -> None:
    """Changes the content of a JSON file."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def open_clip_tensors(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CLIP of Hugging Face under OpenAI's names, renamed by text."""
    names = [
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    renamed = {}
    for name, x in hf.items():
        for old, new in names:
            name = name.replace(old, new)
        renamed[name] = x
    renamed["visual.proj"] = renamed.pop("visual_projection.weight").T.copy()
    renamed["text_projection"] = renamed.pop("text_projection.weight").T.copy()
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        joined = name.replace("q_proj.", "in_proj_")
        renamed[joined] = np.concatenate(parts)
    return renamed


def open_clip_folder(folder: Path, hf: Path) -> Path:
    """The model of a Hugging Face folder in the layout of open_clip."""
    save_open_clip(folder, load_clip(hf), read_clip_config(hf))
    save_file(open_clip_tensors(load_file(hf / WEIGHTS)), folder / OPEN_CLIP_WEIGHTS)
    return folder


# --- Hugging Face --------------------------------------------------------------------------------


def test_load_clip_outputs_match_hugging_face(golden, tmp_path):
    folder = write_folder(tmp_path / "hf", golden)
    config = read_clip_config(folder)
    assert config.activation == json.loads(str(golden["config"]))["text_config"]["hidden_act"]
    found = features(
        config, load_clip(folder, config), golden["images"], golden["tokens"], golden["eot"]
    )
    check_outputs(found, golden)


def test_other_activation_changes_outputs(golden, tmp_path):
    folder = write_folder(tmp_path / "hf", golden)
    config = read_clip_config(folder)
    other = tiny(
        image=config.image,
        text=config.text,
        activation={"gelu": "quick_gelu", "quick_gelu": "gelu"}[config.activation],
    )
    inputs = golden["images"], golden["tokens"], golden["eot"]
    found = features(other, load_clip(folder), *inputs)["text_features"]
    assert np.abs(found - golden["text_features"]).max() > 1e-3
    with pytest.raises(ValueError, match=r"activation is '\w+' in the model and '\w+' in"):
        load_clip(folder, other)


def test_save_clip_round_trip_is_exact(golden, tmp_path):
    folder = write_folder(tmp_path / "hf", golden)
    config, params = read_clip_config(folder), load_clip(folder)
    save_clip(tmp_path / "again", params, config, max_shard_bytes=100_000)
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 1
    found = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        found |= load_file(file)
    expected = load_file(folder / WEIGHTS)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in expected.items()}
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    assert read_clip_config(tmp_path / "again") == config
    check_equal(load_clip(tmp_path / "again"), params)
    with pytest.raises(FileExistsError, match="again"):
        save_clip(tmp_path / "again", params, config)


@pytest.mark.parametrize("save", [save_clip, save_open_clip])
@pytest.mark.parametrize("end", [None, 30])
def test_saved_folder_keeps_the_id_of_the_end_of_a_text(save, end, tmp_path):
    """It is in the files, but in neither comparisons nor digests."""
    config = tiny(eos_id=end)
    assert config == tiny() and architecture(config) == architecture(tiny())
    save(tmp_path / "saved", random_params(config), config)
    assert read_clip_config(tmp_path / "saved").eos_id == end
    if save is save_clip:
        fields = json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]
        assert fields["eos_token_id"] == (2 if end is None else end)
    else:
        fields = json.loads((tmp_path / "saved" / "open_clip_config.json").read_text())
        pooling = {"pool_type", "eos_id"} & set(fields["model_cfg"]["text_cfg"])
        assert pooling == (set() if end is None else {"pool_type", "eos_id"})


def test_read_clip_config_without_eos_token_id_has_that_of_transformers(folder, tmp_path):
    edit(folder / "config.json", lambda fields: fields["text_config"].pop("eos_token_id"))
    assert read_clip_config(folder).eos_id == 49407
    # The largest id of a vocabulary needs no field in open_clip.
    config = tiny(eos_id=TEXT.vocab_size - 1)
    save_open_clip(tmp_path / "open", random_params(config), config)
    assert read_clip_config(tmp_path / "open").eos_id is None
    edit(
        tmp_path / "open" / "open_clip_config.json",
        lambda fields: fields["model_cfg"]["text_cfg"].update(pool_type="eos"),
    )
    config = read_clip_config(tmp_path / "open")  # open_clip's default is 2
    with pytest.raises(ValueError, match="texts end at the id 2, but transformers takes .* Keep"):
        save_clip(tmp_path / "hf2", random_params(config), config)


@pytest.mark.parametrize("save", [save_clip, save_open_clip])
def test_save_of_bfloat16_and_other_fields_loads_equal(save, tmp_path):
    config = tiny(
        activation="gelu_tanh",
        layer_norm_epsilon=1e-6,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.6, 0.5, 0.4),
    )
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), random_params(config))
    save(tmp_path / "half", params, config)
    assert read_clip_config(tmp_path / "half") == config
    check_equal(load_clip(tmp_path / "half", config), params)


def test_load_clip_ignores_buffers_and_widens_float16(folder):
    weights = load_file(folder / WEIGHTS)
    half = {name: x.astype(np.float16) for name, x in weights.items()}
    buffers = {
        "text_model.embeddings.position_ids": np.arange(12)[None],
        "vision_model.embeddings.position_ids": np.arange(17)[None],
    }
    save_file({**half, **buffers}, folder / WEIGHTS)
    leaves = flatten(load_clip(folder))
    assert {x.dtype for x in leaves.values()} == {np.dtype("float32")}
    expected = half["text_projection.weight"].astype(np.float32).T
    np.testing.assert_array_equal(leaves["text_encoder/projection/kernel"], expected)


def test_read_clip_config_of_old_file_reads_tower_dicts(folder):
    """transformers prefers `*_config_dict`, as the files of ViT-L/14 have, with its defaults."""

    def change(fields):
        fields["text_config_dict"] = {**fields["text_config"], "num_hidden_layers": 5}
        del fields["text_config_dict"]["max_position_embeddings"]
        fields["vision_config_dict"] = None

    edit(folder / "config.json", change)
    config = read_clip_config(folder)
    assert config.text is not None and config.text.num_layers == 5
    assert config.text.context_length == 77
    assert config.image.num_layers == 2


def test_read_clip_config_reads_preprocessor(folder):
    assert read_clip_config(folder).image_mean == CLIP_MEAN
    fields = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2], "crop_size": 16, "size": 20}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    config = read_clip_config(folder)
    assert (config.image_mean, config.image_std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    path.write_text(json.dumps({**fields, "do_normalize": False}))
    assert read_clip_config(folder).image_std == (1.0, 1.0, 1.0)
    path.write_text(json.dumps({**fields, "size": {"shortest_edge": 16}, "crop_size": None}))
    assert read_clip_config(folder).image_mean == (0.1, 0.2, 0.3)
    path.write_text(json.dumps({**fields, "crop_size": {"height": 16, "width": 32}}))
    with pytest.raises(ValueError, match="images of 16 x 32 pixels, but .* for 16 x 16"):
        read_clip_config(folder)
    path.write_text(json.dumps({**fields, "image_std": [1, 0, 1]}))
    with pytest.raises(ValueError, match=r"image_std\[1\] = 0"):
        read_clip_config(folder)


# --- open_clip and OpenAI ------------------------------------------------------------------------


def test_open_clip_names_load_as_hugging_face(golden, tmp_path):
    hf = write_folder(tmp_path / "hf", golden)
    folder = open_clip_folder(tmp_path / "open", hf)
    assert read_clip_config(folder) == read_clip_config(hf)
    check_equal(load_clip(folder), load_clip(hf))
    path, tensors = folder / OPEN_CLIP_WEIGHTS, load_file(folder / OPEN_CLIP_WEIGHTS)
    # OpenAI's files also hold sizes.
    sizes = {name: np.asarray(9) for name in ("input_resolution", "context_length", "vocab_size")}
    save_file({**tensors, **sizes, "attn_mask": np.zeros((12, 12), np.float32)}, path)
    check_equal(load_clip(folder), load_clip(hf))
    # Models with custom_text have a prefix, and some a linear layer as the projection.
    prefixed = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": x
        for name, x in tensors.items()
    }
    save_file(prefixed, path)
    check_equal(load_clip(folder), load_clip(hf))
    prefixed["text.text_projection.weight"] = prefixed.pop("text.text_projection").T.copy()
    save_file(prefixed, path)
    check_equal(load_clip(folder), load_clip(hf))


def test_save_open_clip_writes_openai_tensors(folder, tmp_path):
    save_open_clip(tmp_path / "open", load_clip(folder), read_clip_config(folder))
    found = load_file(tmp_path / "open" / OPEN_CLIP_WEIGHTS)
    expected = open_clip_tensors(load_file(folder / WEIGHTS))
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_open_clip_unknown_or_unsupported_field_error(folder, tmp_path):
    open_folder = open_clip_folder(tmp_path / "open", folder)
    path = open_folder / "open_clip_config.json"
    text = path.read_text()
    cases = [
        ("vision_cfg", "timm_model_name", "vit_base", "timm_model_name"),
        ("vision_cfg", "attentional_pool", True, "vision_cfg.attentional_pool = true"),
        ("text_cfg", "no_causal_mask", True, "text_cfg.no_causal_mask = true"),
        ("text_cfg", "pool_type", "last", 'text_cfg.pool_type = "last"'),
        ("text_cfg", "layers", 10**6, "text_cfg.layers = 1000000"),
        ("text_cfg", "norm_kwargs", {"eps": 1e-3}, "other norm_kwargs or act_kwargs"),
    ]
    for part, name, value, problem in cases:
        path.write_text(text)
        edit(path, lambda x, p=part, n=name, v=value: x["model_cfg"][p].update({n: v}))
        with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
            load_clip(open_folder)
    path.write_text(text)
    (open_folder / OPEN_CLIP_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="has no open_clip_model.safetensors. Download it"):
        load_clip(open_folder)


# --- ViT -----------------------------------------------------------------------------------------


def vit_folder(folder: Path, params: dict, prefix: str = "") -> Path:
    """A plain ViT with the configuration of `tiny(**VIT)` in the layout of Hugging Face."""
    config = tiny(**VIT)
    folder.mkdir()
    fields = {
        "model_type": "vit",
        "hidden_size": config.image.emb_dim,
        "num_hidden_layers": config.image.num_layers,
        "num_attention_heads": config.image.num_heads,
        "intermediate_size": config.image.mlp_dim,
        "layer_norm_eps": 1e-6,
        "image_size": 16,
        "patch_size": 4,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    leaves, tensors = flatten(params), {}
    for tensor in clip_names.vit_table(config, prefix):
        x = tensor.layout.write([leaves[name] for name in tensor.params])
        tensors[tensor.name] = np.ascontiguousarray(x)
    save_file({**tensors, "pooler.dense.bias": np.zeros(24, np.float32)}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_load_clip_of_vit_loads_equal(prefix, tmp_path):
    params = random_params(tiny(**VIT))
    folder = vit_folder(tmp_path / "vit", params, prefix)
    config = read_clip_config(folder)
    assert config == tiny(**VIT, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    check_equal(load_clip(folder, config), params)
    with pytest.raises(ValueError, match="Only a CLIP with two towers.* has no text tower"):
        save_clip(tmp_path / "again", params, config)


# --- Published models ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_vit_b16", "clip_vit_l14"])
def test_names_and_shapes_match_hugging_face(name):
    expected = json.loads((GOLDEN / "clip_hf_names.json").read_text())[name]
    assert len(expected) == {"clip_vit_b16": 398, "clip_vit_l14": 590}[name]
    config = clip_config(name)
    shapes = parameter_shapes(config)
    table = clip_names.hf_table(config)
    found = {x.name: list(x.layout.shape([shapes[p] for p in x.params])) for x in table}
    assert found == expected
    assert sorted(p for x in table for p in x.params) == sorted(shapes)
    joined = clip_names.open_clip_table(config)
    assert sorted(p for x in joined for p in x.params) == sorted(shapes)
    total = sum(math.prod(x.layout.shape([shapes[p] for p in x.params])) for x in joined)
    assert total == sum(map(math.prod, shapes.values()))


# --- Errors --------------------------------------------------------------------------------------


def test_load_clip_missing_files_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json and no open_clip_config.json"):
        load_clip(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_clip(folder)


def test_load_clip_wrong_weights_error(folder):
    path, weights = folder / WEIGHTS, load_file(folder / WEIGHTS)

    def fails(tensors, problem):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=problem):
            load_clip(folder)

    one = {k: x for k, x in weights.items() if not k.startswith("text_model.")}
    fails(one, "have no text tower: no name starts with text_model.. Save the whole model")
    one = {k: x for k, x in weights.items() if not k.startswith("vision_model.")}
    fails(one, "have no image tower: no name starts with vision_model.")
    norm = "vision_model.pre_layrnorm.bias"
    fails({k: x for k, x in weights.items() if k != norm}, f"1 missing: {norm}")
    fails({**weights, "logit_bias": np.zeros(1, np.float32)}, "1 not expected: logit_bias")
    fails({**weights, norm: np.full(24, np.nan, np.float32)}, "NaN or infinite values")
    fails({**weights, norm: np.zeros(23, np.float32)}, r"expected \(24,\), found \(23,\)")
    fails({**weights, norm: np.zeros(24, np.int32)}, "dtype that is not supported")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated"):
        load_clip(folder)


def test_load_clip_other_patch_size_error(folder):
    other = tiny(image=tiny().image)
    with pytest.raises(ValueError, match="image.mlp_dim is 40 in the model and 96 in the folder"):
        load_clip(folder, other)
    edit(folder / "config.json", lambda x: x["vision_config"].update(patch_size=8))
    with pytest.raises(ValueError, match=r"expected \(24, 3, 8, 8\), found \(24, 3, 4, 4\)"):
        load_clip(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "problem"),
    [
        ("text_config", "vocab_size", 2**50, "text_config.vocab_size = 1125899906842624"),
        ("text_config", "vocab_size", 2**20, r"embedding.weight: expected \(1048576, 16\)"),
        ("text_config", "hidden_size", 2**20, r"expected \(1048576, 1048576\)"),
        ("text_config", "num_hidden_layers", 1024, "missing: text_model.encoder.layers.10.lay"),
        ("text_config", "num_hidden_layers", 10**6, "text_config.num_hidden_layers = 1000000"),
        ("text_config", "hidden_size", "16", 'text_config.hidden_size = "16"'),
        ("text_config", "hidden_act", "relu", "hidden_act=relu for texts and quick_gelu for"),
        ("text_config", "layer_norm_eps", 1e-6, "layer_norm_eps=1e-06 for texts"),
        ("vision_config", "image_size", 2**12 - 4, r"expected \(1046530, 24\), found \(17, 24\)"),
        ("vision_config", "image_size", 2**20, "1048576 pixels cannot be divided"),
        ("vision_config", "num_channels", 4, "vision_config.num_channels = 4"),
        ("vision_config", "num_attention_heads", 5, "num_heads=5 does not divide emb_dim=24"),
        ("vision_config", "patch_size", 0, "vision_config.patch_size = 0"),
        (None, "projection_dim", 2**31, "projection_dim = 2147483648"),
        (None, "projection_dim", 11, r"visual_projection.weight: expected \(11, 24\)"),
        (None, "text_config", [1], "text_config = "),
        (None, "model_type", "clip_vision_model", "only the image tower of a CLIP"),
        (None, "model_type", "clip_text_model", "only the text tower of a CLIP"),
        (None, "model_type", "siglip", "model_type siglip, which is not supported"),
        (None, "model_type", {}, "model_type {}, which is not supported"),
    ],
)
def test_load_clip_wrong_config_error(folder, part, field, value, problem):
    edit(folder / "config.json", lambda x: (x[part] if part else x).update({field: value}))
    with pytest.raises(ValueError, match=problem):
        load_clip(folder)


def test_load_clip_quantized_error(folder):
    edit(folder / "config.json", lambda x: x.update(quantization_config={"quant_method": "mxfp4"}))
    with pytest.raises(ValueError, match="quantization_config"):
        load_clip(folder)


def test_load_clip_unsupported_activation_error(folder):
    def change(fields):
        for part in ("text_config", "vision_config"):
            fields[part]["hidden_act"] = "relu"

    edit(folder / "config.json", change)
    with pytest.raises(ValueError, match="hidden_act=relu, which is not supported. Use a model"):
        load_clip(folder)


def test_save_clip_other_tree_error(folder, tmp_path):
    config, leaves = read_clip_config(folder), flatten(load_clip(folder))
    del leaves["logit_scale"]
    with pytest.raises(
        ValueError, match="The tree to save does not match .*1 missing: logit_scale"
    ):
        save_clip(tmp_path / "out", unflatten(leaves), config)
    assert not (tmp_path / "out").exists()


# --- Comparison with Hugging Face's own models, saved and loaded by its own code -----------------

SMALL = {
    "projection_dim": 48,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
}


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(8, 32), (16, 64)])
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", 2), ("gelu", 400)])
def test_hugging_face_model_both_directions_match_outputs(seed, sizes, activation, eos, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make = _golden_script()
    patch_size, image_size = sizes
    vision = {**SMALL["vision_config"], "patch_size": patch_size, "image_size": image_size}
    model = make.random_model({**SMALL, "vision_config": vision}, activation, eos, seed)
    inputs = make.random_inputs(model, seed)
    model.save_pretrained(tmp_path / "theirs")
    expected = {name: x.numpy() for name, x in make.outputs(model, inputs).items()}
    config, params = read_clip_config(tmp_path / "theirs"), load_clip(tmp_path / "theirs")
    images, tokens, eot = (inputs[name].numpy() for name in ("images", "tokens", "eot"))
    check_outputs(features(config, params, images, tokens, eot), expected)

    save_clip(tmp_path / "ours", params, config)
    back = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    check_outputs({k: x.numpy() for k, x in make.outputs(back, inputs).items()}, expected)
    weights = load_file(tmp_path / "theirs" / WEIGHTS)
    for name, x in load_file(tmp_path / "ours" / WEIGHTS).items():
        np.testing.assert_array_equal(x, weights[name], err_msg=name)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    pixels = processor(images[0], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    normalized = (images[0] / 255 - config.image_mean) / config.image_std
    np.testing.assert_allclose(pixels, normalized, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("classifier", [False, True])
def test_hugging_face_vit_matches_outputs(classifier, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        attn_implementation="eager",
    )
    name = "ViTForImageClassification" if classifier else "ViTModel"
    model = getattr(transformers, name)(shape).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "vit")
    config, params = read_clip_config(tmp_path / "vit"), load_clip(tmp_path / "vit")
    images = random_images(config, 3)
    pixels = torch.tensor((np.asarray(images, np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        whole = (model.vit if classifier else model)(pixels, output_hidden_states=True)
    found, hidden = CLIP(config).apply(
        {"params": params}, images, return_hidden=True, method="encode_image"
    )
    expected = whole.last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    # transformers' last state has passed the output norm.
    for ours, theirs in zip(hidden[:-1], whole.hidden_states[:-1], strict=True):
        theirs = theirs.numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def _golden_script():
    """The script that made the goldens, as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_clip_hf", GOLDEN / "make_clip_hf.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""`mpt-jax convert` and `mpt-jax verify-weights` for CLIP folders."""

import json
import math
import os

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mpt_jax.batching import clip_tokenizer
from mpt_jax.convert import clip_fingerprint, verify
from mpt_jax.convert.clip import OPEN_CLIP_WEIGHTS, load_clip, read_clip_config
from mpt_jax.core.tree import flatten
from tests.fixtures import clip_files, clip_models
from tests.fixtures.hf_checkpoints import GOLDEN, convert, hf_folder, refused, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", dict(np.load(GOLDEN / "clip_hf_quick_gelu.npz")))


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_convert_clip_to_open_clip_and_back_is_identical(folder, tmp_path, capsys):
    convert(folder, tmp_path / "open")
    said = capsys.readouterr().out
    assert "identical; features of a fixed batch differ by at most 0\n" in said
    assert "hf -> open-clip" in said
    assert (tmp_path / "open" / OPEN_CLIP_WEIGHTS).exists()
    convert(tmp_path / "open", tmp_path / "back", "--no-logits")
    assert "open-clip -> hf" in capsys.readouterr().out
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert read_clip_config(tmp_path / "back") == read_clip_config(folder)


def test_converted_clip_has_the_tokenizer_of_its_source(folder, tmp_path, capsys):
    clip_files.write(folder)
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (folder / "notes.txt").touch()
    expected = clip_tokenizer.load(str(folder))
    convert(folder, tmp_path / "open", "--to", "open-clip")
    found = clip_tokenizer.load(str(tmp_path / "open"))
    assert found.identity == expected.identity
    assert (tmp_path / "open" / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert not (tmp_path / "open" / "notes.txt").exists()
    # A download cache has links to files.
    (folder / "merges.txt").rename(tmp_path / "blob")
    (folder / "merges.txt").symlink_to(tmp_path / "blob")
    convert(folder, tmp_path / "again", "--to", "hf", "--no-logits")
    assert clip_tokenizer.load(str(tmp_path / "again")).identity == expected.identity
    assert not (tmp_path / "again" / "merges.txt").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe", "large"])
def test_convert_clip_with_a_tokenizer_that_is_no_small_file_error(kind, folder, tmp_path, capsys):
    path = folder / "merges.txt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 2**28 + 1)  # takes no space on the disk
    said = refused(capsys, folder, tmp_path / "out", "--no-logits")
    assert "merges.txt is not a regular file of at most 268,435,456 bytes" in said
    assert not (tmp_path / "out").exists()


def test_convert_clip_to_bfloat16_rounds(folder, tmp_path, capsys):
    convert(folder, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")
    assert "identical after rounding to bfloat16; features" in capsys.readouterr().out
    assert {str(x.dtype) for x in flatten(load_clip(tmp_path / "half")).values()} == {"bfloat16"}


def test_convert_clip_unsupported_option_or_target_error(folder, tmp_path, capsys):
    target = tmp_path / "out"
    said = refused(capsys, folder, target, "--config", "t5_1_1_base")
    assert "Only conversions of a T5 or of prompts use --config" in said
    said = refused(capsys, folder, target, "--to", "t5x")
    assert "has format 'hf' and cannot be converted to 't5x'" in said
    assert "hf, open-clip for a backbone" in said
    said = refused(capsys, hf_folder(tmp_path / "t5"), target, "--to", "open-clip")
    assert "hf, t5x, orbax for a backbone" in said
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(capsys, folder, target)
    assert not target.exists()
    target.mkdir()
    assert "already exists" in refused(capsys, folder, target)


def differs(folder) -> float:
    return clip_fingerprint.difference(
        epath.Path(folder), read_clip_config(folder), load_clip(folder)
    )


def edit(path, *keys: str, value: object) -> str:
    """Sets a value of a JSON file; returns the earlier content."""
    before = path.read_text()
    fields = json.loads(before)
    place = fields
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(fields))
    return before


def test_fingerprint_is_that_of_the_features(folder):
    """Re-derived with the functions of the network."""
    config, params = read_clip_config(folder), load_clip(folder)
    images = (np.arange(2 * 16 * 16 * 3) * 7919 % 251).reshape(2, 16, 16, 3).astype(np.uint8)
    tokens = (np.arange(24) * 7919 % 40).reshape(2, 12)
    outputs = clip_models.features(config, params, images, tokens, [6, 11])
    image, text = outputs["image_features"], outputs["text_features"]
    norms = [math.sqrt(sum(float(v) ** 2 for v in x)) for x in (*image, *text)]
    cosines = [
        float(np.dot(image[i], text[j])) / norms[i] / norms[2 + j] for i in (0, 1) for j in (0, 1)
    ]
    found = clip_fingerprint.fingerprint(config, params)
    np.testing.assert_allclose(found, [*cosines, *norms], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--dtype", "bfloat16"), marks=pytest.mark.slow)]
)
def test_converted_clip_has_a_fingerprint_that_shows_other_settings(options, folder, tmp_path):
    target = tmp_path / "open"
    convert(folder, target, "--to", "open-clip", *options)
    assert differs(target) < 1e-6
    config = target / "open_clip_config.json"
    for keys, value in [
        (("model_cfg", "quick_gelu"), False),
        (("preprocess_cfg", "mean"), [0.5, 0.5, 0.5]),
        (("preprocess_cfg", "std"), [0.27, 0.26, 0.276]),
    ]:
        before = edit(config, *keys, value=value)
        assert differs(target) > 3 * clip_fingerprint.TOLERANCE, keys
        config.write_text(before)
    edit(target / clip_fingerprint.FILE, "numbers", value=[float("nan")] * 8)
    assert not differs(target) <= clip_fingerprint.TOLERANCE
    convert(folder, tmp_path / "none", "--no-logits")
    assert not (tmp_path / "none" / clip_fingerprint.FILE).exists()


def test_fingerprint_of_vit_has_six_numbers():
    config = clip_models.tiny(**clip_models.VIT)
    found = clip_fingerprint.fingerprint(config, clip_models.random_params(config))
    np.testing.assert_allclose(found[[0, 3]], 1, rtol=1e-6)
    assert found.shape == (6,) and found[1] == pytest.approx(found[2])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"numbers": [1, 2]}', "has 2 numbers, not 8. Convert the model again"),
        ("{}", "lacks numbers. Convert"),
        ('{"numbers": [1, 2, "3"]}', r'numbers\[2\] = "3", but a number'),
        ("[1]", "an object was expected"),
        ('{"numbers": [' + "1, " * 2000 + "1]}", "bytes, and the limit is 4,096"),
        ("{", "is not JSON"),
    ],
)
def test_damaged_fingerprint_error(content, problem, folder):
    (folder / clip_fingerprint.FILE).write_text(content)
    with pytest.raises(ValueError, match=problem):
        differs(folder)


@pytest.mark.parity
def test_verify_weights_compares_the_fingerprint(folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    target = tmp_path / "again"
    convert(folder, target, "--to", "hf")
    assert exit_code(target) == 0
    edit(target / "preprocessor_config.json", "image_std", value=[0.5, 0.5, 0.5])
    capsys.readouterr()
    assert exit_code(target) == 1
    *_, passed, failed = capsys.readouterr().out.splitlines()
    assert passed.startswith("PASS: ours")  # both programs read the same configuration
    assert "Probably the activation or the normalization of images was changed" in failed


@pytest.mark.parity
def test_verify_weights_of_clip_passes_and_detects_change(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert exit_code(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["image", "text", "PASS:"]
    convert(folder, tmp_path / "open", "--to", "open-clip")
    assert exit_code(tmp_path / "open") == 0
    assert exit_code(folder, "--config", "t5_1_1_base") == 2
    read = verify.load_clip

    def read_wrongly(path):
        params = read(path)
        kernel = params["text_encoder"]["projection"]["kernel"]
        params["text_encoder"]["projection"]["kernel"] = kernel * np.float32(1.001)
        return params

    monkeypatch.setattr(verify, "load_clip", read_wrongly)
    assert exit_code(folder) == 1


@pytest.mark.parity
@pytest.mark.parametrize("part", ["text_config", "vision_config", "vision_config_dict"])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal"])
def test_verify_weights_of_clip_whose_tower_names_code_is_compared(part, name, folder, capsys):
    """transformers would download and import the code."""
    pytest.importorskip("transformers")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields[part] = {**fields[part.removesuffix("_dict")], name: "someone/kernel"}
    path.write_text(json.dumps(fields))
    assert exit_code(folder) == 0, capsys.readouterr()


@pytest.mark.parity
def test_verify_weights_of_vit_passes(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    shape = transformers.ViTConfig(hidden_size=24, image_size=16, patch_size=4, **sizes)
    transformers.ViTModel(shape).save_pretrained(tmp_path / "vit")
    assert exit_code(tmp_path / "vit") == 0

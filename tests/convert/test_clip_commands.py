"""`mpt-jax convert` and `mpt-jax verify-weights` for CLIP folders."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpt_jax.batching import clip_tokenizer
from mpt_jax.convert import verify
from mpt_jax.convert.clip import OPEN_CLIP_WEIGHTS, load_clip, read_clip_config
from mpt_jax.core.tree import flatten
from tests.fixtures import clip_files
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

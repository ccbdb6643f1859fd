"""`mpt-jax verify-weights`: passes with equal weights, fails with others, and needs torch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.convert import load_hf, save_hf, save_t5x, verify
from mpt_jax.core.tree import unflatten
from tests.fixtures.hf_checkpoints import hf_folder

# The field, and the attributes that transformers would set from a file.
KERNELS = {
    name: "someone/kernel"
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
}


def random_folder(path: Path, scale: float, **fields: object) -> Path:
    """Writes a random T5 of an odd shape, with an embedding of the given scale."""
    shape = {"num_heads": 3, "num_encoder_layers": 2, "num_decoder_layers": 3, "head_dim": 7}
    config = T5Config(61, **{"emb_dim": 20, "mlp_dim": 33, **shape, **fields})  # pyright: ignore
    rng = np.random.default_rng(0)
    params = {
        name: (scale if "token_embedder" in name else 0.5)
        * rng.standard_normal(size).astype(np.float32)
        for name, size in parameter_shapes(config).items()
    }
    return Path(save_hf(path, config, unflatten(params)))


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_verify_weights_missing_package_exits_with_2(absent, tmp_path, monkeypatch, capsys):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == absent else sys)
    assert exit_code(hf_folder(tmp_path / "hf")) == 2
    assert f"{absent} is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(3.9e-3, 1e-3, 0), (4.2e-3, 1e-3, 1), (1e-5, 0.0, 0), (2e-4, 0.0, 1)]
    + [(float("nan"), 1e-3, 1), (1e-3, float("nan"), 1), (1e-3, float("inf"), 1)],
)
def test_verify_weights_ours_farther_from_float64_or_nan_exits_with_1(
    ours, theirs, expected, tmp_path, monkeypatch, capsys
):
    found = {"logits": verify.Difference(ours, theirs, 7e-3, 1000.0)}
    monkeypatch.setattr(verify, "compare", lambda *_: found)
    assert exit_code(tmp_path) == expected
    printed = capsys.readouterr().out
    assert ("PASS" if expected == 0 else "FAIL") in printed
    for number in (ours, theirs, 7e-3, 1000.0):
        assert f" {number:.3g}" in printed


@pytest.mark.parity
@pytest.mark.parametrize("version", ["1_0", "1_1", "umt5"])
def test_verify_weights_every_t5_version_passes(version, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf", version)
    assert exit_code(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["encoder", "decoder", "logits", "PASS:"]
    checkpoint = save_t5x(tmp_path, load_hf(folder)[1])
    assert exit_code(checkpoint, "--config", folder / "config.json") == 0


@pytest.mark.parity
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"logits_via_embedding": True},
        {"mlp_activations": ("gelu", "linear"), "relative_attention_max_distance": 20},
        {"mlp_activations": ("silu", "linear"), "relative_bias_per_layer": True},
    ],
)
def test_verify_weights_odd_shapes_and_large_scale_pass(fields, scale, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = random_folder(tmp_path / "hf", scale, **fields)
    code = exit_code(folder)
    printed = capsys.readouterr().out
    assert code == 0, printed
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]  # T5 starts with padding
    (folder / "config.json").write_text(json.dumps(config))
    assert exit_code(folder) == 0


@pytest.mark.parity
def test_verify_weights_other_decoder_start_token_exits_with_2(tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 5}))
    assert exit_code(folder) == 2
    assert "decoder_start_token_id=5" in capsys.readouterr().err


def test_folder_for_transformers_names_no_code_at_any_depth(tmp_path):
    nested = {**KERNELS, "num_layers": 2, "others": [1, [{**KERNELS, "eps": None}]]}
    config = {**KERNELS, "text_config": nested, "vision_config_dict": {"deeper": nested}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    verify._link(epath.Path(tmp_path), str(tmp_path / "linked"))
    plain = {"num_layers": 2, "others": [1, [{"eps": None}]]}
    found = json.loads((tmp_path / "linked" / "config.json").read_text())
    assert found == {"text_config": plain, "vision_config_dict": {"deeper": plain}}
    assert (tmp_path / "linked" / "model.safetensors").is_symlink()


@pytest.mark.parity
def test_verify_weights_folder_that_names_code_or_another_model_is_compared(tmp_path, capsys):
    """transformers would import the code, and load the adapter's model instead of the folder's."""
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config |= KERNELS | {"task_specific_params": {"summarization": KERNELS, "others": [[KERNELS]]}}
    (folder / "config.json").write_text(json.dumps(config))
    assert exit_code(folder) == 0, capsys.readouterr()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other")}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert exit_code(folder) == 0, capsys.readouterr()


@pytest.mark.parity
@pytest.mark.parametrize("change", ["zero", "transpose", "perturb"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_verify_weights_other_arithmetic_fails(change, scale, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    folder = random_folder(tmp_path / "hf", scale, emb_dim=21, logits_via_embedding=True)
    read = verify.backbones.read

    def read_wrongly(folder, config):
        shape, params = read(folder, config)
        table = params["encoder"]["relpos_bias"]
        attention = params["decoder"]["layers_1"]["self_attention"]
        if change == "zero":
            table["rel_embedding"] = np.zeros_like(table["rel_embedding"])
        elif change == "transpose":  # 3 heads of width 7: [21, 21]
            attention["query"]["kernel"] = attention["query"]["kernel"].T
        else:
            attention["value"]["kernel"] = attention["value"]["kernel"] * np.float32(1.001)
        return shape, params

    monkeypatch.setattr(verify.backbones, "read", read_wrongly)
    assert exit_code(folder) == 1
    assert "FAIL" in capsys.readouterr().out

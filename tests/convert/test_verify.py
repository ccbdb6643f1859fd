"""`mpt-jax verify-weights`: passes with equal weights, fails with others, and needs torch."""

import sys

import numpy as np
import pytest

from mpt_jax.convert import load_hf, save_t5x, verify
from tests.fixtures.hf_checkpoints import hf_folder


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


def test_verify_weights_difference_or_nan_exits_with_1(tmp_path, monkeypatch, capsys):
    for found, expected in ((9e-5, 0), (1.1e-4, 1), (float("nan"), 1)):
        monkeypatch.setattr(verify, "compare", lambda *_, f=found: {"logits": f})
        assert exit_code(tmp_path) == expected
        assert ("PASS" if expected == 0 else "FAIL") in capsys.readouterr().out


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
def test_verify_weights_other_arithmetic_fails(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf")
    read = verify.backbones.read

    def read_wrongly(folder, config):
        shape, params = read(folder, config)
        params["encoder"]["relpos_bias"]["rel_embedding"] = np.zeros_like(
            params["encoder"]["relpos_bias"]["rel_embedding"]
        )
        return shape, params

    monkeypatch.setattr(verify.backbones, "read", read_wrongly)
    assert exit_code(folder) == 1
    assert "FAIL" in capsys.readouterr().out

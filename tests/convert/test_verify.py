"""`mpt-jax verify-weights`: it passes on the same weights, fails on others, and needs torch."""

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
def test_without_the_oracle_it_says_so(absent, tmp_path, monkeypatch, capsys):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == absent else sys)
    assert exit_code(hf_folder(tmp_path / "hf")) == 2
    assert f"{absent} is not installed" in capsys.readouterr().err


def test_a_difference_is_a_failure_and_so_is_no_number(tmp_path, monkeypatch, capsys):
    for found, expected in ((9e-5, 0), (1.1e-4, 1), (float("nan"), 1)):
        monkeypatch.setattr(verify, "compare", lambda *_, f=found: {"logits": f})
        assert exit_code(tmp_path) == expected
        assert ("PASS" if expected == 0 else "FAIL") in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.parametrize("version", ["1_0", "1_1", "umt5"])
def test_live_every_kind_passes(version, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf", version)
    assert exit_code(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["encoder", "decoder", "logits", "PASS:"]
    checkpoint = save_t5x(tmp_path, load_hf(folder)[1])
    assert exit_code(checkpoint, "--config", folder / "config.json") == 0


@pytest.mark.parity
def test_live_another_arithmetic_fails(tmp_path, monkeypatch, capsys):
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

"""The commands and the configuration in docs/checkpoints.md work."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.backbones.clip import clip_config
from mpt_jax.convert import __main__ as command
from mpt_jax.convert import verify
from mpt_jax.convert.clip import read_clip_config

ROOT = Path(__file__).parents[2]


def test_documented_open_clip_config_is_the_published_model(tmp_path):
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    [block] = re.findall(r"^ {6}\{\n(?: {6}.*\n)+? {6}\}\n", page, re.MULTILINE)
    (tmp_path / "open_clip_config.json").write_text(block)
    assert read_clip_config(tmp_path) == clip_config("clip_vit_b16")
    assert read_clip_config(tmp_path) != clip_config("clip_vit_b32")
    (tmp_path / "open_clip_config.json").write_text(block.replace('"quick_gelu": true,', ""))
    assert read_clip_config(tmp_path).activation == "gelu"


@pytest.mark.slow
def test_checkpoints_docs_commands_work(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    lines = re.findall(r"^    mpt-jax (.+)$", page, re.MULTILINE)
    assert len(lines) > 12
    (tmp_path / "mpt_jax").symlink_to(ROOT / "mpt_jax")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        name, *arguments = shlex.split(line)
        if name == "verify-weights":
            if importlib.util.find_spec("transformers"):
                with pytest.raises(SystemExit) as stopped:
                    verify.main(arguments)
                assert stopped.value.code == 0
            continue
        assert name == "convert"
        command.main(arguments)
        said = capsys.readouterr().out.splitlines()
        assert re.match(r"\d+ leaves, [\d,]+ numbers: identical", said[-2]), line
    # The page's claims about the restored artifacts.
    original = artifacts.load_artifact(ROOT / "mpt_jax/tasks/data/tiny_t5/mpt_source")
    back = artifacts.load_artifact(tmp_path / "runs/out/from_peft")
    assert back.runs == original.runs and back.method == original.method
    for made in ("from_folded", "from_safetensors"):
        found = artifacts.load_artifact(tmp_path / "runs/out" / made)
        row = found.runs.row("toy_qqp")
        assert (found.folded()[row] == original.folded()[original.runs.row("toy_qqp")]).all()

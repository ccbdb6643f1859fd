"""`--help` of train, eval, infer and plan."""

from __future__ import annotations

import re

import pytest

from mpt_jax.config import command_help
from tests.fixtures.processes import ROOT, run_command, run_python


@pytest.mark.parametrize(
    ("entry", "own"),
    [
        ("train", []),
        ("infer", ["--shard_id"]),
        (
            "plan",
            [
                f"--{name}"
                for name in ("json num_microbatches num_partitions steps topology".split())
            ],
        ),
    ],
)
def test_help_lists_every_flag_and_ten_macros(entry, own):
    ended = run_python("-m", f"mpt_jax.{entry}", "--help")
    assert run_command(entry, "-h").stdout == ended.stdout
    source = (ROOT / "mpt_jax" / "config" / "gin_utils.py").read_text()
    defined = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    assert len(defined) >= 11
    listed = re.findall(r"^  (\S+)  +\S", ended.stdout, re.MULTILINE)
    flags = ["--gin.NAME=VALUE", *(f"--{name}" for name in defined), *own]
    assert sorted(name for name in listed if name.startswith("-")) == sorted(flags)
    assert [name for name in listed if name.isupper()] == list(command_help.MACROS)
    assert len(command_help.MACROS) == 10
    assert max(map(len, ended.stdout.splitlines()[2:])) <= command_help.WIDTH


def test_macros_of_help_are_those_of_the_configuration_guide():
    page = (ROOT / "docs" / "configuration.md").read_text()
    (section,) = re.findall(r"## The ten macros people set most\n(.*?)\n## ", page, re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(command_help.MACROS)

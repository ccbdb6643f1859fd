"""The commands of docs/tpu.md and docs/tpu-planning.md: launch scripts as dry runs, plans up to
reading their gin."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks import plan_table
from mpt_jax.config import gin_utils
from mpt_jax.plan import chips
from tests.fixtures.fake_gcloud import ROOT, Clouds
from tests.fixtures.planned_jobs import read_jobs

PAGES = ("tpu.md", "tpu-planning.md")
TEXT = "\n".join((ROOT / "docs" / page).read_text() for page in PAGES)


def commands() -> list[list[str]]:
    """Returns the indented lines as lists of words; joins continued lines."""
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return [
        shlex.split(line.strip().partition("   #")[0])
        for line in lines
        if re.match(r"    (tpu/|mpt-jax|python|\.\.\.|--gin\.)", line)
    ]


SCRIPTS = [words for words in commands() if words[0].startswith("tpu/")]
PLANS = [words for words in commands() if words[:2] == ["mpt-jax", "plan"]]
MORE = [words for words in commands() if words[0] == "..."]
SHAPES = [words for words in commands() if words[0].startswith("--gin.")]


def test_tpu_docs_have_commands_of_every_kind():
    assert [words[0] for words in SCRIPTS] == ["tpu/queued.sh", "tpu/gke.sh", "tpu/xpk.sh"]
    assert len(PLANS) == 2 and len(MORE) == 1 and len(SHAPES) == 2
    tables = [words for words in commands() if words[0] == "python"]
    assert tables == [
        ["python", "-m", "benchmarks.plan_table", "--out", "docs/benchmarks/plan.json"]
    ]
    assert plan_table.ROWS


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: words[0])
def test_launch_scripts_accept_docs_commands(tmp_path, words):
    script, *arguments = [word.replace("BUCKET", "bucket") for word in words]
    where = arguments.index("--")
    done = Clouds(tmp_path).launch(
        script.removeprefix("tpu/"), *arguments[:where], "--dry-run", *arguments[where:]
    )
    assert done.returncode == 0, done.stderr
    assert "mpt_jax.train" in done.stdout and "gin/mpt_source.gin" in done.stdout


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """Returns {flag: values}."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, value = word.partition("=")
        found.setdefault(name.removeprefix("--"), []).append(value)
    return found


def test_docs_plan_commands_read_their_gin():
    given = []
    for words in PLANS:
        arguments = gin_utils.rewrite_gin_args(words[2:] + SHAPES[0] + SHAPES[1])
        bindings = [a.partition("=")[2] for a in arguments if a.startswith("--gin_bindings=")]
        flags = flags_of(arguments)
        given.append((flags["gin_file"], bindings))
        assert all(chips.topologies(topology) for topology in flags["topology"])
    assert [found[:3] for found in read_jobs(*given)] == [[[1, 4, 4], [2, 1, 1], 2]] * len(PLANS)


def test_docs_further_flags_exist_in_plan_command():
    source = (ROOT / "mpt_jax" / "plan" / "__main__.py").read_text()
    for name in flags_of(MORE[0][1:]):
        assert re.search(rf'DEFINE_\w+\(\s*"{name}"', source), name

"""Every row of docs/study/ablations.md is a command that parses and builds its model."""

from __future__ import annotations

import importlib
import json
import re
import shlex

import gin
import pytest

from mpt_jax.config import gin_utils, trainer_choice
from tests.fixtures.gin_files import ROOT, VOCABULARY, value

PAGE = (ROOT / "docs" / "study" / "ablations.md").read_text()


def lines() -> list[tuple[str, str, str]]:
    """Returns (row, stage file, added arguments) of every table."""
    rows = []
    for section in PAGE.split("\n## ")[1:]:
        stage = re.search(r"\(`(gin/[a-z_]+\.gin)`\)", section.splitlines()[0])
        for line in re.findall(r"^\| (?!row|-)(.*) \|$", section, re.M):
            name, *cells, _ = [cell.strip() for cell in line.split("|")]
            file = stage[1] if stage else cells.pop(0).strip("`")
            rows.append((name, file, cells[0].strip("`")))
    return rows


def test_ablations_page_all_rows_are_parsed():
    assert len(lines()) == 31 + 13 + 9 + 7 + 11 + 25


@pytest.mark.parametrize(("name", "stage", "added"), lines(), ids=lambda x: str(x)[:40])
def test_ablations_row_parses_as_command(name, stage, added):
    trainer_choice.install_fallback()
    arguments = gin_utils.rewrite_gin_args(shlex.split(added))
    files = [stage, *(x.partition("=")[2] for x in arguments if x.startswith("--gin_file="))]
    bindings = [x.partition("=")[2] for x in arguments if x.startswith("--gin_bindings=")]
    with gin_utils.as_main(importlib.import_module("mpt_jax.train")):
        gin_utils.parse(files, [*bindings, VOCABULARY], (str(ROOT),))
        assert value("MODEL").runs.num_rows
    gin.clear_config()


@pytest.mark.slow
def test_adafactor_job_trains_and_writes_its_record(tmp_path):
    """The record is JSON, although the rule of the optimizer is a function."""
    bindings = ["TRAIN_STEPS = 2", "EVAL_PERIOD = 2", "EVAL_STEPS = 1", "BATCH_SIZE = 4"]
    bindings += ["EVALUATOR_NUM_EXAMPLES = 4", f"ROOT = {str(tmp_path)!r}"]
    files = ["gin/pt_target.gin", "gin/tiny.gin", "gin/ablations/adafactor.gin"]
    gin_utils.run_stage(files, bindings)
    gin.clear_config()
    record = json.loads((tmp_path / "pt_target" / "run.jsonl").read_text())
    assert record["trainable_parameters"] == 20 * 128
    assert "adafactor" in json.dumps(record)

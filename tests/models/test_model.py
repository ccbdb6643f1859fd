"""The base class of models: trainers, checkpoints and artifacts use no names of texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "mpt_jax"
TEXT_ONLY = re.compile(r"encoder_input_tokens|encoder_task_ids|PromptedEncoderDecoder")
PLACES = ("training", "checkpointing", "t5x_compat", "artifacts", "evaluation/finalize.py")
MAY = ("teacher_cache.py",)  # distillation is for texts only


@pytest.mark.parametrize("place", PLACES)
def test_sources_name_no_text_features(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    found = {
        f"{file.name}:{number}: {line.strip()}"
        for file in files
        if file.name not in MAY
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if TEXT_ONLY.search(line)
    }
    assert not found

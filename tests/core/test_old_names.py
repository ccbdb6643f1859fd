"""Old names of version 0.1 mapped to current ones: keys, words and folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core import old_names

BEFORE = Path(__file__).resolve().parents[1] / "golden" / "before_packages"


def test_current_keys_nested_value_renames_keys_only():
    old = {"started_from": {"artefact_sha256": "x"}, "list": [{"normalise": "artefact_sha256"}]}
    new = {"started_from": {"artifact_sha256": "x"}, "list": [{"normalize": "artefact_sha256"}]}
    assert old_names.current_keys(old) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('INITIAL_ARTEFACT = "r/pt/artefact"', 'INITIAL_ARTIFACT = "r/pt/artifact"'),
        ('["tasks.others", "tasks.toy"]', '["mpt_jax.tasks.mpt_others", "mpt_jax.tasks.toy"]'),
        ('["my.tasks.toy", "tasks.toys"]', '["my.tasks.toy", "tasks.toys"]'),
    ],
)
def test_current_text_whole_words_only_renamed(old, new):
    assert old_names.current_text(old) == new


@pytest.mark.parametrize("name", ["artifact", "artifacts/rte_s0"])
def test_existing_folder_without_new_name_returns_old_name(name, tmp_path):
    old = tmp_path / name.replace("artifact", "artefact")
    old.mkdir(parents=True)
    assert old_names.existing_folder(tmp_path / name) == old
    (tmp_path / name).mkdir(parents=True)
    assert old_names.existing_folder(tmp_path / name) == tmp_path / name


def test_load_artifact_folder_with_old_name_loads(tmp_path):
    shutil.copytree(BEFORE / "mpt_target", tmp_path / "run")
    found = artifacts.load_artifact(tmp_path / "run" / "artifact")
    saved = json.loads((tmp_path / "run" / "artefact" / "config.json").read_text())
    assert (
        found.config["started_from"]["artifact_sha256"]
        == (saved["started_from"]["artefact_sha256"])
    )

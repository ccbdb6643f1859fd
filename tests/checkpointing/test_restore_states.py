"""Paths that evaluation and inference read prompts from."""

from __future__ import annotations

import pytest

from mpt_jax.checkpointing import restore_states
from mpt_jax.checkpointing.checkpoint_config import RestoreCheckpointConfig


@pytest.mark.parametrize("mode", ["specific", "latest"])
def test_checkpoint_path_of_an_artifact_raises_with_initial_artifact(tmp_path, mode):
    (tmp_path / "prompts.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="is a prompt artifact, .* Set INITIAL_ARTIFACT to"):
        restore_states._wanted(RestoreCheckpointConfig(str(tmp_path), mode))

"""The digest of the backbone's weights, compared when a job resumes or a checkpoint is read."""

from __future__ import annotations

import pytest

from mpt_jax.checkpointing.fingerprint import check_can_restore, check_can_resume

OURS = {"embedding_sha256": "e", "backbone_sha256": "b", "random_seed": 0}


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_other_weights_same_embedding_error_shows_both(check):
    with pytest.raises(ValueError, match="RUN .*backbone_sha256: saved 'a', current 'b'"):
        check(OURS, OURS | {"backbone_sha256": "a"}, "RUN")


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
@pytest.mark.parametrize("saved", [{}, {"backbone_sha256": None}])
def test_check_saved_without_digest_compares_embedding_and_warns(check, saved, caplog):
    old = {"embedding_sha256": "e", "random_seed": 0} | saved
    with caplog.at_level("WARNING", logger="absl"):
        check(OURS, old, "RUN")
    (warning,) = caplog.messages
    assert warning.startswith("RUN records no backbone_sha256") and "only the" in warning
    with pytest.raises(ValueError, match="embedding_sha256: saved 'f', current 'e'"):
        check(OURS, old | {"embedding_sha256": "f"}, "RUN")


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_digest_switched_off_compares_embedding(check, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        check(OURS | {"backbone_sha256": None}, OURS, "RUN")
    assert not caplog.messages, "switching it off was logged when the backbone was loaded"

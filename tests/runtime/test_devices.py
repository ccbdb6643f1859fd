"""Devices that JAX cannot use."""

from __future__ import annotations

import jax
import pytest

from mpt_jax.runtime import devices


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("No visible CUDA devices.")])
def test_devices_that_are_missing_raise_with_their_setting(monkeypatch, error):
    def missing():
        raise error

    devices.check()
    monkeypatch.setattr(jax, "devices", missing)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "cuda")
        with pytest.raises(ValueError, match=f"for JAX_PLATFORMS='cuda' .* Unset .*{error}"):
            devices.check()
    finally:
        jax.config.update("jax_platforms", before)

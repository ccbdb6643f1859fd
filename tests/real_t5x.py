"""What every test that needs the real T5X is marked with."""

from __future__ import annotations

import pytest

from mpt_jax import t5x_import

NEEDED = [
    pytest.mark.t5x,
    pytest.mark.slow,
    pytest.mark.skipif(
        t5x_import.find_real() is None,
        reason="the real T5X is not importable here; put a clone of it on PYTHONPATH",
    ),
]

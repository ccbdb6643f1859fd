"""T5X's learning-rate factors against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_jax.t5x_compat.t5x_schedules import create_learning_rate_scheduler

# (factors, arguments, step, value)
CASES = [
    ("constant", {"base_learning_rate": 0.3}, 7, 0.3),
    ("linear_warmup", {"warmup_steps": 10}, 4, 0.4),
    ("linear_warmup", {"warmup_steps": 10}, 40, 1.0),
    ("constant * rsqrt_decay", {"base_learning_rate": 1.0, "warmup_steps": 100}, 9, 0.1),
    ("constant * rsqrt_decay", {"base_learning_rate": 1.0, "warmup_steps": 100}, 400, 0.05),
    ("rsqrt_normalized_decay", {"warmup_steps": 100}, 400, 0.5),
    ("decay_every", {"decay_factor": 0.5, "steps_per_decay": 10}, 25, 0.25),
    ("cosine_decay", {"warmup_steps": 10, "steps_per_cycle": 100}, 60, 0.5),
    ("cosine_decay", {"warmup_steps": 10, "steps_per_cycle": 100}, 5, 1.0),
    ("linear_decay", {"base_learning_rate": 2.0, "warmup_steps": 10, "decay_factor": 0.1}, 5, 1.0),
    ("linear_decay", {"base_learning_rate": 2.0, "warmup_steps": 10, "decay_factor": 0.1}, 15, 1.0),
    ("constant", {"base_learning_rate": 0.0, "min_learning_rate": 1e-6}, 3, 1e-6),
    ("linear_warmup", {"warmup_steps": 10, "step_offset": 100}, 104, 0.4),
]


@pytest.mark.parametrize(("factors", "arguments", "step", "value"), CASES)
def test_learning_rate_scheduler_factors_match_by_hand(factors, arguments, step, value):
    found = create_learning_rate_scheduler(factors, **arguments)(step)
    np.testing.assert_allclose(found, value, rtol=1e-6)


def test_learning_rate_scheduler_unknown_factor_suggests_closest():
    with pytest.raises(ValueError, match="linear_warmup"):
        create_learning_rate_scheduler("linear_warmpu")

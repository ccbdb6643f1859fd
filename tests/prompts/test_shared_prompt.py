"""Tests of the shared prompt's transfer."""

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.shared_prompt import SharedPrompt

P, H = 3, 5
SOURCES = Runs(["a", "b", "c"])
NEW = Runs(["x", "y"], groups="independent")
RNG = np.random.default_rng(0)
FACTORS = {
    "shared": RNG.normal(size=(1, P, H)).astype(np.float32),
    "task_left": RNG.normal(size=(3, P, 1)).astype(np.float32),
    "task_right": RNG.normal(size=(3, 1, H)).astype(np.float32),
}
PRODUCTS = FACTORS["shared"] * FACTORS["task_left"] * FACTORS["task_right"]


@pytest.mark.parametrize(
    ("start_from", "expected"),
    [
        ("shared", FACTORS["shared"][0]),
        ("average", PRODUCTS.mean(0)),
        ("b", PRODUCTS[1]),
    ],
)
def test_shared_prompt_transfer_start_from_sets_every_group(start_from, expected):
    made = SharedPrompt(P, start_from=start_from).transfer(FACTORS, MPT(P), SOURCES, NEW)
    np.testing.assert_allclose(made["shared"], np.stack([expected, expected]), rtol=1e-6)


def test_shared_prompt_transfer_own_artifact_unchanged():
    runs = Runs(["a", "b", "c"], groups=(0, 1, 0))
    own = {"shared": RNG.normal(size=(2, P, H)).astype(np.float32)}
    method = SharedPrompt(P, start_from="same")
    np.testing.assert_array_equal(method.transfer(own, method, runs, runs)["shared"], own["shared"])


def test_shared_prompt_transfer_without_one_shared_matrix_raises():
    method = SharedPrompt(P, start_from="shared")
    with pytest.raises(ValueError, match="'prompt_tuning' has none"):
        method.transfer({"table": np.ones((3, P, H))}, PromptTuning(P), SOURCES, NEW)
    two = {**FACTORS, "shared": np.ones((2, P, H), np.float32)}
    with pytest.raises(ValueError, match="'mpt' has 2"):
        method.transfer(two, MPT(P), Runs(["a", "b", "c"], groups=(0, 1, 1)), NEW)

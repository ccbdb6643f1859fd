"""The examples of CONTRIBUTING.md run as they are."""

from __future__ import annotations

import re

from tests.fixtures.processes import ROOT, run_script

# Runs in a separate process, because methods and tasks are registered globally.
CHECKS = """
import jax, numpy as np
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.prompts import get_method
from mpt_jax.prompts.base import InitContext, PromptMethod, row_axes
from mpt_jax.prompts.materialize import materialize
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.schedules import Schedule
from mpt_jax.core.runs import Runs

runs = Runs(["my_sst2", "another"])
method = get_method("scaled_prompt")(prompt_length=3)
assert isinstance(method, PromptMethod)
context = InitContext(jax.random.normal(jax.random.PRNGKey(0), (5000, 4)))
params = method.init(jax.random.PRNGKey(1), runs, context)
params["scale"] = params["scale"] * 2
folded = materialize(method, params, runs)
np.testing.assert_allclose(folded, 2 * params["table"], atol=1e-6)
moved = method.transfer(params, method, Runs(["my_sst2"]), Runs(["new"]))
assert moved["table"].shape == (1, 3, 4)

labels = (("prompt/table", "task"), ("prompt/scale", "scale"))
rates = {"task": Schedule(0.1, decay="constant"), "scale": Schedule(0.2, decay="constant")}
apart = Runs(runs.task_names, groups="independent")
optimizer = PromptOptimizer(rates, weight_decay=0.0, absent_tasks="hold")
optimizer = optimizer.bind(labels, apart, row_axes(method))
grads = {"table": np.zeros((2, 3, 4)), "scale": np.array([0.0, -0.5])}
tree = {"prompt": params}
updates, _ = optimizer.update({"prompt": grads}, optimizer.init(tree), tree)
np.testing.assert_allclose(updates["prompt"]["scale"], [0, 0.2], atol=1e-5)
assert not updates["prompt"]["table"].any()

lengths = {"inputs": 16, "targets": 12}
dataset = seqio.get_mixture_or_task("my_sst2").get_dataset(lengths, split="train", shuffle=False)
converter = PromptFeatureConverter(prompt_length=3, runs=runs)
row = next(converter(dataset, lengths).as_numpy_iterator())
assert row["encoder_prompt_slots"].tolist()[:5] == [1, 2, 3, 0, 0]
assert VOCABULARY.decode(row["decoder_target_tokens"].tolist()).startswith("positive")
"""


def test_contributing_examples_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    run_script("\n".join([*blocks, CHECKS]))

"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): one trainable matrix [P, H] per task.

If prompts start from source prompts, this is SPoT (Vu et al. 2022, arXiv 2110.07904); `spot.py`
chooses the sources. Runs share no parameters, even within a group.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mpt_jax.prompts.base import NO_CONTEXT, PromptMethod, register
from mpt_jax.prompts.init import PromptInits, SampledVocabulary, initial_prompts
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.row_ops import gather_rows
from mpt_jax.prompts.warm_start import StartFrom, source_weights, weighted_mean


@register
@dataclasses.dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """`P_k = table[k]`.

    Attributes:
        prompt_length: P.
        init_prompt: the initializer of each run's prompt.
        start_from: a setting of `warm_start`. Only a table of weights or a `NearestSource` may mix
            different prompts, so `'average'` needs an initial artifact whose prompts are all equal.
    """

    prompt_length: int
    init_prompt: PromptInits = SampledVocabulary()
    start_from: StartFrom = "average"

    name = "prompt_tuning"
    labels = ((r"table", "task"),)
    axes = {"table": ("tasks", "prompt", "embed")}

    def init(self, key, runs, context):
        rows = range(runs.num_rows)
        table = initial_prompts(self.init_prompt, key, runs, rows, self.prompt_length, context)
        return {"table": table}

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        return gather_rows(params["table"], task_ids)

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts from the plain prompts of any artifact."""
        prompts = np.asarray(materialize(source_method, source, source_runs))
        weights = source_weights(self.start_from, source_runs, runs)
        if isinstance(self.start_from, str):
            _refuse_mixing(weights, prompts, source_runs)
        return {"table": weighted_mean(weights, prompts)}

    def config(self):
        return {"prompt_length": self.prompt_length}


def _refuse_mixing(weights, prompts, source_runs):
    """Raises ValueError if a run would start from several different prompts.

    Several equal prompts, as in an artifact of one shared prompt, are accepted.
    """
    for row in weights:
        chosen = prompts[row > 0]
        if (chosen != chosen[0]).any():
            raise ValueError(
                "Prompt tuning starts each run from one source prompt, but the initial artifact "
                f"holds {source_runs.num_rows} prompts: "
                f"{', '.join(source_runs.run_names)}. Set START_FROM to one of these names, or to "
                "a table of weights to mix them."
            )

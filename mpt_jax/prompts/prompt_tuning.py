"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): one free matrix [P, H] for each task.

Started from source prompts it is SPoT (Vu et al. 2022, arXiv 2110.07904; `spot.py` chooses them).
Each run is its own group of parameters, whatever the groups of the bank; tasks share nothing.
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
        init_prompt: initial value of each row's prompt.
        start_from: with an initial artifact, the run whose prompt every row starts from, `'same'`
            (each row takes the artifact's row of its own name), a table of weights by run, or
            a choice by similarity. Prompts are mixed only where weights say so.
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
        """Any method's artifact will do: its folded prompts are the start."""
        folded = np.asarray(materialize(source_method, source, source_runs))
        weights = source_weights(self.start_from, source_runs, runs)
        if isinstance(self.start_from, str):
            _refuse_mixing(weights, folded, source_runs)
        return {"table": weighted_mean(weights, folded)}

    def config(self):
        return {"prompt_length": self.prompt_length}


def _refuse_mixing(weights, folded, source_runs):
    """Raises where a row would start from several prompts that differ (those of a prompt that tasks
    share do not)."""
    for row in weights:
        chosen = folded[row > 0]
        if (chosen != chosen[0]).any():
            raise ValueError(
                "Prompt tuning starts from one source prompt, and the artifact holds "
                f"{source_runs.num_rows}: {', '.join(source_runs.run_names)}. Set start_from to "
                "one, or to the weights to mix them by."
            )

"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): one free matrix [P, H] for each task.

Started from another task's prompt it is SPoT (Vu et al. 2022, arXiv 2110.07904). Each run is
its own group of parameters, whatever the groups of the bank; tasks share nothing.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mpt_jax.prompts.base import fold, name_key, register, source_rows
from mpt_jax.prompts.init import PromptInit, SampledVocabulary


@register
@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """`P_k = table[k]`.

    Attributes:
        prompt_length: P.
        init_prompt: initial value of each row's prompt.
        start_from: with an initial artefact, the run whose prompt every row starts from (or
            `'same'`: each row takes the artefact's row of its own name).
    """

    prompt_length: int
    init_prompt: PromptInit = SampledVocabulary()
    start_from: str = "average"

    name = "prompt_tuning"
    labels = ((r"table", "task"),)
    axes = {"table": ("tasks", "prompt", "embed")}

    def init(self, key, runs, context):
        rows = [
            self.init_prompt(name_key(key, run), task, self.prompt_length, context)
            for run, task in zip(runs.run_names, runs.task_names, strict=True)
        ]
        return {"table": jnp.stack(rows)}

    def compose(self, params, runs, task_ids):
        return params["table"][task_ids]

    def compose_rows(self, params, runs, task_ids, slots):
        return params["table"][task_ids, jnp.maximum(slots - 1, 0)]

    def transfer(self, source, source_method, source_runs, runs):
        """Any method's artefact will do: its folded prompt of one row is the start."""
        folded = fold(source_method, source, source_runs)
        if self.start_from == "same":
            return {"table": folded[jnp.asarray([source_runs.row(r) for r in runs.run_names])]}
        row = source_rows(source_runs, self.start_from, named_only=True)[0]
        return {"table": jnp.repeat(folded[row][None], runs.num_rows, axis=0)}

    def config(self):
        return {"prompt_length": self.prompt_length}

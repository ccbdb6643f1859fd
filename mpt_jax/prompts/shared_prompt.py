"""One prompt per group of tasks, [G, P, H], without task-specific parameters.

Trained on a mixture, it is SPoT's generic source prompt (Vu et al. 2022, arXiv 2110.07904). In the
MPT paper's ablation (arXiv 2303.02861) it is the student without decomposition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from mpt_jax.prompts.base import NO_CONTEXT, PromptMethod, register, source_rows
from mpt_jax.prompts.init import PromptInits, SampledVocabulary, initial_prompts
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.row_ops import first_row_of_groups, gather_rows
from mpt_jax.prompts.spot import SourceTable
from mpt_jax.prompts.warm_start import group_weights, source_weights, weighted_mean

SHARED = "shared"


@register
@dataclasses.dataclass(frozen=True)
class SharedPrompt(PromptMethod):
    """`P_k = shared[group of k]`.

    Attributes:
        prompt_length: P.
        init_prompt: the initializer of each group's prompt.
        start_from: the prompt of the initial artifact to start from: `'average'` (the mean over
            all runs), the name of one run, `'same'` (for each group, the run with the name of the
            group's first run), `'shared'` (the prompt that the artifact's tasks share; for MPT, P*
            without factors), or a table of weights by run (`warm_start`), whose mean over the
            runs of a group is taken.
    """

    prompt_length: int
    init_prompt: PromptInits = SampledVocabulary()
    start_from: str | SourceTable = "average"

    name = "shared_prompt"
    labels = ((r"shared", "shared"),)
    axes = {"shared": ("groups", "prompt", "embed")}

    def init(self, key, runs, context):
        leaders = first_row_of_groups(runs)
        shared = initial_prompts(self.init_prompt, key, runs, leaders, self.prompt_length, context)
        return {"shared": shared}

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        return gather_rows(params["shared"], jnp.asarray(runs.group_of_row)[task_ids])

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts from any method's artifact; `'shared'` requires one with a shared prompt."""
        if self.start_from == SHARED:
            return {"shared": self._repeat(_shared(source, source_method), runs)}
        prompts = materialize(source_method, source, source_runs)
        if self.start_from == "same":
            names = [runs.run_names[row] for row in first_row_of_groups(runs)]
            return {"shared": prompts[jnp.asarray([source_runs.row(name) for name in names])]}
        if isinstance(self.start_from, Mapping):
            weights = group_weights(source_weights(self.start_from, source_runs, runs), runs)
            return {"shared": weighted_mean(weights, prompts)}
        rows = jnp.asarray(source_rows(source_runs, self.start_from))
        return {"shared": self._repeat(prompts[rows].mean(0), runs)}

    def _repeat(self, prompt, runs):
        return jnp.repeat(prompt[None], runs.num_groups, axis=0)

    def config(self):
        return {"prompt_length": self.prompt_length}


def _shared(source, source_method):
    """Returns the shared prompt [P, H] of an artifact that has exactly one."""
    shared = source.get("shared")
    if shared is None or len(shared) != 1:
        count = "none" if shared is None else len(shared)
        raise ValueError(
            "START_FROM = 'shared' needs an initial artifact with exactly one shared prompt, but "
            f"the artifact of the method {source_method.name!r} has {count}. Set START_FROM to "
            "'average' or to the name of one of the artifact's runs."
        )
    return jnp.asarray(shared[0])

"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861), with factors of any rank.

    P_k = P* o (U_k V_k)                                   paper equation (2), rank R = 1

`P* [P, H]` is shared by the tasks of a group; `U_k [P, R]` and `V_k [R, H]` are specific to task
k. The product is elementwise (`o`). As in the paper, a new task starts from P* and the averages of
the source tasks' factors: mean(U) and mean(V), not the mean of the products. The factors are
aligned before they are averaged (`factors`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import unknown_name
from mpt_jax.prompts import factors
from mpt_jax.prompts.base import FLOAT32, NO_CONTEXT, PromptMethod, name_key, register
from mpt_jax.prompts.init import (
    FactorInit,
    PromptInits,
    SampledVocabulary,
    initial_prompts,
    ones_noise,
)
from mpt_jax.prompts.row_ops import first_row_of_groups, gather_rows
from mpt_jax.prompts.warm_start import StartFrom, shared_groups, source_weights, weighted_mean

AVERAGES = ("factors", "products")


@register
@dataclasses.dataclass(frozen=True)
class MPT(PromptMethod):
    """`P_k = shared[group of k] o (task_left[k] @ task_right[k])`.

    Parameters: `shared` [G, P, H], `task_left` [K, P, R], `task_right` [K, R, H].

    Attributes:
        prompt_length: P.
        rank: R.
        init_prompt: the initializer of P*; a group starts from the value for its first run.
        init_factors: the initializer of a task's factors.
        start_from: the runs of the initial artifact whose factors are averaged: `'average'` (all
            runs, as in the paper), the name of one run, `'same'` (the run of the same name),
            `'same_or_average'` (all runs if none has the same name), a table of weights by run,
            or a `NearestSource`. P* is always copied.
        average_of: what is averaged if a run starts from several runs: `'factors'` (as in the
            paper) or `'products'`, of whose mean the closest factors of rank R are taken.

    Raises:
        ValueError: the rank is less than 1, or `average_of` is unknown.
    """

    prompt_length: int
    rank: int = 1
    init_prompt: PromptInits = SampledVocabulary()
    init_factors: FactorInit = ones_noise
    start_from: StartFrom = "average"
    average_of: str = "factors"

    name = "mpt"
    labels = ((r"shared", "shared"), (r"task_(left|right)", "task"))
    axes = {
        "shared": ("groups", "prompt", "embed"),
        "task_left": ("tasks", "prompt", "rank"),
        "task_right": ("tasks", "rank", "embed"),
    }

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"MPT.rank must be at least 1, got {self.rank}. Raise RANK.")
        if self.average_of not in AVERAGES:
            raise ValueError(unknown_name("AVERAGE_OF", self.average_of, AVERAGES))

    def init(self, key, runs, context):
        width = context.embedding.shape[1]
        shared = initial_prompts(
            self.init_prompt, key, runs, first_row_of_groups(runs), self.prompt_length, context
        )
        pairs = [
            self.init_factors(name_key(key, run), self.prompt_length, width, self.rank)
            for run in runs.run_names
        ]
        return {
            "shared": shared,
            "task_left": jnp.stack([left for left, _ in pairs]),
            "task_right": jnp.stack([right for _, right in pairs]),
        }

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        left, right = (
            gather_rows(params["task_left"], task_ids),
            gather_rows(params["task_right"], task_ids),
        )
        # For rank one, a matrix product is not faster than this broadcast product.
        update = left * right if self.rank == 1 else jnp.matmul(left, right, precision=FLOAT32)
        if runs.num_groups == 1:
            return jnp.broadcast_to(params["shared"][0], update.shape) * update
        return gather_rows(params["shared"], jnp.asarray(runs.group_of_row)[task_ids]) * update

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        if source_method.name != self.name:
            raise ValueError(
                "MPT starts only from an MPT artifact, but the initial artifact has the method "
                f"{source_method.name!r}, which has no factors. Set INITIAL_ARTIFACT to one MPT "
                "artifact, such as the one that gin/mpt_source.gin writes. A list of artifacts is "
                "combined into plain prompts, which have no factors."
            )
        weights = source_weights(self.start_from, source_runs, runs)
        groups = shared_groups(weights, source_runs, runs)
        left, right = self._averages(weights, source["task_left"], source["task_right"])
        shared = jnp.asarray(source["shared"])[jnp.asarray(groups)]
        return {"shared": shared, "task_left": left, "task_right": right}

    def _averages(self, weights, left, right):
        """Returns the factors that K runs start from, given weights [K, S] of S source runs.

        A run that starts from one source run gets its factors unchanged, unless their rank changes.
        """
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        if self.average_of == "products":
            product = np.asarray(weighted_mean(weights, left @ right))
            found = factors.best_factors(product, self.rank)
            if left.shape[-1] != self.rank:
                return [jnp.asarray(x, jnp.float32) for x in found]
        else:
            found = [weighted_mean(weights, x) for x in factors.aligned(left, right)]
        is_single = (weights > 0).sum(1) == 1
        copies = [weighted_mean(weights, x) for x in (left, right)]
        return [
            jnp.where(is_single[:, None, None], copy, jnp.asarray(x, jnp.float32))
            for copy, x in zip(copies, found, strict=True)
        ]

    def statistics(self, params, runs):
        return factors.statistics(params, runs)

    def config(self):
        return {"prompt_length": self.prompt_length, "rank": self.rank}

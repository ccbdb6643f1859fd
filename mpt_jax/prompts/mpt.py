"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861), with factors of any rank.

    P_k = P* o (U_k V_k)                                   paper equation (2), rank R = 1

`P* [P, H]` is shared by the tasks of a group, `U_k [P, R]` and `V_k [R, H]` belong to task k. The
product is elementwise (`o`). A new task starts from P* and from the averages of the source
tasks' factors: mean(U) and mean(V), not the mean of the products, as in the paper.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mpt_jax.prompts.base import group_leaders, name_key, register, source_rows
from mpt_jax.prompts.init import FactorInit, PromptInit, SampledVocabulary, ones_noise

# Prompts are composed in float32; by default a TPU would multiply in bfloat16.
FLOAT32 = jax.lax.Precision.HIGHEST


@register
@dataclasses.dataclass(frozen=True)
class MPT:
    """`P_k = shared[group of k] o (task_left[k] @ task_right[k])`.

    Parameters: `shared` [G, P, H], `task_left` [K, P, R], `task_right` [K, R, H].

    Attributes:
        prompt_length: P.
        rank: R.
        init_prompt: initial value of P*.
        init_factors: initial value of a task's factors.
        start_from: with an initial artefact, `'average'` of its tasks' factors (the paper),
            the name of the one run to take them from, or `'same'` (each row its namesake's).
    """

    prompt_length: int
    rank: int = 1
    init_prompt: PromptInit = SampledVocabulary()
    init_factors: FactorInit = ones_noise
    start_from: str = "average"

    name = "mpt"
    labels = ((r"shared", "shared"), (r"task_(left|right)", "task"))
    axes = {
        "shared": ("groups", "prompt", "embed"),
        "task_left": ("tasks", "prompt", "rank"),
        "task_right": ("tasks", "rank", "embed"),
    }

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")

    def init(self, key, runs, context):
        width = context.embedding.shape[1]
        shared = [
            self.init_prompt(
                name_key(key, runs.run_names[row]),
                runs.task_names[row],
                self.prompt_length,
                context,
            )
            for row in group_leaders(runs)
        ]
        factors = [
            self.init_factors(name_key(key, run), self.prompt_length, width, self.rank)
            for run in runs.run_names
        ]
        return {
            "shared": jnp.stack(shared),
            "task_left": jnp.stack([left for left, _ in factors]),
            "task_right": jnp.stack([right for _, right in factors]),
        }

    def compose(self, params, runs, task_ids):
        left, right = params["task_left"][task_ids], params["task_right"][task_ids]
        # Rank one is a broadcast product; a matrix product of inner size one would not be faster.
        update = left * right if self.rank == 1 else jnp.matmul(left, right, precision=FLOAT32)
        if runs.num_groups == 1:
            return jnp.broadcast_to(params["shared"][0], update.shape) * update
        return params["shared"][jnp.asarray(runs.group_of_row)[task_ids]] * update

    def compose_rows(self, params, runs, task_ids, slots):
        position = jnp.maximum(slots - 1, 0)
        groups = jnp.asarray(runs.group_of_row)[task_ids]
        left, right = params["task_left"][task_ids, position], params["task_right"][task_ids]
        update = jnp.einsum("...r,...rh->...h", left, right, precision=FLOAT32)
        return params["shared"][groups, position] * update

    def transfer(self, source, source_method, source_runs, runs):
        if source_method.name != self.name:
            raise ValueError(
                f"MPT starts from an MPT artefact, and this one holds {source_method.name!r}: it "
                "has no factors. Run the source stage first (gin/mpt_source.gin)."
            )
        if self.start_from == "same":
            return _namesakes(source, source_runs, runs)
        rows = jnp.asarray(source_rows(source_runs, self.start_from))
        groups = {source_runs.group_of_row[row] for row in rows.tolist()}
        if len(groups) > 1:
            raise ValueError(
                f"Averaging factors over {len(groups)} groups would mix different shared prompts; "
                "set start_from to one run of the artefact."
            )
        repeat = lambda x, times: jnp.repeat(x[None], times, axis=0)  # noqa: E731
        return {
            "shared": repeat(source["shared"][groups.pop()], runs.num_groups),
            "task_left": repeat(source["task_left"][rows].mean(0), runs.num_rows),
            "task_right": repeat(source["task_right"][rows].mean(0), runs.num_rows),
        }

    def config(self):
        return {"prompt_length": self.prompt_length, "rank": self.rank}


def _namesakes(source, source_runs, runs):
    """Each run's own row of the source; raises where a group's rows had different shared ones."""
    rows = [source_runs.row(name) for name in runs.run_names]
    groups = [source_runs.group_of_row[rows[leader]] for leader in group_leaders(runs)]
    for run, row, group in zip(runs.run_names, rows, runs.group_of_row, strict=True):
        if source_runs.group_of_row[row] != groups[group]:
            raise ValueError(
                f"The factors of {run!r} were learnt with another shared prompt than those of the "
                "other rows of its group; keep the groups of the artefact, or make the rows "
                "independent."
            )
    return {
        "shared": source["shared"][jnp.asarray(groups)],
        "task_left": source["task_left"][jnp.asarray(rows)],
        "task_right": source["task_right"][jnp.asarray(rows)],
    }

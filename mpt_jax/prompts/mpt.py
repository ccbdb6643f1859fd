"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861), with factors of any rank.

    P_k = P* o (U_k V_k)                                   paper equation (2), rank R = 1

`P* [P, H]` is shared by the tasks of a group; `U_k [P, R]` and `V_k [R, H]` are specific to task
k. The product is elementwise (`o`). As in the paper, a new task starts from P* and the averages of
the source tasks' factors: mean(U) and mean(V), not the mean of the products. The factors are
aligned before they are averaged (`factors`).

Image tokens that are replaced in each of n layers (`sites`) are the rows of one long prompt. The
layers may then have

    layer_factors   U_k       V_k         parameters of a task at n = 12, P / n = 16, H = 768, R = 1
    'rows'          [P, R]    [R, H]      960      one pair for the long prompt
    'each'          [P, R]    [n, R, H]   9,408    a pair for each layer
    'tied'          [P/n, R]  [R, H]      784      one pair, the same in all layers
"""

from __future__ import annotations

import dataclasses

import jax
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
ROWS, EACH, TIED = "rows", "each", "tied"


@register
@dataclasses.dataclass(frozen=True)
class MPT(PromptMethod):
    """`P_k = shared[group of k] o (task_left[k] @ task_right[k])`.

    Parameters: `shared` [G, P, H], `task_left` [K, P, R], `task_right` [K, R, H]; for the shapes
    with other `layer_factors`, see the module docstring.

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
        layers: n, the number of equal parts of the prompt, one for each layer; only used if
            `layer_factors` is not `'rows'`.
        layer_factors: `'rows'`, `'each'` or `'tied'`; see the module docstring.

    Raises:
        ValueError: the rank is less than 1; `average_of` or `layer_factors` is unknown; or the
            prompt does not divide into `layers`.
    """

    prompt_length: int
    rank: int = 1
    init_prompt: PromptInits = SampledVocabulary()
    init_factors: FactorInit = ones_noise
    start_from: StartFrom = "average"
    average_of: str = "factors"
    layers: int = 1
    layer_factors: str = ROWS

    name = "mpt"
    labels = ((r"shared", "shared"), (r"task_(left|right)", "task"))

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"MPT.rank must be at least 1, got {self.rank}. Raise RANK.")
        if self.average_of not in AVERAGES:
            raise ValueError(unknown_name("AVERAGE_OF", self.average_of, AVERAGES))
        if self.layer_factors not in (ROWS, EACH, TIED):
            raise ValueError(unknown_name("LAYER_FACTORS", self.layer_factors, (ROWS, EACH, TIED)))
        if self.layers < 1 or self.prompt_length % self.layers:
            raise ValueError(
                f"The {self.prompt_length} rows of MPT's prompt do not divide into MPT.layers = "
                f"{self.layers} equal parts. Set MPT.layers to the number of layers whose prompts "
                "the rows are (IMAGE_LAYERS)."
            )

    @property
    def axes(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logical axes of the parameters."""
        of_layers = ("layers",) if self.layer_factors == EACH else ()
        return {
            "shared": ("groups", "prompt", "embed"),
            "task_left": ("tasks", "prompt", "rank"),
            "task_right": ("tasks", *of_layers, "rank", "embed"),
        }

    def init(self, key, runs, context):
        width = context.embedding.shape[1]
        shared = initial_prompts(
            self.init_prompt, key, runs, first_row_of_groups(runs), self.prompt_length, context
        )
        pairs = [self._init_factors(name_key(key, run), width) for run in runs.run_names]
        return {
            "shared": shared,
            "task_left": jnp.stack([left for left, _ in pairs]),
            "task_right": jnp.stack([right for _, right in pairs]),
        }

    def _init_factors(self, key, width):
        """Returns the initial factors of one task. With `'each'`, every layer draws a pair."""
        length = self.prompt_length // (1 if self.layer_factors == ROWS else self.layers)
        if self.layer_factors != EACH:
            return self.init_factors(key, length, width, self.rank)
        keys = [jax.random.fold_in(key, layer) for layer in range(self.layers)]
        pairs = [self.init_factors(of_layer, length, width, self.rank) for of_layer in keys]
        return (
            jnp.concatenate([left for left, _ in pairs]),
            jnp.stack([right for _, right in pairs]),
        )

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        left, right = self._pairs(
            gather_rows(params["task_left"], task_ids),
            gather_rows(params["task_right"], task_ids),
        )
        # For rank one, a matrix product is not faster than this broadcast product.
        update = left * right if self.rank == 1 else jnp.matmul(left, right, precision=FLOAT32)
        if self.layer_factors == EACH:
            update = update.reshape((*task_ids.shape, self.prompt_length, -1))
        elif self.layer_factors == TIED:
            update = jnp.tile(update, (self.layers, 1))
        if runs.num_groups == 1:
            return jnp.broadcast_to(params["shared"][0], update.shape) * update
        return gather_rows(params["shared"], jnp.asarray(runs.group_of_row)[task_ids]) * update

    def _pairs(self, left, right):
        """Returns factors with one pair of matrices [..., R] and [R, H] for each product that they
        have: with `'each'`, [..., n, P/n, R] and [..., n, R, H]."""
        if self.layer_factors != EACH:
            return left, right
        return left.reshape((*left.shape[:-2], self.layers, -1, left.shape[-1])), right

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        if source_method.name != self.name:
            raise ValueError(
                "MPT starts only from an MPT artifact, but the initial artifact has the method "
                f"{source_method.name!r}, which has no factors. Set INITIAL_ARTIFACT to one MPT "
                "artifact, such as the one that gin/mpt_source.gin writes. A list of artifacts is "
                "combined into plain prompts, which have no factors."
            )
        self._check_layers(source_method)
        weights = source_weights(self.start_from, source_runs, runs)
        groups = shared_groups(weights, source_runs, runs)
        left, right = self._averages(weights, source["task_left"], source["task_right"])
        shared = jnp.asarray(source["shared"])[jnp.asarray(groups)]
        return {"shared": shared, "task_left": left, "task_right": right}

    def _check_layers(self, source_method):
        """Raises ValueError if an artifact's factors have another meaning."""
        own, other = self.layer_factors, source_method.layer_factors
        if own != other:
            raise ValueError(
                f"MPT.layer_factors is {own!r}, but the initial artifact has {other!r}. Use the "
                "same LAYER_FACTORS in both jobs."
            )
        if own != ROWS and self.layers != source_method.layers:
            raise ValueError(
                f"MPT.layers is {self.layers}, but the initial artifact has {source_method.layers} "
                "layers. Use the same IMAGE_LAYERS in both jobs."
            )

    def _averages(self, weights, left, right):
        """Returns the factors that K runs start from, given weights [K, S] of S source runs.

        A run that starts from one source run gets its factors unchanged, unless their rank changes.
        """
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        first, second = self._pairs(left, right)
        if self.average_of == "products":
            product = np.asarray(weighted_mean(weights, first @ second))
            found = factors.best_factors(product, self.rank)
        else:
            found = [weighted_mean(weights, x) for x in factors.aligned(first, second)]
        found = [jnp.asarray(x, jnp.float32) for x in found]
        found[0] = found[0].reshape(len(weights), -1, found[0].shape[-1])
        if self.average_of == "products" and left.shape[-1] != self.rank:
            return found
        is_single = (weights > 0).sum(1) == 1
        copies = [weighted_mean(weights, x) for x in (left, right)]
        return [
            jnp.where(is_single.reshape(-1, *[1] * (copy.ndim - 1)), copy, x)
            for copy, x in zip(copies, found, strict=True)
        ]

    def statistics(self, params, runs):
        shared = params["shared"]
        left, right = self._pairs(params["task_left"], params["task_right"])
        if self.layer_factors == EACH:
            shared = shared.reshape(len(shared), self.layers, -1, shared.shape[-1])
        elif self.layer_factors == TIED:
            left = np.tile(left, (1, self.layers, 1))
        return factors.statistics({"shared": shared, "task_left": left, "task_right": right}, runs)

    def config(self):
        own = {"prompt_length": self.prompt_length, "rank": self.rank}
        if self.layer_factors == ROWS:  # as in artifacts of earlier versions
            return own
        return {**own, "layers": self.layers, "layer_factors": self.layer_factors}

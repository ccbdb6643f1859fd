"""Averages and statistics of MPT's factors.

A product `U V` does not determine its factors: `(-U, -V)` and, for any number c, `(c U, V / c)`
have the same product. The average of several tasks' factors depends on these choices, so `aligned`
makes them the same for all tasks. At ranks above one it does so for each column of U and its row of
V; products still do not determine the order of columns, nor how they are mixed.
"""

from __future__ import annotations

import itertools

import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Float, Params

Factors = tuple[Float[np.ndarray, "S P R"], Float[np.ndarray, "S R H"]]


def aligned(left: Float[np.ndarray, "S P R"], right: Float[np.ndarray, "S R H"]) -> Factors:
    """Returns factors of the same products in which every column of U has a sum that is not
    negative, and the norm sqrt(P). A column of zeros is unchanged."""
    norms = np.linalg.norm(left, axis=1, keepdims=True)  # [S, 1, R]
    scales = np.where(norms > 0, norms, 1) / left.shape[1] ** 0.5
    scales = scales * np.where(left.sum(1, keepdims=True) < 0, -1, 1)
    return left / scales, right * scales.swapaxes(1, 2)


def best_factors(product: Float[np.ndarray, "S P H"], rank: int) -> Factors:
    """Returns the factors [S, P, R] and [S, R, H] whose products are closest to `product` in the
    sum of squares (the singular value decomposition), as `aligned` returns them."""
    left, values, right = np.linalg.svd(product, full_matrices=False)
    return aligned(left[..., :rank], values[:, :rank, None] * right[:, :rank])


def statistics(params: Params, runs: Runs) -> dict[str, float]:
    """Returns how similar the prompts of tasks in a group are; {} if no group has two tasks.

    Args:
        params: MPT's parameters.
        runs: the runs of the bank.

    Returns:
        `left_norm`, `right_norm`: the root mean squares of U and V. `sign_agreement`: the share of
        entries of the aligned factors that have the same sign in two tasks, averaged over the pairs
        of tasks in a group; 0.5 for random signs. `shared_variance`: the share of the squared norm
        of the prompts that lies along P* of their group.
    """
    left, right = (np.asarray(params[f"task_{side}"], np.float64) for side in ("left", "right"))
    shared = np.asarray(params["shared"], np.float64)
    agreements, along, total = [], 0.0, 0.0
    for group in range(runs.num_groups):
        rows = [row for row, number in enumerate(runs.group_of_row) if number == group]
        if len(rows) < 2:
            continue
        signs = [np.sign(x) for x in aligned(left[rows], right[rows])]
        agreements += [
            np.mean([np.mean(x[a] == x[b]) for x in signs])
            for a, b in itertools.combinations(range(len(rows)), 2)
        ]
        prompts = shared[group] * (left[rows] @ right[rows])
        squares = (
            np.square(np.tensordot(prompts, shared[group], 2)) / np.square(shared[group]).sum()
        )
        along, total = along + squares.sum(), total + np.square(prompts).sum()
    if not agreements:
        return {}
    return {
        "left_norm": float(np.sqrt(np.mean(np.square(left)))),
        "right_norm": float(np.sqrt(np.mean(np.square(right)))),
        "sign_agreement": float(np.mean(agreements)),
        "shared_variance": float(along / total),
    }

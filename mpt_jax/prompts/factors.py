"""Averages and statistics of MPT's factors.

A product `U V` does not determine its factors: `(-U, -V)` and, for any number c, `(c U, V / c)`
have the same product. The average of several tasks' factors depends on these choices, so `aligned`
makes them the same for all tasks. At ranks above one it does so for each column of U and its row of
V; products still do not determine the order of columns, nor how they are mixed.

A prompt may have a pair of factors for each layer; each pair is then aligned separately.
"""

from __future__ import annotations

import collections
import itertools

import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Float, Params

Factors = tuple[Float[np.ndarray, "... P R"], Float[np.ndarray, "... R H"]]


def aligned(left: Float[np.ndarray, "... P R"], right: Float[np.ndarray, "... R H"]) -> Factors:
    """Returns factors of the same products in which every column of U has a sum that is not
    negative, and the norm sqrt(P). A column of zeros is unchanged."""
    norms = np.linalg.norm(left, axis=-2, keepdims=True)  # [..., 1, R]
    scales = np.where(norms > 0, norms, 1) / left.shape[-2] ** 0.5
    scales = scales * np.where(left.sum(-2, keepdims=True) < 0, -1, 1)
    return left / scales, right * scales.swapaxes(-1, -2)


def best_factors(product: Float[np.ndarray, "... P H"], rank: int) -> Factors:
    """Returns the factors [..., P, R] and [..., R, H] whose products are closest to `product` in
    the sum of squares (the singular value decomposition), as `aligned` returns them."""
    left, values, right = np.linalg.svd(product, full_matrices=False)
    return aligned(left[..., :rank], values[..., :rank, None] * right[..., :rank, :])


def statistics(params: Params, runs: Runs) -> dict[str, float]:
    """Returns how similar the prompts of tasks in a group are; {} if no group has two tasks.

    Args:
        params: MPT's parameters, as NumPy arrays: `shared` [G, ..., P, H], `task_left`
            [K, ..., P, R] and `task_right` [K, ..., R, H], with an axis of layers if these have
            separate pairs.
        runs: the runs of the bank.

    Returns:
        `left_norm`, `right_norm`: the root mean squares of U and V. `sign_agreement`: the share of
        entries of the aligned factors that have the same sign in two tasks, averaged over the pairs
        of tasks in a group; 0.5 for random signs. `shared_variance`: the share of the squared norm
        of the prompts that lies along P* of their group.
    """
    members = collections.defaultdict(list)
    for row, group in enumerate(runs.group_of_row):
        members[group].append(row)
    several = {group: rows for group, rows in members.items() if len(rows) > 1}
    if not several:
        return {}
    left, right = (np.asarray(params[f"task_{side}"], np.float64) for side in ("left", "right"))
    same, pairs, along, total = 0.0, 0, 0.0, 0.0
    for group, rows in several.items():
        number = len(rows) * (len(rows) - 1) // 2
        shares = [_same_signs(x) for x in aligned(left[rows], right[rows])]
        same, pairs = same + number * float(np.mean(shares)), pairs + number
        part, whole = _squares(np.asarray(params["shared"][group]), left[rows], right[rows])
        along, total = along + part, total + whole
    return {
        "left_norm": float(np.sqrt(np.mean(np.square(left)))),
        "right_norm": float(np.sqrt(np.mean(np.square(right)))),
        "sign_agreement": same / pairs,
        "shared_variance": along / total,
    }


def _same_signs(values: Float[np.ndarray, "n ..."]) -> float:
    """Returns the share of the pairs of rows that have the same sign, averaged over entries."""
    counts = [(np.sign(values) == sign).sum(0) for sign in (-1, 0, 1)]
    same = sum(count * (count - 1) for count in counts)
    return float(np.mean(same / (len(values) * (len(values) - 1))))


def _squares(
    shared: Float[np.ndarray, "... P H"],
    left: Float[np.ndarray, "n ... P R"],
    right: Float[np.ndarray, "n ... R H"],
) -> tuple[float, float]:
    """Returns the squared norm of n prompts along P*, and their whole squared norm, without
    computing a prompt."""
    left, right = (x.reshape(len(x), -1, *x.shape[-2:]) for x in (left, right))
    square = np.square(shared.astype(np.float64)).reshape(-1, *shared.shape[-2:])
    columns = square.swapaxes(1, 2)
    dots = np.einsum("nlpr,nlrp->n", left, right @ columns)
    norms = 0.0
    for first, second in itertools.product(range(left.shape[-1]), repeat=2):
        u, v = left[..., first] * left[..., second], right[..., first, :] * right[..., second, :]
        norms += float(np.einsum("nlp,nlp->", u, (v[:, :, None] @ columns)[:, :, 0]))
    return float(np.square(dots).sum() / square.sum()), norms

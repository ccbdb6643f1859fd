"""Materializes a method's plain prompts: one array [P, H] for each bank row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Params
from mpt_jax.prompts.base import PromptMethod


def materialize(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    """One plain prompt per bank row: what a server needs and nothing more.

    Raises:
        ValueError: prompts depend on the text, so that no row has one, or differ in length.
    """
    lengths = set(method.prompt_lengths(runs))
    if len(lengths) > 1:
        raise ValueError(
            f"The prompts of {', '.join(runs.run_names)} have several lengths, {sorted(lengths)}, "
            "and are no one array; take the artifact of one run."
        )
    return _every_prompt(method, params, runs)[:, : max(lengths)]


def plain_prompts(method: PromptMethod, params: Params, runs: Runs) -> list[np.ndarray]:
    """The plain prompt [P, H] of each bank row, each of its own length.

    Raises:
        ValueError: prompts depend on the text.
    """
    prompts = np.asarray(_every_prompt(method, params, runs))
    lengths = method.prompt_lengths(runs)
    return [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]


def plain_weights(method: PromptMethod, params: Params, runs: Runs) -> Float[np.ndarray, "K C"]:
    """The weight of each candidate in the plain prompt of each bank row.

    Raises:
        NotImplementedError: the method mixes no candidates.
        ValueError: prompts depend on the text.
    """
    params = _alone(method, params)
    return np.asarray(method.mixture(params, runs, jnp.arange(runs.num_rows)))


def _every_prompt(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    return method.compose(_alone(method, params), runs, jnp.arange(runs.num_rows))


def _alone(method: PromptMethod, params: Params) -> Params:
    """The parameters, if they make prompts without a text."""
    if method.reads_text:
        raise ValueError(
            f"The prompts of the method {method.name!r} depend on the text they stand before, so "
            "there is no one prompt of a task to fold, or to start another method from."
        )
    # Whoever kept the best step of a run kept it as NumPy arrays.
    return jax.tree.map(jnp.asarray, params)

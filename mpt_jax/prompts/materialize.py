"""Plain prompts of a method: one array [P, H] per bank row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Params
from mpt_jax.prompts.base import PromptMethod


def materialize(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    """Returns one plain prompt per bank row; a server needs no other parameters.

    Raises:
        ValueError: prompts depend on the text, or have different lengths.
    """
    run_of_length = dict(zip(method.prompt_lengths(runs), runs.run_names, strict=True))
    if len(run_of_length) > 1:
        examples = ", ".join(f"{n} for {run!r}" for n, run in sorted(run_of_length.items()))
        raise ValueError(
            f"The artifact's prompts have different lengths (in positions: {examples}), so they do "
            "not fit into one array. Use an artifact whose prompts all have the same length, for "
            "example one with a single run."
        )
    return _every_prompt(method, params, runs)[:, : max(run_of_length)]


def plain_prompts(method: PromptMethod, params: Params, runs: Runs) -> list[np.ndarray]:
    """Returns the plain prompt of each bank row, each with its own length.

    Raises:
        ValueError: prompts depend on the text.
    """
    prompts = np.asarray(_every_prompt(method, params, runs))
    lengths = method.prompt_lengths(runs)
    return [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]


def plain_weights(method: PromptMethod, params: Params, runs: Runs) -> Float[np.ndarray, "K C"]:
    """Returns the weight of each of the method's C `candidates` in each bank row's plain prompt.

    Raises:
        NotImplementedError: the method does not mix prompts.
        ValueError: prompts depend on the text.
    """
    params = _without_input(method, params)
    return np.asarray(method.mixture(params, runs, jnp.arange(runs.num_rows)))


def _every_prompt(method: PromptMethod, params: Params, runs: Runs) -> Float[Array, "K P H"]:
    return method.compose(_without_input(method, params), runs, jnp.arange(runs.num_rows))


def _without_input(method: PromptMethod, params: Params) -> Params:
    """Returns the parameters as JAX arrays; raises ValueError if prompts depend on the example."""
    if method.reads_input:
        what = "text that follows them" if method.reads_text else "image"
        raise ValueError(
            f"Prompts of the method {method.name!r} depend on the {what}, so a "
            "task has no single prompt to materialize or to initialize another method from. Use "
            f"this artifact with the method {method.name!r}, or choose another artifact."
        )
    # The parameters of a run's best step are stored as NumPy arrays.
    return jax.tree.map(jnp.asarray, params)

"""Initial CrossPT prompts from an artifact: of CrossPT itself, or plain prompts as sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpt_jax.core.comparison import differences
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.base import PromptMethod
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.warm_start import shared_groups, source_weights, weighted_mean

Values = dict[str, Any]


def transfer(
    method: Any,
    source: Any,
    source_method: PromptMethod,
    source_runs: Runs,
    runs: Runs,
    initial: Callable[[], Values],
) -> Values:
    """Returns the initial parameters of a job from those of an artifact; `CrossPT.transfer`.

    Args:
        method, runs: the prompt method and the runs of the job.
        source, source_method, source_runs: the parameters, the prompt method and the runs of the
            artifact.
        initial: returns the method's own initial values.

    Raises:
        ValueError: a prompt that starts from the artifact would pass through an MLP, settings
            differ from those of a CrossPT artifact, or a setting has no effect.
    """
    is_own = source_method.name == method.name
    started = {"sources", "private"} if is_own else {"sources"}
    if conflicting := sorted(started & set(method.reparameterize)):
        rest = [name for name in method.reparameterize if name not in started]
        raise ValueError(
            "Prompts that start from INITIAL_ARTIFACT cannot be trained through a randomly "
            f"initialized MLP, but CrossPT.reparameterize names {' and '.join(conflicting)}. Set "
            f"REPARAMETERIZE = {rest}."
        )
    if is_own:
        return _from_crosspt(method, source, source_method, source_runs, runs, initial)
    if method.start_from not in ("average", "same"):
        given = repr(method.start_from) if isinstance(method.start_from, str) else "a table"
        raise ValueError(
            f"START_FROM ({given}) would have no effect, because the initial artifact is not a "
            "CrossPT artifact: every group starts from the plain prompts named in SOURCES. "
            "Leave START_FROM at 'average'."
        )
    if not method.composition.has_sources:
        raise ValueError(
            f"COMPOSE_BY = {method.compose_by!r} has no source prompts to initialize from "
            "INITIAL_ARTIFACT. Set INITIAL_ARTIFACT to None."
        )
    prompts = materialize(source_method, source, source_runs)
    sources = prompts[jnp.asarray([source_runs.row(name) for name in method.sources])]
    return {**initial(), "sources": jnp.stack([sources] * runs.num_groups)}


def _from_crosspt(
    method: Any,
    source: Any,
    source_method: Any,
    source_runs: Runs,
    runs: Runs,
    initial: Callable[[], Values],
) -> Values:
    settings, source_settings = method.transfer_settings(), source_method.transfer_settings()
    if changes := differences(source_settings, settings):
        raise ValueError(
            "This job's CrossPT settings differ from those of the initial artifact "
            f"({changes}). Use the artifact's settings."
        )
    weights = source_weights(method.start_from, source_runs, runs)
    groups = jnp.asarray(shared_groups(weights, source_runs, runs))
    params = initial()
    for name in source:
        shared = method.axes[name][0] == "groups"
        params[name] = source[name][groups] if shared else weighted_mean(weights, source[name])
    if method.composition.longer:
        check_private(method, runs, source_method, source_runs, weights)
        # Arrays are as long as the longest private prompt; rows past a prompt's end are unread.
        private = params["private"][:, : method.longest_private]
        rest = method.longest_private - private.shape[1]
        params["private"] = jnp.pad(private, ((0, 0), (0, rest), (0, 0)))
    return params


def check_private(
    method: Any, runs: Runs, source_method: Any, source_runs: Runs, weights: np.ndarray
) -> None:
    """Raises ValueError if a private prompt would start from a prompt of another length.

    Args:
        method, runs: the prompt method and the runs of this job.
        source_method, source_runs: the prompt method and the runs of the artifact.
        weights: [K, S], from `warm_start.source_weights`.
    """
    lengths = method.prompt_lengths(runs)
    source_lengths = source_method.prompt_lengths(source_runs)
    for row, run in enumerate(runs.run_names):
        for source in np.flatnonzero(weights[row]).tolist():
            if source_lengths[source] != lengths[row]:
                length = source_lengths[source] - method.length
                raise ValueError(
                    f"The private prompt of {run!r} has {lengths[row] - method.length} positions, "
                    f"but the private prompt of {source_runs.run_names[source]!r} in the initial "
                    f"artifact, which it would start from, has {length}. Set PRIVATE_LENGTH to "
                    f"{length} for {run!r}, or choose another run with START_FROM."
                )

"""Compositions of CrossPT prompts, and checks of the method's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Float, Int
from mpt_jax.prompts.base import FLOAT32
from mpt_jax.prompts.crosspt.routing import ROUTERS

ADD, LEARNED, JOINT = "add", "learned", "joint"
EXAMPLE, RUN = "example", "run"
ALL = "all"
DEFAULT_ROUTER, NORMALIZE_BY = "relaxed_bernoulli", "softmax"
SHARE_TEMPERATURE = 5.0


@dataclasses.dataclass(frozen=True)
class Composition:
    """The parts of a composed prompt and how they are combined."""

    has_sources: bool = True
    has_private: bool = True
    is_cat: bool = False  # concatenates the sources
    longer: bool = False  # appends the private prompt


COMPOSITIONS = {
    "sum": Composition(has_private=False),
    "cat": Composition(has_private=False, is_cat=True),
    "private_sum": Composition(),
    "private_product": Composition(),
    "private_cat": Composition(longer=True),
    "private": Composition(has_sources=False),
}


def check_counts(method: Any) -> None:
    """Raises ValueError if a number is out of range, or `share` or `reparameterize` is unknown."""
    if method.length < 1:
        raise ValueError(
            f"CrossPT.length must be at least 1, got {method.length}. Raise PROMPT_LENGTH."
        )
    if method.top_k is not None and not 1 <= method.top_k <= len(method.sources):
        raise ValueError(
            f"CrossPT.top_k is {method.top_k}, but the router has {len(method.sources)} "
            f"candidates: {', '.join(method.sources)}. Set TOP_K to a number from 1 to "
            f"{len(method.sources)}, or to None to keep all."
        )
    share = method.share
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if share not in (ADD, LEARNED, JOINT) and not (is_number and 0 <= share < 1):
        raise ValueError(
            f"CrossPT.share must be {ADD!r}, {LEARNED!r}, {JOINT!r} or a number in [0, 1), got "
            f"{share!r}. Correct SHARE; to use only the private prompt, set COMPOSE_BY to "
            "'private'."
        )
    if share == JOINT and ROUTERS[method.router].reads_text:
        raise ValueError(
            f"CrossPT.share = {JOINT!r} needs a router that scores the private prompt, but the "
            f"router {method.router!r} scores sources only. Choose another ROUTER or SHARE."
        )
    if method.share_temperature is not None and not method.share_temperature > 0:
        raise ValueError(
            f"CrossPT.share_temperature must be positive or None, got {method.share_temperature}. "
            "Correct SHARE_TEMPERATURE."
        )
    lengths = method.private_length
    lengths = lengths.values() if isinstance(lengths, Mapping) else (lengths,)
    if not lengths or any(length is not None and length < 1 for length in lengths):
        raise ValueError(
            "CrossPT.private_length must be None, a number of at least 1, or a table with such a "
            f"number for every run, got {method.private_length}. Correct PRIVATE_LENGTH."
        )
    named = method.reparameterize
    if isinstance(named, str) or named is None or set(named) - {"sources", "private"}:
        raise ValueError(
            "CrossPT.reparameterize must be 'all', or a list that holds 'sources', 'private' or "
            f"both, got {named!r}. To train without MLPs, set REPARAMETERIZE = []."
        )


def check_effects(method: Any) -> None:
    """Raises ValueError if a setting would have no effect."""
    kind, is_random = COMPOSITIONS[method.compose_by], ROUTERS[method.router].is_random
    is_learned, is_joint = method.share == LEARNED, method.share == JOINT
    ineffective = {
        "share": method.share != ADD and method.compose_by != "private_sum",
        "share_temperature": not is_learned and method.share_temperature != SHARE_TEMPERATURE,
        "private_length": method.private_length is not None and not kind.longer,
        "normalize": not is_random and method.normalize != NORMALIZE_BY,
        "draws": method.draws != EXAMPLE and not (is_random or is_learned),
        "top_k": method.top_k is not None
        and (not kind.has_sources or is_joint or method.router == "uniform"),
        "router": method.router != DEFAULT_ROUTER and not kind.has_sources,
        "reparameterize": "private" in method.reparameterize
        and not kind.has_private
        or "sources" in method.reparameterize
        and not kind.has_sources,
    }
    for name, is_ineffective in ineffective.items():
        if is_ineffective:
            router = "" if name == "router" else f" and ROUTER = {method.router!r}"
            raise ValueError(
                f"CrossPT.{name} = {getattr(method, name)!r} would have no effect with COMPOSE_BY "
                f"= {method.compose_by!r}{router}. Leave {name.upper()} at its default."
            )


def weighted_sum(weights: Float[Array, "... S"], sources: Float[Array, "... S l H"]) -> Array:
    """Returns sum_j w_j S_j, [..., l, H].

    Sources are [S, l, H], shared by all examples, or [..., S, l, H].
    """
    if sources.ndim == 3:
        return jnp.einsum("...s,slh->...lh", weights, sources, precision=FLOAT32)
    return jnp.einsum("...s,...slh->...lh", weights, sources, precision=FLOAT32)


def concat_sources(
    sources: Float[Array, "... S l H"],
    weights: Float[Array, "... S"],
    places: Int[Array, "... k"],
) -> Float[Array, "... _ H"]:
    """Concatenates the weighted sources w_j S_j at the indices `places`: [..., k l, H]."""
    if sources.ndim == 3:
        chosen = sources[places]
    else:
        chosen = jnp.take_along_axis(sources, places[..., None, None], axis=-3)
    chosen *= jnp.take_along_axis(weights, places, axis=-1)[..., None, None]
    *examples, count, length, width = chosen.shape
    return chosen.reshape(*examples, count * length, width)

"""Parameter trees by path name: ordered label tables, splitting, strict matching.

A parameter tree is a nested mapping with string keys. A leaf's name is its path joined by slashes
(`encoder/layers_0/mlp/wi/kernel`). Label tables, checkpoints, artifacts and errors use this name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.shapes import Params

FLOATS = ("float16", "bfloat16", "float32", "float64")
_CHUNK = 1 << 16  # values checked at a time, so that they and the result stay in the cache

# An ordered table of (regular expression over the whole path name, label); first match wins.
Rules = Sequence[tuple[str, str]]


def path_name(path: Sequence[Any]) -> str:
    """Returns `a/b/c` for a key path of `jax.tree_util`."""
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
        else:
            parts.append(str(key))
    return "/".join(parts)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by path name, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Builds a nested dict from leaves by path name; the inverse of `flatten` for nested dicts.

    Raises:
        ValueError: a leaf is below another leaf: its name starts with the other name and a slash.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for depth, parent in enumerate(parents, 1):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"Parameter {name!r} is below {'/'.join(parents[:depth])!r}, which is itself a "
                    "parameter. Rename one of the two."
                )
        if last in node:
            raise ValueError(
                f"Parameter {name!r} has other parameters below it. Rename one of the two."
            )
        node[last] = leaf
    return tree


def by_suffix(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the entry of `values` whose key is the longest suffix of a path name.

    Optimizer states hold trees shaped like the parameters under a prefix. For the name
    `0/mu/prompt/shared` this finds the entry of the parameter `prompt/shared`.

    Args:
        values: path name -> entry.
        name: the path name; suffixes of it start after a slash.
        default: the value to return if no suffix is a key.
    """
    parts = name.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((values[suffix] for suffix in suffixes if suffix in values), default)


def label_tree(tree: Any, rules: Rules) -> Any:
    """Returns a tree of the same structure with each leaf's label, from the first matching rule.

    Raises:
        ValueError: some leaves match no rule; the message lists their names.
    """
    compiled = [(re.compile(pattern), label) for pattern, label in rules]

    def label(path: Sequence[Any], _: Any) -> str | None:
        name = path_name(path)
        return next((label for pattern, label in compiled if pattern.fullmatch(name)), None)

    labels = jax.tree_util.tree_map_with_path(label, tree)
    label_of_name = flatten(labels, is_leaf=lambda x: x is None)
    unmatched = [name for name, label in label_of_name.items() if label is None]
    if unmatched:
        raise ValueError(
            f"No rule labels these parameters: {abbreviate(unmatched)}. The rules tried, in order: "
            f"{', '.join(pattern for pattern, _ in rules)}. Add a rule for them to TRAINABLE, or "
            "to the labels of the prompt method."
        )
    return labels


def split(tree: Any, rules: Rules, keep: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into leaves whose label is in `keep` and the rest, as two nested dicts."""
    labels = flatten(label_tree(tree, rules))
    kept, rest = {}, {}
    for name, leaf in flatten(tree).items():
        (kept if labels[name] in keep else rest)[name] = leaf
    return unflatten(kept), unflatten(rest)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """Merges two nested dicts with disjoint leaves; the inverse of `split`.

    Raises:
        ValueError: a leaf is in both; the message lists all such leaves.
    """
    leaves = flatten(first)
    others = flatten(second)
    both = sorted(set(leaves) & set(others))
    if both:
        raise ValueError(
            f"These parameters are in both trees: {abbreviate(both)}. Remove them from one of the "
            "trees."
        )
    return unflatten({**leaves, **others})


def match_exactly(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    what: str,
    *,
    standard: str = "the model",
    advice: str = "Configure the model with the architecture and settings that these parameters "
    "were saved with.",
) -> None:
    """Checks that parameters have exactly the expected names and shapes.

    Args:
        expected: name -> shape, for every parameter of the model.
        found: name -> shape, for every parameter that was read.
        what: the source of the parameters; the subject of the error's first sentence.
        standard: what the parameters must match; the object of that sentence.
        advice: what the user can do; the last sentence of the error.

    Raises:
        ValueError: the two differ; the message lists missing names, extra names and differing
            shapes.
    """
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    shapes = [
        f"{name}: expected {tuple(expected[name])}, found {tuple(found[name])}"
        for name in sorted(set(expected) & set(found))
        if tuple(expected[name]) != tuple(found[name])
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {abbreviate(missing)}")
    if extra:
        problems.append(f"{len(extra)} not expected: {abbreviate(extra)}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {abbreviate(shapes, '; ')}")
    if problems:
        raise ValueError(f"{what} does not match {standard}. {'; '.join(problems)}. {advice}")


def check_floats(
    leaves: Mapping[str, np.ndarray],
    what: str,
    advice: str = "Download or copy the checkpoint again, or save the model again.",
) -> None:
    """Checks that parameters are floating point numbers, and finite in float32.

    Args:
        leaves: name -> array.
        what: the source of the parameters; the subject of the error's first sentence.
        advice: what the user can do; the last sentence of the error.

    Raises:
        ValueError: a leaf has a dtype other than `FLOATS`, or holds NaN or infinity; the message
            lists such leaves.
    """
    other = [f"{name} ({x.dtype})" for name, x in leaves.items() if str(x.dtype) not in FLOATS]
    if other:
        raise ValueError(
            f"{what} has parameters of a dtype that is not supported: {abbreviate(other)}. Use "
            f"weights in {', '.join(FLOATS[:-1])} or {FLOATS[-1]}; quantized weights are not "
            "supported."
        )
    broken = [name for name, x in leaves.items() if not _is_finite(x)]
    if broken:
        raise ValueError(
            f"{what} has parameters with NaN or infinite values: {abbreviate(broken)}. {advice}"
        )


def _is_finite(x: np.ndarray) -> bool:
    """Whether all values are finite after conversion to float32."""
    values = x.ravel(order="K")  # a view, unless strided
    with np.errstate(over="ignore"):
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK]
            if not np.isfinite(part.astype(np.float32, copy=False)).all():
                return False
    return True

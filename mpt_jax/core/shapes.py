"""Shape letters and array types. A letter has one meaning in every annotation and docstring.

    B  batch                       P  prompt length            H  model width
    T  encoder positions           L  decoder positions        V  vocabulary rows
       (prompt slots included)     K  rows of the prompt bank  G  groups (independent runs)
    R  rank of a task's factors    N  attention heads          D  width of one head
    F  feed-forward width          S  source prompts           C  classes
    E  examples of a packed row    J  candidate prompts that one prompt is mixed from
    Q  query positions             M  positions attended to    Z  rows of a private prompt
    Y  layers of an image tower    I  image tokens             U  joint width of images and
                                      (prompts not included)      texts

A lower-case word (`"B text"`) is a size used only within one function.
Annotations are jaxtyping's (`Float[Array, "B T H"]`). They are checked at run time only under
pytest, by an import hook, so they cost nothing in production.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8, UInt32

__all__ = ["Array", "Batch", "Bool", "Float", "Int", "Key", "Params", "UInt8", "UInt32"]

# A nested dict of arrays with string keys: the parameter tree, or any part of it.
Params = Mapping[str, Any]
# One batch, as specified in docs/architecture.md: feature name -> array.
Batch = Mapping[str, jax.Array]
Key = PRNGKeyArray | UInt32[Array, "2"]

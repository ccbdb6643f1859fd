"""Lanes of a frozen vision transformer (MULTI-LANE, De Min et al. 2024, CoLLAs): a task's own
class token, which reads summaries of the patches, and a head of the task's classes.

A lane is the prompt of the site `lane`, [..., A + 2 n P, H]: A selectors, then P keys and P values
for each of the first n layers. Any method whose prompts do not depend on an input composes its
rows; prompt tuning gives every task its own lane. `backbones.clip.lanes` runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec

from mpt_jax.core import schema
from mpt_jax.core.runs import unknown_name
from mpt_jax.core.shapes import Array, Float, Int, Params
from mpt_jax.prompts.base import (
    NO_CONTEXT,
    PromptContext,
    PromptMethod,
    method_from_config,
    register_composite,
)
from mpt_jax.prompts.heads import HEAD, Heads
from mpt_jax.prompts.init import ClassLabels, SampledVocabulary, Text
from mpt_jax.prompts.sites import SitePrompts

LANE = "lane"
ORTHOGONAL, UNIFORM, ZERO = "orthogonal", "uniform", "zero"
KINDS = (ORTHOGONAL, UNIFORM, ZERO)


class Lanes(NamedTuple):
    """The parts of lanes.

    Attributes:
        selectors: [..., A, H] the selectors, as they enter the first layer.
        keys, values: [..., n, P, H] attention keys and values in each of the first n layers.
    """

    selectors: Float[Array, "... A H"]
    keys: Float[Array, "... n P H"]
    values: Float[Array, "... n P H"]


def num_rows(selectors: int, prompt_length: int, layers: int) -> int:
    """Returns A + 2 n P, the number of rows of a lane, for use in gin files.

    Args:
        selectors: A.
        prompt_length: P, the number of keys, and of values, of a layer.
        layers: n, the number of layers with keys and values.
    """
    return selectors + 2 * layers * prompt_length


def split_rows(rows: Float[Array, "... rows H"], selectors: int, layers: int) -> Lanes:
    """Returns the parts of a lane's rows."""
    *lead, count, width = rows.shape
    length = (count - selectors) // (2 * layers) if layers else 0
    pairs = rows[..., selectors:, :].reshape((*lead, layers, 2, length, width))
    return Lanes(rows[..., :selectors, :], pairs[..., 0, :, :], pairs[..., 1, :, :])


@dataclasses.dataclass(frozen=True)
class LaneInit:
    """Initial rows of a lane, as in the paper's released code.

    Attributes:
        selectors: A.
        layers: n.
        kind: of the keys and values: `'orthogonal'` (in each layer, the keys and the values as two
            orthogonal vectors [P H] of length 1 / sqrt(`lanes`)) or `'uniform'` (in [-1, 1]).
        selector_kind: of the selectors: `'orthogonal'` (one vector [A H] of length 1, which is
            nearly orthogonal to that of every other lane), `'uniform'`, or `'zero'`.
        lanes: the number of lanes whose keys and values are drawn at once. The released code draws
            those of all tasks of a sequence, so their length depends on it.

    Raises:
        ValueError: a kind is unknown, or `lanes` is less than 1.
    """

    selectors: int
    layers: int
    kind: str = ORTHOGONAL
    selector_kind: str = ORTHOGONAL
    lanes: int = 1

    def __post_init__(self):
        if self.kind not in KINDS[:2]:
            raise ValueError(unknown_name("LANE_INIT", self.kind, KINDS[:2]))
        if self.selector_kind not in KINDS:
            raise ValueError(unknown_name("SELECTOR_INIT", self.selector_kind, KINDS))
        if self.lanes < 1:
            raise ValueError(
                f"LaneInit.lanes is {self.lanes}, but at least one lane is drawn. Set LANES to the "
                "number of tasks of the sequence."
            )

    def __call__(self, key, task_name, prompt_length, context):
        width = context.embedding.shape[1]
        own, rest = jax.random.split(key)
        shape = (self.selectors, width)
        if self.selector_kind == ORTHOGONAL:
            drawn = jax.random.normal(own, shape)
            chosen = drawn / jnp.maximum(jnp.linalg.norm(drawn), 1e-12)
        elif self.selector_kind == UNIFORM:
            chosen = jax.random.uniform(own, shape, minval=-1.0, maxval=1.0)
        else:
            chosen = jnp.zeros(shape)
        size = (prompt_length - self.selectors) * width // (2 * self.layers) if self.layers else 0
        pairs = (self.layers, 2, size)
        if self.kind == UNIFORM:
            drawn = jax.random.uniform(rest, pairs, minval=-1.0, maxval=1.0)
        else:
            drawn = _orthogonal_pairs(rest, pairs) * self.lanes**-0.5
        return jnp.concatenate([chosen, drawn.reshape(-1, width)])


def _orthogonal_pairs(key: Array, shape: tuple[int, int, int]) -> Float[Array, "n 2 size"]:
    """Returns two random orthogonal vectors of length 1 for each layer."""
    first, second = jnp.moveaxis(jax.random.normal(key, shape), 1, 0)
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    first = unit(first)
    along = (first * second).sum(-1, keepdims=True)
    return jnp.stack([first, unit(second - along * first)], 1)


@register_composite
@dataclasses.dataclass(frozen=True)
class MultiLane(Heads):
    """A lane for each task, and a head with a column for each of its classes.

    Parameters are those of the lane's method below `lane/`, and those of `Heads`.

    Attributes:
        lane: the method that composes the rows of a lane. An artifact's lanes are transferred as
            its `start_from` says.
        num_classes: C, the largest number of classes of a task.
        selectors: A.
        layers: n, the number of layers with keys and values.
        drop_and_replace: whether every layer makes new summaries of the patches. If False, only the
            first layer does, and the summaries pass through all others.
        merged_tokens: the number of tokens that similar patches are merged to (`token_merging`), in
            place of summaries by selectors; 0 for selectors.

    Raises:
        ValueError: a size is out of range, there are selectors and merged tokens, the lane's method
            depends on an input, or its rows do not divide into selectors, keys and values.
    """

    lane: PromptMethod
    num_classes: int
    selectors: int = 10
    layers: int = 5
    drop_and_replace: bool = True
    merged_tokens: int = 0

    name = "multi_lane"

    def __post_init__(self):
        if self.num_classes < 1 or min(self.selectors, self.layers) < 0:
            raise ValueError(
                f"MultiLane has {self.num_classes} classes, {self.selectors} selectors and "
                f"{self.layers} layers with keys and values, but needs at least 1, 0 and 0. "
                "Correct MultiLane.num_classes, SELECTORS or LANE_LAYERS."
            )
        if self.merged_tokens < 0 or (self.merged_tokens and self.selectors):
            raise ValueError(
                f"MultiLane has {self.selectors} selectors and {self.merged_tokens} merged tokens, "
                "but summaries are made by one of the two. Set MERGED_TOKENS or SELECTORS to 0."
            )
        if isinstance(self.lane, SitePrompts) or self.lane.reads_input:
            raise ValueError(
                f"The method {self.lane.name!r} cannot compose a lane, which has one prompt that "
                "depends only on the task. Set MultiLane.lane to a method such as "
                "@prompt_tuning.PromptTuning()."
            )
        rows = self.lane.prompt_length - self.selectors
        if rows < 0 or (rows % (2 * self.layers) if self.layers else rows):
            raise ValueError(
                f"The {self.lane.prompt_length} rows of the lane are not {self.selectors} "
                f"selectors and equally many keys and values in each of {self.layers} layers. Set "
                "the prompt_length of its method to @lanes.num_rows()."
            )

    @property
    def parts(self) -> dict[str, PromptMethod]:
        """The lane's method."""
        return {LANE: self.lane}

    def init(self, key, runs, context):
        start = getattr(self.lane, "init_prompt", None)
        if isinstance(start, SampledVocabulary | ClassLabels | Text):
            raise ValueError(
                f"A lane cannot start from token embeddings ({type(start).__name__}), which are "
                "inputs of a text encoder. Set INIT to @lanes.LaneInit() or @init.Uniform()."
            )
        own, rest = jax.random.split(key)
        empty = dataclasses.replace(
            context, embedding=jnp.zeros((0, context.image_width), jnp.float32)
        )
        lanes = self.lane.init(own, runs, empty)
        return {LANE: lanes, HEAD: self.init_head(rest, runs, context)}

    def compose_site(self, site, params, runs, task_ids, given=NO_CONTEXT):
        """Returns the rows of lanes, [..., A + 2 n P, H]; see `split_rows`."""
        return self.parts[site].compose(params[site], runs, task_ids, given)

    def lanes(
        self,
        params: Params,
        runs: Any,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
    ) -> Lanes:
        """Returns the lanes of the bank rows `task_ids` [...]."""
        rows = self.compose_site(LANE, params, runs, task_ids, given)
        return split_rows(rows, self.selectors, self.layers)

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts lanes as the `start_from` of their method says, from those of another `MultiLane`
        of the same sizes. Runs of the artifact keep their heads."""
        if not isinstance(source_method, MultiLane):
            raise ValueError(
                f"The initial artifact (method {source_method.name!r}) has no lanes. Set "
                "INITIAL_ARTIFACT to an artifact of the method 'multi_lane', or to None."
            )
        for setting in _SETTINGS[1:]:
            own, other = getattr(self, setting), getattr(source_method, setting)
            if own != other:
                raise ValueError(
                    f"MultiLane.{setting} is {own}, but the initial artifact has {other}. Use the "
                    "same value in both jobs."
                )
        new = initial()
        theirs = source_method.lane
        lane = self.lane.transfer(source[LANE], theirs, source_runs, runs, lambda: new[LANE])
        head = self.transfer_head(new[HEAD], source[HEAD], source_runs, runs)
        return {LANE: lane, HEAD: head}

    def config(self):
        lane = {"method": self.lane.name, "config": self.lane.config()}
        return {LANE: lane, **{name: getattr(self, name) for name in _SETTINGS}}

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], what: str) -> MultiLane:
        """Builds the method from the settings that `config` returned; see
        `prompts.base.method_from_config`."""
        checked = schema.check(dict(settings), _Config, what)
        lane = method_from_config(checked.lane.method, checked.lane.config, f"{what} ({LANE})")
        return cls(lane, **{name: getattr(checked, name) for name in _SETTINGS})


_SETTINGS = ("num_classes", "selectors", "layers", "drop_and_replace", "merged_tokens")


class _Lane(msgspec.Struct):
    """The schema of the lane's method."""

    method: str
    config: dict[str, Any]


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of an artifact's settings."""

    lane: _Lane
    num_classes: schema.Positive
    selectors: schema.Count
    layers: schema.Count
    drop_and_replace: bool
    merged_tokens: schema.Count

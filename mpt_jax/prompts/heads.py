"""Heads of image classifiers: a column for each class of a task, and the linear probe, which has
nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from mpt_jax.core import schema
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Int, Key, Params
from mpt_jax.prompts.base import name_key, register_composite
from mpt_jax.prompts.row_ops import gather_rows
from mpt_jax.prompts.sites import SiteContext, WithoutSites

HEAD = "head"
_AXES = {"kernel": ("tasks", "classes", "embed"), "bias": ("tasks", "classes")}


class Heads(WithoutSites):
    """Base class of methods with a head for each run: `head/kernel` [K, C, U] and `head/bias`
    [K, C], for features of width U. A task with fewer than C classes does not use the last columns.

    Heads are not transferred: a run with the name of one of the artifact's runs keeps the head of
    that run, any other starts from a new one.

    Attributes:
        num_classes: C, the largest number of classes of a task.
    """

    num_classes: int

    @property
    def labels(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The label rules of the prompts, and 'head'."""
        return (*super().labels, (f"{HEAD}/.*", HEAD))

    @property
    def axes(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logical axes of all parameters."""
        return {**super().axes, **{f"{HEAD}/{name}": axes for name, axes in _AXES.items()}}

    def head(
        self, params: Params, task_ids: Int[Array, "..."]
    ) -> tuple[Float[Array, "... C U"], Float[Array, "... C"]]:
        """Returns the kernels and biases of the heads of the bank rows `task_ids` [...]."""
        own = params[HEAD]
        return gather_rows(own["kernel"], task_ids), gather_rows(own["bias"], task_ids)

    def init_head(self, key: Key, runs: Runs, context: SiteContext) -> dict[str, Array]:
        """Returns new heads. As in torch's linear layers, values are uniform in ±1/sqrt(U)."""
        width, bound = context.joint_dim, context.joint_dim**-0.5
        shapes = {"kernel": (self.num_classes, width), "bias": (self.num_classes,)}
        return {
            name: jnp.stack(
                [
                    jax.random.uniform(
                        name_key(jax.random.fold_in(key, number), run),
                        shape,
                        minval=-bound,
                        maxval=bound,
                    )
                    for run in runs.run_names
                ]
            )
            for number, (name, shape) in enumerate(shapes.items())
        }

    def transfer_head(self, new: Params, old: Params, source_runs: Runs, runs: Runs) -> Params:
        """Returns new heads, with those of an artifact in place of the rows of its runs.

        Raises:
            ValueError: heads of the artifact do not fit.
        """
        name = f"{type(self).__name__}.num_classes"
        return {x: _known_rows(x, new[x], old[x], source_runs, runs, name) for x in _AXES}

    def for_inference(self, params):
        method, kept = super().for_inference(params)
        return method, {**kept, HEAD: params[HEAD]}


@register_composite
@dataclasses.dataclass(frozen=True)
class LinearProbe(Heads):
    """A head for each run on the frozen features of images, without a prompt. C (U + 1) parameters
    per run.

    Raises:
        ValueError: `num_classes` is less than 1.
    """

    num_classes: int

    name = "linear_probe"

    def __post_init__(self):
        if self.num_classes < 1:
            raise ValueError(
                f"LinearProbe.num_classes is {self.num_classes}, but a head has at least 1 class. "
                "Set it to @task_classes.most_classes()."
            )

    def init(self, key, runs, context):
        return {HEAD: self.init_head(key, runs, context)}

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Keeps the heads of the artifact's runs."""
        if not isinstance(source_method, LinearProbe):
            raise ValueError(
                f"The initial artifact (method {source_method.name!r}) is not a linear probe. Set "
                "INITIAL_ARTIFACT to an artifact of the method 'linear_probe', or to None."
            )
        return {HEAD: self.transfer_head(initial()[HEAD], source[HEAD], source_runs, runs)}

    def config(self):
        return {"num_classes": self.num_classes}

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], what: str) -> LinearProbe:
        """Builds the method from the settings that `config` returned; see
        `prompts.base.method_from_config`."""
        return cls(schema.check(dict(settings), _Config, what).num_classes)


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of an artifact's settings."""

    num_classes: schema.Positive


def _known_rows(
    name: str, new: Array, old: Any, source_runs: Runs, runs: Runs, setting: str
) -> Array:
    """Returns new values [K, C, ...] of the head, with those of the artifact's runs in place of the
    rows with their names."""
    values, old = np.array(new), np.asarray(old)
    known = [run for run in runs.run_names if run in source_runs.run_names]
    if known and (old.shape[1] > values.shape[1] or old.shape[2:] != values.shape[2:]):
        raise ValueError(
            f"The head of the initial artifact has the shape {old.shape[1:]} ({name}), which does "
            f"not fit into that of this job, {values.shape[1:]}. Set {setting} to the "
            "number of classes of the largest task, and use the same backbone."
        )
    for run in known:
        values[runs.row(run), : old.shape[1]] = old[source_runs.row(run)]
    return jnp.asarray(values)

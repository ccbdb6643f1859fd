"""CoCoOp (Zhou et al. 2022, arXiv 2203.05557): context words that depend on the image.

    P_kb = shared[group of k] + g(f_b)        g(f) = relu(f W_in + b_in) W_out + b_out

`f_b [U]` is the normalized feature of image b. The meta-net g adds one vector to every position, so
the texts of all classes are encoded again for each image.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.shapes import Array, Params
from mpt_jax.prompts.base import FLOAT32, NO_CONTEXT, PromptMethod, name_key, register
from mpt_jax.prompts.init import Normal, PromptInits
from mpt_jax.prompts.row_ops import Grouped, first_row_of_groups, gather_rows
from mpt_jax.prompts.shared_prompt import SharedPrompt
from mpt_jax.prompts.spot import SourceTable
from mpt_jax.prompts.warm_start import group_weights, source_weights, weighted_mean

_META_NET = ("kernel_in", "bias_in", "kernel_out", "bias_out")
_REDUCTION = 16  # of the meta-net's hidden layer, in the paper


@register
@dataclasses.dataclass(frozen=True)
class CoCoOp(PromptMethod):
    """A context and a meta-net for each group.

    Parameters: `shared` [G, P, H]; of the meta-net, `kernel_in` [G, U, U/16], `bias_in` [G, U/16],
    `kernel_out` [G, U/16, H] and `bias_out` [G, H].

    Attributes:
        prompt_length: P.
        init_prompt: the initializer of each group's context.
        start_from: the prompt of the initial artifact that the context starts from; see
            `SharedPrompt`. An artifact of CoCoOp also provides the meta-net.
    """

    prompt_length: int
    init_prompt: PromptInits = Normal()
    start_from: str | SourceTable = "average"

    name = "cocoop"
    reads_image = True
    labels = ((r"(shared|kernel_.*|bias_.*)", "shared"),)
    axes = {
        "shared": ("groups", "prompt", "embed"),
        "kernel_in": ("groups", "joint", "rank"),
        "bias_in": ("groups", "rank"),
        "kernel_out": ("groups", "rank", "embed"),
        "bias_out": ("groups", "embed"),
    }

    def init(self, key, runs, context):
        """As torch's linear layers, the meta-net's values are uniform in ±1/sqrt(fan-in)."""
        inputs = getattr(context, "joint_dim", 0)
        if not inputs:
            raise ValueError(
                "CoCoOp's context depends on the feature of an image, but this model has no "
                "images. Use it as the text_context of SitePrompts, in a stage for images."
            )
        width, hidden = context.embedding.shape[1], max(inputs // _REDUCTION, 1)
        shapes = {
            "kernel_in": ((inputs, hidden), inputs),
            "bias_in": ((hidden,), inputs),
            "kernel_out": ((hidden, width), hidden),
            "bias_out": ((width,), hidden),
        }
        params = self._context.init(key, runs, context)
        for number, (name, (shape, fan_in)) in enumerate(shapes.items()):
            bound, own = fan_in**-0.5, jax.random.fold_in(key, number)
            keys = [name_key(own, runs.run_names[row]) for row in first_row_of_groups(runs)]
            params[name] = jnp.stack(
                [jax.random.uniform(x, shape, minval=-bound, maxval=bound) for x in keys]
            )
        return params

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        if given.image_features is None:
            raise ValueError(
                "CoCoOp's context depends on the feature of an image. Pass it as "
                "PromptContext.image_features."
            )
        context = self._context.compose(params, runs, task_ids)
        return context + _meta_net(params, runs, task_ids, given.image_features)[..., None, :]

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts the context from the plain prompts of any artifact, and the meta-net from new
        values; from an artifact of CoCoOp, both from the mean of its groups."""
        if source_method.name != self.name:
            context = self._context.transfer(source, source_method, source_runs, runs)
            return {**initial(), **context}
        weights = group_weights(source_weights(self.start_from, source_runs, runs), runs)
        of_group = np.eye(source_runs.num_groups)[np.asarray(source_runs.group_of_row)]
        return {name: weighted_mean(weights @ of_group, x) for name, x in source.items()}

    @property
    def _context(self) -> SharedPrompt:
        return SharedPrompt(self.prompt_length, self.init_prompt, self.start_from)

    def config(self):
        return {"prompt_length": self.prompt_length}


def _meta_net(params: Params, runs: Grouped, task_ids: Array, features: Array) -> Array:
    """Returns the vector [..., H] that is added to the context, for features [..., U]."""
    groups = jnp.asarray(runs.group_of_row)[task_ids]
    own = {name: gather_rows(params[name], groups) for name in _META_NET}
    product = functools.partial(jnp.einsum, "...i,...io->...o", precision=FLOAT32)
    hidden = jax.nn.relu(product(features, own["kernel_in"]) + own["bias_in"])
    return product(hidden, own["kernel_out"]) + own["bias_out"]

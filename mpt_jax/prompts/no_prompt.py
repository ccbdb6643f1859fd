"""Method without a prompt, for pretraining and full fine-tuning."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mpt_jax.prompts.base import NO_CONTEXT, PromptMethod, register


@register
@dataclasses.dataclass(frozen=True)
class NoPrompt(PromptMethod):
    """A method with P = 0 and no parameters. Batches reserve no prompt positions."""

    name = "none"
    prompt_length = 0
    labels = ()
    axes = {}

    def init(self, key, runs, context):
        return {}

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        return jnp.zeros((*task_ids.shape, 0, 0), jnp.float32)

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        raise ValueError(
            "The method 'none' has no prompt to initialize from INITIAL_ARTIFACT. Set "
            "INITIAL_ARTIFACT to None."
        )

    def config(self):
        return {}

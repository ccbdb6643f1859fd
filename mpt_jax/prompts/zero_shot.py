"""CLIP without a prompt (Radford et al. 2021, arXiv 2103.00020): class texts fill the templates."""

from __future__ import annotations

import dataclasses

from mpt_jax.prompts.sites import SitePrompts


@dataclasses.dataclass(frozen=True)
class ZeroShot(SitePrompts):
    """A dual encoder whose sites have no prompts, and which is evaluated as it is."""

    # No site has a method.
    text_context: None = dataclasses.field(default=None, init=False, repr=False)
    image_tokens: None = dataclasses.field(default=None, init=False, repr=False)
    text_classes: int = dataclasses.field(default=0, init=False, repr=False)
    image_layers: int = dataclasses.field(default=1, init=False, repr=False)

    name = "zero_shot"
    schedule_steps = 0

    def __post_init__(self):
        pass

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        raise ValueError(
            f"The method 'zero_shot' has no prompt, so it cannot start from the initial artifact "
            f"(method {source_method.name!r}). Set INITIAL_ARTIFACT to None, or choose the file of "
            "gin/methods that the artifact was trained with."
        )

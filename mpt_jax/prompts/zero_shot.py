"""CLIP without a prompt (Radford et al. 2021, arXiv 2103.00020): class texts fill the templates."""

from __future__ import annotations

import dataclasses

from mpt_jax.prompts.sites import WithoutSites


@dataclasses.dataclass(frozen=True)
class ZeroShot(WithoutSites):
    """A dual encoder whose sites have no prompts, and which is evaluated as it is."""

    name = "zero_shot"

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        raise ValueError(
            f"The method 'zero_shot' has no prompt, so it cannot start from the initial artifact "
            f"(method {source_method.name!r}). Set INITIAL_ARTIFACT to None, or choose the file of "
            "gin/methods that the artifact was trained with."
        )

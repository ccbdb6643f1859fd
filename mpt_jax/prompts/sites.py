"""Prompts of a dual encoder: one prompt method for each place that takes prompts.

A *site* is a place in a frozen network that takes a prompt. A dual encoder (CLIP) has two:

    text_context    [..., P, H]      context words before, around or after a class name
                    [..., C, P, H]   one context for each class
    image_tokens    [..., n, P, H]   tokens beside the patches of an image, in the first layer
                                     (n = 1) or replaced in each of n layers

Any method whose prompts do not depend on a text composes the prompts of a site, as the rows of one
long prompt. Prompt tuning of the text context is CoOp (arXiv 2109.01134), prompt tuning of image
tokens is VPT (arXiv 2203.12119).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

from mpt_jax.core import schema
from mpt_jax.core.shapes import Array, Int, Params
from mpt_jax.prompts.base import (
    NO_CONTEXT,
    InitContext,
    PromptContext,
    PromptMethod,
    method_from_config,
    register_composite,
)
from mpt_jax.prompts.init import ClassLabels, SampledVocabulary, Text

TEXT, IMAGE = "text_context", "image_tokens"


@dataclasses.dataclass(frozen=True)
class SiteContext(InitContext):
    """Inputs to the initializers of a dual encoder's prompts.

    Attributes:
        image_width: H of the image encoder.
        joint_dim: U, the width of the features that are compared.
    """

    image_width: int = 0
    joint_dim: int = 0


@register_composite
@dataclasses.dataclass(frozen=True)
class SitePrompts(PromptMethod):
    """A prompt method for the text context, one for the image tokens, or both.

    Parameters are those of the two methods, below `text_context/` and `image_tokens/`.

    Attributes:
        text_context: the method of the text context; None leaves the text encoder without a prompt.
        image_tokens: the method of the image tokens; None leaves the image encoder without one.
        text_classes: the largest number of classes of a task, if each class has its own context:
            the method then has text_classes P rows. 0 shares a context between classes.
        image_layers: n, the number of layers whose tokens are replaced: the method has n P rows.
            With 1, tokens are inserted in the first layer only.

    Raises:
        ValueError: neither site has a method, a method reads texts or is a `SitePrompts`, rows do
            not divide into classes or layers, or a method has another number of layers.
    """

    text_context: PromptMethod | None = None
    image_tokens: PromptMethod | None = None
    text_classes: int = 0
    image_layers: int = 1

    name = "site_prompts"

    def __post_init__(self):
        if not self.parts:
            raise ValueError(
                "SitePrompts has no method: text_context and image_tokens are both None. Set at "
                "least one of them to a prompt method, such as @prompt_tuning.PromptTuning()."
            )
        for site, method in self.parts.items():
            if isinstance(method, SitePrompts):
                raise ValueError(
                    f"SitePrompts.{site} is another SitePrompts, but a site has one prompt. Set it "
                    "to a method such as @prompt_tuning.PromptTuning()."
                )
            if method.reads_image and (site == IMAGE or self.text_classes):
                raise ValueError(
                    f"The prompts of the method {method.name!r} depend on the image's feature, so "
                    f"it can only compose one context for all classes of a task, not {site} in "
                    f"{self.text_classes} classes. Set it as text_context, with TEXT_CLASSES = 0."
                )
            if method.reads_text:
                raise ValueError(
                    f"The prompts of the method {method.name!r} depend on an input text, but the "
                    f"inputs are images, so it cannot compose {site}. Choose a method whose "
                    "prompts depend only on the task, such as prompt_tuning, mpt or shared_prompt."
                )
        _check_divides(self.text_context, TEXT, self.text_classes or 1, "text_classes")
        _check_divides(self.image_tokens, IMAGE, self.image_layers, "image_layers")

    @property
    def parts(self) -> dict[str, PromptMethod]:
        """The method of each site that has one."""
        both = {TEXT: self.text_context, IMAGE: self.image_tokens}
        return {site: method for site, method in both.items() if method is not None}

    # --- Attributes of the protocol, from those of the parts --------------------------------------

    @property
    def prompt_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of prompt rows of all sites."""
        return sum(method.prompt_length for method in self.parts.values())

    @property
    def labels(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The label rules of all parts, below their sites."""
        return tuple(
            (f"{site}/{pattern}", label)
            for site, method in self.parts.items()
            for pattern, label in method.labels
        )

    @property
    def axes(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logical axes of all parameters, below their sites."""
        return {
            f"{site}/{name}": axes
            for site, method in self.parts.items()
            for name, axes in method.axes.items()
        }

    @property
    def reads_image(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the context depends on the image."""
        return any(method.reads_image for method in self.parts.values())

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part draws prompts in training."""
        return any(method.is_random for method in self.parts.values())

    @property
    def needs_artifact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part needs an initial artifact."""
        return any(method.needs_artifact for method in self.parts.values())

    @property
    def depends_on_run_names(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the prompts of any part depend on run names."""
        return any(method.depends_on_run_names for method in self.parts.values())

    @property
    def start_from(self) -> dict[str, Any]:
        """The rows of the initial artifact that each part starts from, which jobs record."""
        settings = {
            site: getattr(method, "start_from", None) for site, method in self.parts.items()
        }
        return {site: setting for site, setting in settings.items() if setting is not None}

    @property
    def schedule_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The length of the longest schedule of a part."""
        return max((method.schedule_steps for method in self.parts.values()), default=0)

    # --- Methods of the protocol ------------------------------------------------------------------

    def init(self, key, runs, context):
        start = getattr(self.image_tokens, "init_prompt", None)
        if isinstance(start, SampledVocabulary | ClassLabels | Text):
            raise ValueError(
                f"Image tokens cannot start from token embeddings ({type(start).__name__}), which "
                "are inputs of the text encoder. Set IMAGE_INIT to @init.Uniform() or "
                "@init.Normal()."
            )
        without_vocabulary = jnp.zeros((0, context.image_width), jnp.float32)
        of_texts = dataclasses.replace(context, parts=self.text_classes or 1)
        contexts = {TEXT: of_texts, IMAGE: InitContext(without_vocabulary)}
        return {
            site: method.init(jax.random.fold_in(key, number), runs, contexts[site])
            for number, (site, method) in enumerate(self.parts.items())
        }

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        what = f"with prompts for {' and '.join(self.parts)}" if self.parts else "without prompts"
        raise ValueError(
            f"An artifact {what} has no single plain prompt [P, H], so it cannot be merged with "
            "other artifacts, and other methods cannot start from it. Set INITIAL_ARTIFACT to this "
            "artifact only, in a job for images."
        )

    def compose_site(
        self,
        site: str,
        params: Params,
        runs: Any,
        task_ids: Int[Array, "..."],
        given: PromptContext = NO_CONTEXT,
    ) -> Array:
        """Returns the prompts of a site for the bank rows `task_ids` [...], with the shapes of the
        module docstring."""
        rows = self.parts[site].compose(params[site], runs, task_ids, given)
        count = {TEXT: self.text_classes, IMAGE: self.image_layers}[site]
        if not count:
            return rows
        return rows.reshape((*rows.shape[:-2], count, -1, rows.shape[-1]))

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts each site from the same site of the artifact, whose prompts must have as many
        classes and layers."""
        source_method, source = source_method.separated(source, source_runs)
        theirs = source_method.parts
        if missing := [site for site in self.parts if site not in theirs]:
            raise ValueError(
                f"This job has prompts for {' and '.join(self.parts)}, but the initial artifact "
                f"(method {source_method.name!r}) has none for {' and '.join(missing)}. Set "
                "INITIAL_ARTIFACT to an artifact with prompts for the same sites."
            )
        for site, setting in ((TEXT, "text_classes"), (IMAGE, "image_layers")):
            own, other = getattr(self, setting), getattr(source_method, setting)
            if site in self.parts and own != other:
                raise ValueError(
                    f"SitePrompts.{setting} is {own}, but the initial artifact has {other}. Use "
                    "the same value in both jobs."
                )
        started: dict[str, Any] = {}
        for site, method in self.parts.items():
            new: Any = lambda site=site: initial()[site]  # noqa: E731
            started[site] = method.transfer(source[site], theirs[site], source_runs, runs, new)
        return started

    def source_prompt_length(self, source_method, source_runs):
        """Returns the length of an artifact's prompts at all its sites, whose prompts must have the
        lengths of this method's at the sites of both."""
        return sum(
            self.parts.get(site, method).source_prompt_length(method, source_runs)
            for site, method in source_method.parts.items()
        )

    def statistics(self, params, runs):
        return {
            f"{site}/{name}": value
            for site, method in self.parts.items()
            for name, value in method.statistics(params[site], runs).items()
        }

    @property
    def inference_method(self):
        methods = {site: method.inference_method for site, method in self.parts.items()}
        return dataclasses.replace(self, **methods)

    def for_inference(self, params):
        kept = {site: part.for_inference(params[site]) for site, part in self.parts.items()}
        return self.inference_method, {site: own for site, (_, own) in kept.items()}

    def config(self):
        sites = {
            site: {"method": method.name, "config": method.config()}
            for site, method in self.parts.items()
        }
        return {**sites, "text_classes": self.text_classes, "image_layers": self.image_layers}

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], what: str) -> SitePrompts:
        """Builds the method from the settings that `config` returned; see
        `prompts.base.method_from_config`."""
        checked = schema.check(dict(settings), _Config, what)
        sites = {TEXT: checked.text_context, IMAGE: checked.image_tokens}
        methods: dict[str, Any] = {
            site: method_from_config(x.method, x.config, f"{what} ({site})")
            for site, x in sites.items()
            if x is not None
        }
        return cls(**methods, text_classes=checked.text_classes, image_layers=checked.image_layers)


@dataclasses.dataclass(frozen=True)
class WithoutSites(SitePrompts):
    """Base class of methods for image models that prompt neither texts nor image tokens."""

    text_context: None = dataclasses.field(default=None, init=False, repr=False)
    image_tokens: None = dataclasses.field(default=None, init=False, repr=False)
    text_classes: int = dataclasses.field(default=0, init=False, repr=False)
    image_layers: int = dataclasses.field(default=1, init=False, repr=False)

    def __post_init__(self):
        """Sites without methods are valid."""


def num_rows(positions: int, parts: int) -> int:
    """Returns the `prompt_length` of a site's method, for use in gin files.

    Args:
        positions: P, the number of positions of one prompt.
        parts: the number of layers, or of classes, that have a prompt each; 0 for one prompt.
    """
    return positions * max(parts, 1)


class _Part(msgspec.Struct):
    """The schema of one site in an artifact's settings."""

    method: str
    config: dict[str, Any]


class _Config(msgspec.Struct):
    """The schema of an artifact's settings."""

    text_context: _Part | None = None
    image_tokens: _Part | None = None
    text_classes: schema.Count = 0
    image_layers: schema.Positive = 1


def _check_divides(method: PromptMethod | None, site: str, parts: int, setting: str) -> None:
    layers = getattr(method, "layers", 1)  # of methods with parameters for each layer, such as MPT
    if layers not in (1, parts):
        raise ValueError(
            f"The method of {site} has layers = {layers}, but SitePrompts.{setting} is {parts}. "
            "Set both to the same number, or layers to 1."
        )
    if method is not None and (parts < 1 or method.prompt_length % parts):
        raise ValueError(
            f"The {method.prompt_length} prompt rows of {site} do not divide into "
            f"{setting} = {parts} equal parts. Set the prompt_length of its method to a multiple "
            f"of {parts}."
        )

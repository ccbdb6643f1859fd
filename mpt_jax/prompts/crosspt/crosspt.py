"""CrossPT (arXiv 2509.14253): prompts mixed from shared trainable sources and private prompts.

    soft_k = sum_j w_kj S_j                      w_k from a trained router (`routing`)

    compose_by        P_k                        its length
    sum               soft_k                     l
    cat               w_kj S_j, concatenated     l times the number of sources kept
    private_sum       soft_k + Z_k (see share)   l
    private_product   soft_k o Z_k               l
    private_cat       soft_k, then Z_k           l + the length of Z_k
    private           Z_k                        l

A group of tasks shares its sources. With GROUPS = 'joint' all targets share one set (the
multi-task forms, MSUM and MCAT); with 'independent' each target has a separate set (SSUM and
SCAT). Inference is deterministic, so unless the router reads the text, a task has one plain
prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import Runs, entry_of_run, unknown_name
from mpt_jax.prompts import prompt_attention, reparameterization
from mpt_jax.prompts.base import NO_CONTEXT, PromptMethod, name_key, register
from mpt_jax.prompts.crosspt import mixing, transfer
from mpt_jax.prompts.crosspt.compositions import (
    ADD,
    ALL,
    COMPOSITIONS,
    DEFAULT_ROUTER,
    EXAMPLE,
    JOINT,
    LEARNED,
    NORMALIZE_BY,
    RUN,
    SHARE_TEMPERATURE,
    Composition,
    check_counts,
    check_effects,
    concat_sources,
    weighted_sum,
)
from mpt_jax.prompts.crosspt.routing import (
    NORMALIZE,
    ROUTERS,
    Annealing,
)
from mpt_jax.prompts.init import PromptInits, SampledVocabulary, initial_prompts
from mpt_jax.prompts.prompt_attention import TextAttention
from mpt_jax.prompts.row_ops import (
    first_row_of_groups,
    gather_group_params,
    gather_rows,
)
from mpt_jax.prompts.warm_start import (
    StartFrom,
    named_sources,
)


@register
@dataclasses.dataclass(frozen=True)
class CrossPT(PromptMethod):
    """Prompts composed from shared sources and a private prompt; see the module docstring.

    Parameters: `sources` [G, S, l, H], `private` [K, n, H], `router` [K, S], `share` [K]; for
    random draws `clock` [G], which counts steps; for the router `'attention'` the parameters of
    `prompt_attention`; and those of MLPs (`reparameterization`). Unused parameters are omitted.

    Attributes:
        length: l, the length of a source prompt.
        sources: the names of the S sources: runs of the initial artifact or, without an artifact,
            any names.
        compose_by: see the module docstring.
        router: see `routing`.
        normalize: for the relaxed Bernoulli, `'softmax'` (the released code) or `'sum'` (ours).
        draws: `'example'` for random draws of each example (the released code), or `'run'` for one
            draw of all examples of a run in a step.
        top_k: the number of highest-scoring sources that each prompt is mixed from; None means
            all.
        share: for `'private_sum'`: `'add'` for soft_k + Z_k, a number g for (1 - g) soft_k + g Z_k,
            `'learned'` for one trained g per task, or `'joint'` for soft_k + w Z_k, where the
            router scores Z_k together with the sources. The released code calls these target_share
            2, g and -1, and compose_method wsp.
        share_temperature: the temperature of the draws of a learned share; None uses `annealing`.
        private_length: n, the length of private prompts, for `'private_cat'`: one number, or a
            mapping from run name to length; None means l.
        annealing: the temperature schedule of the draws.
        width, temperature: settings of the router `'attention'` (`prompt_attention`, `'sub'`).
        reparameterize: the prompts to train through an MLP: `'sources'`, `'private'` or both in a
            list, or `'all'` for those that `compose_by` has. Artifacts hold the MLP's output
            instead of the MLP.
        init_sources: the initializer of sources, used if there is no initial artifact.
        init_prompt: the initializer of private prompts.
        start_from: the runs of a CrossPT artifact to start from, as for `MPT`.

    Raises:
        ValueError: a name is unknown, a number is out of range, or a setting has no effect.
    """

    length: int
    sources: Sequence[str]
    compose_by: str = "private_sum"
    router: str = DEFAULT_ROUTER
    normalize: str = NORMALIZE_BY
    draws: str = EXAMPLE
    top_k: int | None = None
    share: str | int | float = ADD
    share_temperature: float | None = SHARE_TEMPERATURE
    private_length: int | Mapping[str, int] | None = None
    annealing: Annealing | Mapping[str, Any] = Annealing()
    width: int = 100
    temperature: float = 2000.0
    reparameterize: str | Sequence[str] = ()
    init_sources: PromptInits = SampledVocabulary()
    init_prompt: PromptInits = SampledVocabulary()
    start_from: StartFrom = "average"

    name = "crosspt"
    labels = (
        (rf"sources({reparameterization.PATTERN})?", "source"),
        (rf"private({reparameterization.PATTERN})?", "private"),
        (r"(router|share)", "router"),
        (r"clock", "clock"),
        *prompt_attention.LABELS,
    )
    axes = {
        "sources": ("groups", "sources", "prompt", "embed"),
        **reparameterization.axes("sources", ("groups", "sources")),
        "private": ("tasks", "prompt", "embed"),
        **reparameterization.axes("private", ("tasks",)),
        "router": ("tasks", "sources"),
        "share": ("tasks",),
        "clock": ("groups",),
        **prompt_attention.AXES,
    }

    def __post_init__(self):
        object.__setattr__(self, "sources", named_sources(self.sources))
        if isinstance(self.annealing, Mapping):  # from an artifact's config
            object.__setattr__(self, "annealing", Annealing(**self.annealing))
        for what, value, known in (
            ("compose_by", self.compose_by, COMPOSITIONS),
            ("router", self.router, ROUTERS),
            ("normalize", self.normalize, NORMALIZE),
            ("draws", self.draws, (EXAMPLE, RUN)),
        ):
            if value not in known:
                raise ValueError(unknown_name(f"CrossPT.{what}", value, list(known)))
        if self.reparameterize == ALL:
            of_kind = {
                "sources": self.composition.has_sources,
                "private": self.composition.has_private,
            }
            object.__setattr__(self, "reparameterize", tuple(n for n in of_kind if of_kind[n]))
        self.attention()
        check_counts(self)
        check_effects(self)

    # --- Properties ------------------------------------------------------------------------------

    @property
    def prompt_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """P, the length of the whole prompt."""
        if self.composition.is_cat:
            return self.length * (self.top_k or len(self.sources))
        return self.length + (self.longest_private if self.composition.longer else 0)

    def prompt_lengths(self, runs):
        if not isinstance(self.private_length, Mapping):
            return super().prompt_lengths(runs)
        private = self.private_length
        return tuple(
            self.length + entry_of_run(private, run, "PRIVATE_LENGTH") for run in runs.run_names
        )

    def source_prompt_length(self, source_method, source_runs):
        if source_method.name != self.name:
            return self.length
        # For a CrossPT artifact, `transfer` compares the length of each run.
        return max(source_method.prompt_lengths(source_runs))

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether training draws weights or shares at random."""
        routed = self.composition.has_sources and ROUTERS[self.router].is_random
        return routed or self.share == LEARNED

    @property
    def depends_on_run_names(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether random draws or private lengths depend on run names."""
        return self.is_random or isinstance(self.private_length, Mapping)

    @property
    def reads_text(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the router reads the text."""
        return self.composition.has_sources and ROUTERS[self.router].reads_text

    @property
    def schedule_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Steps over which the temperature of draws is annealed; 0 if nothing is drawn."""
        assert isinstance(self.annealing, Annealing)
        return self.annealing.steps if self.is_random else 0

    @property
    def candidates(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the sources; empty if the composition does not use them."""
        return tuple(self.sources) if self.composition.has_sources else ()

    @property
    def composition(self) -> Composition:
        """The parts of a composed prompt."""
        return COMPOSITIONS[self.compose_by]

    @property
    def num_scored(self) -> int:
        """The number of prompts that the router scores: the sources and, if joint, Z."""
        return len(self.sources) + (self.share == JOINT)

    @property
    def longest_private(self) -> int:
        """The length of the longest private prompt."""
        if self.private_length is None:
            return self.length
        lengths = self.private_length
        return max(lengths.values()) if isinstance(lengths, Mapping) else lengths

    def attention(self) -> TextAttention:
        """Returns the router `'attention'`."""
        return TextAttention("sub", self.width, self.temperature)

    # --- Parameters ------------------------------------------------------------------------------

    def init(self, key, runs, context):
        rows, width = range(runs.num_rows), context.embedding.shape[1]
        params, kind = {}, self.composition
        if kind.has_sources:
            params["sources"] = jnp.stack(
                [
                    self._initial_sources(name_key(key, runs.run_names[row]), context)
                    for row in first_row_of_groups(runs)
                ]
            )
            if ROUTERS[self.router].has_logits:
                params["router"] = jnp.zeros((runs.num_rows, self.num_scored))
            if ROUTERS[self.router].reads_text:
                params |= self.attention().init(key, runs.num_groups, width)
        if kind.has_private:
            length = self.longest_private if kind.longer else self.length
            params["private"] = initial_prompts(self.init_prompt, key, runs, rows, length, context)
        if self.share == LEARNED:
            params["share"] = jnp.zeros(runs.num_rows)
        if self.is_random:
            params["clock"] = jnp.zeros(runs.num_groups)
        for name in self.reparameterize:
            params |= reparameterization.init(key, name, params[name])
        return params

    def _initial_sources(self, key, context):
        rows, runs = range(len(self.sources)), Runs(self.sources)
        return initial_prompts(self.init_sources, key, runs, rows, self.length, context)

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts from a CrossPT artifact, or from the plain prompts of any other artifact.

        The plain prompts named in `sources` become the sources of every group.
        """
        return transfer.transfer(self, source, source_method, source_runs, runs, initial)

    @property
    def inference_method(self) -> CrossPT:  # pyright: ignore[reportIncompatibleVariableOverride]
        training_only = {
            "reparameterize": (),
            "annealing": Annealing(),
            "draws": EXAMPLE,
            "share_temperature": SHARE_TEMPERATURE,
        }
        return dataclasses.replace(self, **training_only)

    def for_inference(self, params):
        """Drops the clock, and replaces reparameterized prompts with the output of their MLPs."""
        kept = {name: jnp.asarray(params[name]) for name in params if name != "clock"}
        for name in self.reparameterize:
            kept = reparameterization.without_mlp(kept, name)
        return self.inference_method, kept

    # --- Composition -----------------------------------------------------------------------------

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        draws = self.is_random and given.key is not None and self.draws == EXAMPLE
        by_run = isinstance(runs, Runs) and not self.reads_text and not draws
        if by_run and runs.num_rows < task_ids.size:
            # With fewer prompts than examples, each prompt is composed once and then gathered.
            return gather_rows(
                self._compose(params, runs, jnp.arange(runs.num_rows), given), task_ids
            )
        return self._compose(params, runs, task_ids, given)

    def _compose(self, params, runs, task_ids, given) -> Any:
        soft = private = None
        if self.composition.has_sources:
            sources = gather_group_params(
                reparameterization.apply(params, "sources"), runs, task_ids
            )
            scored, indices = mixing.mixture_weights(self, params, runs, task_ids, given)
            if self.composition.is_cat:
                return concat_sources(sources, scored, indices)
            soft = weighted_sum(scored[..., : len(self.sources)], sources)
        if self.composition.has_private:
            private = gather_rows(reparameterization.apply(params, "private"), task_ids)
            if self.share == JOINT:
                private = scored[..., -1:, None] * private
        return self._combined(params, runs, task_ids, given, soft, private)

    def _combined(self, params, runs, task_ids, given, soft, private):
        if soft is None or private is None:
            return soft if private is None else private
        if self.composition.longer:
            return jnp.concatenate([soft, private], axis=-2)
        if self.compose_by == "private_product":
            return soft * private
        if self.share in (ADD, JOINT):
            return soft + private
        if isinstance(self.share, str):
            logits = gather_rows(params["share"], task_ids)[..., None]
            drawn, temperature = mixing.add_noise(
                self, logits, params, runs, task_ids, given, "share"
            )
            part: Any = jax.nn.sigmoid(drawn / temperature)[..., None]
        else:
            part = self.share
        return (1 - part) * soft + part * private

    def mixture(self, params, runs, task_ids, given=NO_CONTEXT):
        return mixing.mixture_weights(self, params, runs, task_ids, given)[0][
            ..., : len(self.sources)
        ]

    # --- Records ---------------------------------------------------------------------------------

    @classmethod
    def read_config(cls, settings):
        """Leaves out the normalization of routers that it does not affect, whose default was
        another in earlier versions."""
        router = ROUTERS.get(settings.get("router", DEFAULT_ROUTER))
        if router is None or router.is_random:
            return settings
        return {name: value for name, value in settings.items() if name != "normalize"}

    def config(self):
        lengths = self.private_length
        return {
            **self.transfer_settings(),
            "private_length": dict(lengths) if isinstance(lengths, Mapping) else lengths,
            "annealing": dataclasses.asdict(self.annealing),  # pyright: ignore[reportArgumentType]
            "reparameterize": list(self.reparameterize),
            "draws": self.draws,
            "share_temperature": self.share_temperature,
        }

    def transfer_settings(self) -> dict[str, Any]:
        """Returns the settings in which a job and its initial CrossPT artifact must agree."""
        return {
            "length": self.length,
            "sources": list(self.sources),
            "compose_by": self.compose_by,
            "router": self.router,
            "normalize": self.normalize,
            "top_k": self.top_k,
            "share": self.share,
            "width": self.width,
            "temperature": self.temperature,
        }

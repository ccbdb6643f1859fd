"""CrossPT (arXiv 2509.14253): prompts mixed from shared sources that go on learning, with a private
prompt for each task.

    soft_k = sum_j w_kj S_j                      w_k from a learned router (`routing`)

    compose_by        P_k                        its length
    sum               soft_k                     l
    cat               w_kj S_j, one by one       l times their number
    private_sum       soft_k + Z_k (see share)   l
    private_product   soft_k o Z_k               l
    private_cat       soft_k, then Z_k           l + Z_k's own
    private           Z_k                        l

The sources belong to a group of tasks. With GROUPS = 'joint' all targets share one set (the
multi-task forms, MSUM and MCAT); with 'independent' each has its own (SSUM and SCAT). Inference is
deterministic, so unless the router reads the text, a task's prompt folds into one matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import Runs, unknown_name
from mpt_jax.prompts import prompt_attention, reparameterization
from mpt_jax.prompts.base import NO_CONTEXT, PromptMethod, name_key, register
from mpt_jax.prompts.crosspt.compositions import (
    ADD,
    COMPOSITIONS,
    DEFAULT_ROUTER,
    LEARNED,
    Composition,
    check_counts,
    check_effects,
    check_private,
    concat_sources,
    weighted_sum,
)
from mpt_jax.prompts.crosspt.routing import (
    NORMALIZE,
    ROUTERS,
    Annealing,
    keep_largest,
    noise,
    of_rows,
)
from mpt_jax.prompts.init import PromptInits, SampledVocabulary, initial_prompts
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_attention import TextAttention
from mpt_jax.prompts.row_ops import (
    expand_leading_dims,
    first_row_of_groups,
    gather_group_params,
    gather_rows,
)
from mpt_jax.prompts.warm_start import (
    StartFrom,
    named_sources,
    shared_groups,
    source_weights,
    weighted_mean,
)


@register
@dataclasses.dataclass(frozen=True)
class CrossPT(PromptMethod):
    """Prompts composed from shared sources and a private prompt, see the module.

    Parameters: `sources` [G, S, l, H], `private` [K, Z, H], `router` [K, S], `share` [K], and of
    the relaxed Bernoulli `clock` [G], which counts steps; each where it is used.

    Attributes:
        length: l, of a source prompt.
        sources: names of the S sources: rows of the initial artifact, or any names from scratch.
        compose_by: see the module.
        router: see `routing`.
        normalize: of the relaxed Bernoulli, `'sum'` or `'softmax'` (the released code).
        top_k: how many sources a prompt is mixed from, those of the largest scores; None for all.
        share: of `'private_sum'`: `'add'` for soft + Z, a number g for (1 - g) soft + g Z, or
            `'learned'` for a g of each task's own.
        private_length: Z of `'private_cat'`, for all or run -> its own; None for l.
        annealing: of the temperature of draws.
        width, temperature: of the router `'attention'` (`text_attention`, `'sub'`).
        reparameterize: `'sources'`, `'private'` or both learn through an MLP of their own, which
            artifacts leave out.
        init_sources: initial values of sources, where there is no artifact.
        init_prompt: initial values of private prompts.
        start_from: of an artifact of CrossPT's own: `'same'`, `'average'` and so on, as for MPT.

    Raises:
        ValueError: an unknown name, a number out of its range, a setting without effect.
    """

    length: int
    sources: Sequence[str]
    compose_by: str = "private_sum"
    router: str = DEFAULT_ROUTER
    normalize: str = "sum"
    top_k: int | None = None
    share: str | int | float = ADD
    private_length: int | Mapping[str, int] | None = None
    annealing: Annealing | Mapping[str, Any] = Annealing()
    width: int = 100
    temperature: float = 2000.0
    reparameterize: Sequence[str] = ()
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
        if isinstance(self.annealing, Mapping):  # of an artifact
            object.__setattr__(self, "annealing", Annealing(**self.annealing))
        for what, value, known in (
            ("compose_by", self.compose_by, COMPOSITIONS),
            ("router", self.router, ROUTERS),
            ("normalize", self.normalize, NORMALIZE),
        ):
            if value not in known:
                raise ValueError(unknown_name(what, value, list(known)))
        self._attention()
        check_counts(self)
        check_effects(self)

    # --- What it is ------------------------------------------------------------------------------

    @property
    def prompt_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """P, of all pieces together."""
        if self._kind.is_cat:
            return self.length * (self.top_k or len(self.sources))
        return self.length + (self._longest_private if self._kind.longer else 0)

    def prompt_lengths(self, runs):
        if not isinstance(self.private_length, Mapping):
            return super().prompt_lengths(runs)
        own = self.private_length
        for run in runs.run_names:
            if run not in own:
                raise ValueError(unknown_name("run in private_length", run, list(own)))
        return tuple(self.length + own[run] for run in runs.run_names)

    def source_prompt_length(self, source_method, source_runs):
        if source_method.name != self.name:
            return self.length
        # Of its own kind: `transfer` compares the lengths of each run.
        return max(source_method.prompt_lengths(source_runs))

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether training draws weights or shares."""
        routed = self._kind.has_sources and ROUTERS[self.router].is_random
        return routed or self.share == LEARNED

    @property
    def depends_on_run_names(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a run's name matters: to draws, and to lengths of its own."""
        return self.is_random or isinstance(self.private_length, Mapping)

    @property
    def reads_text(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the router does."""
        return self._kind.has_sources and ROUTERS[self.router].reads_text

    @property
    def schedule_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Steps over which the temperature of draws falls."""
        assert isinstance(self.annealing, Annealing)
        return self.annealing.steps if self.is_random else 0

    @property
    def candidates(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The sources, where they are used."""
        return tuple(self.sources) if self._kind.has_sources else ()

    @property
    def _kind(self) -> Composition:
        return COMPOSITIONS[self.compose_by]

    @property
    def _longest_private(self) -> int:
        if self.private_length is None:
            return self.length
        own = self.private_length
        return max(own.values()) if isinstance(own, Mapping) else own

    def _attention(self) -> TextAttention:
        return TextAttention("sub", self.width, self.temperature)

    # --- Parameters ------------------------------------------------------------------------------

    def init(self, key, runs, context):
        rows, width = range(runs.num_rows), context.embedding.shape[1]
        found, kind = {}, self._kind
        if kind.has_sources:
            found["sources"] = jnp.stack(
                [
                    self._first_sources(name_key(key, runs.run_names[row]), context)
                    for row in first_row_of_groups(runs)
                ]
            )
            if ROUTERS[self.router].has_logits:
                found["router"] = jnp.zeros((runs.num_rows, len(self.sources)))
            if ROUTERS[self.router].reads_text:
                found |= self._attention().init(key, runs.num_groups, width)
        if kind.has_private:
            length = self._longest_private if kind.longer else self.length
            found["private"] = initial_prompts(self.init_prompt, key, runs, rows, length, context)
        if self.share == LEARNED:
            found["share"] = jnp.zeros(runs.num_rows)
        if self.is_random:
            found["clock"] = jnp.zeros(runs.num_groups)
        for name in self.reparameterize:
            found |= reparameterization.init(key, name, found[name])
        return found

    def _first_sources(self, key, context):
        rows, runs = range(len(self.sources)), Runs(self.sources)
        return initial_prompts(self.init_sources, key, runs, rows, self.length, context)

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """From any method's prompts, which become every group's sources; or from CrossPT's own
        artifact."""
        resumed = source_method.name == self.name
        started = {"sources", "private"} if resumed else {"sources"}
        if scrambled := sorted(started & set(self.reparameterize)):
            raise ValueError(
                f"{' and '.join(scrambled)} start from an artifact, and cannot learn through MLPs "
                "whose first values are random: leave them out of reparameterize."
            )
        if resumed:
            return self._resumed(source, source_method, source_runs, runs, initial)
        if self.start_from not in ("average", "same"):
            raise ValueError(
                f"START_FROM = {self.start_from!r} would have no effect: from plain prompts every "
                "group gets those that SOURCES names. Leave it at 'average'."
            )
        if not self._kind.has_sources:
            raise ValueError(
                f"compose_by = {self.compose_by!r} has no source prompts that could start from an "
                "artifact; set INITIAL_ARTIFACT to None."
            )
        folded = materialize(source_method, source, source_runs)
        sources = folded[jnp.asarray([source_runs.row(name) for name in self.sources])]
        return {**initial(), "sources": jnp.stack([sources] * runs.num_groups)}

    def _resumed(self, source, source_method, source_runs, runs, initial):
        ours, theirs = self._lasting(), source_method._lasting()
        if ours != theirs:
            raise ValueError(
                f"The artifact's CrossPT is {theirs}, and this run's {ours}: they must agree."
            )
        weights = source_weights(self.start_from, source_runs, runs)
        groups = jnp.asarray(shared_groups(weights, source_runs, runs))
        found = initial()
        for name in source:
            shared = self.axes[name][0] == "groups"
            found[name] = source[name][groups] if shared else weighted_mean(weights, source[name])
        if self._kind.longer:
            check_private(self, runs, source_method, source_runs, weights)
            # Z is the longest of its method's; nobody reads behind a prompt's own end.
            private = found["private"][:, : self._longest_private]
            rest = self._longest_private - private.shape[1]
            found["private"] = jnp.pad(private, ((0, 0), (0, rest), (0, 0)))
        return found

    def for_inference(self, params):
        """Without the clock, and with what MLPs make of prompts in their place."""
        kept = {name: jnp.asarray(params[name]) for name in params if name != "clock"}
        for name in self.reparameterize:
            kept = reparameterization.without_mlp(kept, name)
        return dataclasses.replace(self, reparameterize=(), annealing=Annealing()), kept

    # --- Composition -----------------------------------------------------------------------------

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        if isinstance(runs, Runs) and not self.reads_text and runs.num_rows < task_ids.size:
            # Fewer prompts than examples, and the sources of none are gathered twice.
            return gather_rows(
                self._compose(params, runs, jnp.arange(runs.num_rows), given), task_ids
            )
        return self._compose(params, runs, task_ids, given)

    def _compose(self, params, runs, task_ids, given) -> Any:
        soft = private = None
        if self._kind.has_sources:
            sources = gather_group_params(
                reparameterization.apply(params, "sources"), runs, task_ids
            )
            weights, places = self._weights(params, runs, task_ids, given)
            if self._kind.is_cat:
                return concat_sources(sources, weights, places)
            soft = weighted_sum(weights, sources)
        if self._kind.has_private:
            private = gather_rows(reparameterization.apply(params, "private"), task_ids)
        return self._combined(params, runs, task_ids, given, soft, private)

    def _combined(self, params, runs, task_ids, given, soft, private):
        if soft is None or private is None:
            return soft if private is None else private
        if self._kind.longer:
            return jnp.concatenate([soft, private], axis=-2)
        if self.compose_by == "private_product":
            return soft * private
        if self.share == ADD:
            return soft + private
        if isinstance(self.share, str):
            logits = gather_rows(params["share"], task_ids)[..., None]
            drawn, temperature = self._drawn(logits, params, runs, task_ids, given, "share")
            part: Any = jax.nn.sigmoid(drawn / temperature)[..., None]
        else:
            part = self.share
        return (1 - part) * soft + part * private

    def mixture(self, params, runs, task_ids, given=NO_CONTEXT):
        return self._weights(params, runs, task_ids, given)[0]

    def _weights(self, params, runs, task_ids, given):
        """The weight [..., S] of each source, 0 where it has no part; and the places of those that
        have one, [..., k]."""
        router, logits = ROUTERS[self.router], self._logits(params, runs, task_ids, given)
        drawn, temperature = logits, 1.0
        if router.is_random:
            drawn, temperature = self._drawn(logits, params, runs, task_ids, given, "router")
        # Draws at a low temperature are all but 0 or 1; what they come from still tells them apart.
        kept, places = keep_largest(drawn, self.top_k)
        scores = router.scores(drawn / temperature)
        if not router.normalized:
            return jnp.where(kept, scores, 0.0), places
        normalize = NORMALIZE[self.normalize if router.is_random else "sum"]
        return normalize(scores, logits, kept, given.key is not None), places

    def _logits(self, params, runs, task_ids, given):
        if ROUTERS[self.router].reads_text:
            sources = gather_group_params(
                reparameterization.apply(params, "sources"), runs, task_ids
            )
            found = self._attention().scores(params, runs, task_ids, given.pooled, sources)
            return found[..., 0]
        if "router" in params:
            return gather_rows(params["router"], task_ids)
        return jnp.zeros((*task_ids.shape, len(self.sources)))

    def _drawn(self, logits, params, runs, task_ids, given, name):
        """Logits [..., n] with the noise of the step, and the temperature of its draws; without a
        step as they are."""
        if given.key is None:
            return logits, 1.0
        assert isinstance(self.annealing, Annealing)
        clock = jax.lax.stop_gradient(gather_group_params(params["clock"], runs, task_ids))
        temperature = expand_leading_dims(self.annealing(clock)[..., None], logits.ndim)
        key = jax.random.fold_in(given.key, ("router", "share").index(name))
        return logits + of_rows(noise(key, runs, logits.shape[-1]), task_ids), temperature

    # --- Records ---------------------------------------------------------------------------------

    def config(self):
        own = self.private_length
        return {
            **self._lasting(),
            "private_length": dict(own) if isinstance(own, Mapping) else own,
            "annealing": dataclasses.asdict(self.annealing),  # pyright: ignore[reportArgumentType]
            "reparameterize": list(self.reparameterize),
        }

    def _lasting(self) -> dict[str, Any]:
        """What two CrossPTs must have in common for one to go on with the other's parameters."""
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

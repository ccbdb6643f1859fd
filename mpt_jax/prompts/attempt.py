"""ATTEMPT (Asai et al. 2022, arXiv 2205.11961): frozen prompts mixed by attention to the text.

    P(x) = P_t + sum_j a_j(x) P_j        j over the source prompts and the target's own prompt

The source prompts are trained first (gin/pt_source.gin) and then frozen. Each task trains its own
prompt P_t. Each group of tasks trains an attention `a` over the candidates (`prompt_attention`),
which reads the text. A task therefore has no fixed prompt, and a server needs all parameters.

Differences from the released code: the text vector excludes padding, the LayerNorm's scale and
bias are trained, and the attention's learning rate takes effect (its label is `router`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpt_jax.core.comparison import differences
from mpt_jax.core.runs import Runs
from mpt_jax.prompts import prompt_attention
from mpt_jax.prompts.base import FLOAT32, NO_CONTEXT, PromptMethod, register
from mpt_jax.prompts.init import PromptInits, SampledVocabulary, initial_prompts
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_attention import TextAttention
from mpt_jax.prompts.row_ops import gather_rows
from mpt_jax.prompts.warm_start import (
    FIRST,
    StartFrom,
    named_sources,
    shared_groups,
    source_weights,
    weighted_mean,
)

TARGET = "target"


@register
@dataclasses.dataclass(frozen=True)
class ATTEMPT(PromptMethod):
    """`P(x) = target[k] + sum_j a_j(x) candidate_j`.

    Parameters: `sources` [S, P, H], frozen and shared by all tasks; `target` [K, P, H]; and the
    attention's parameters, one set per group.

    Attributes:
        prompt_length: P.
        sources: the names of the S source prompts, which are runs of the initial artifact.
        attention: `'sub'` (the paper's), `'linear'`, `'dot'`, `'token'` or `'constant'`.
        width: bottleneck width of the attention; 100 in the paper.
        temperature: T. The paper's scripts use 2087 for T5-base (H times e); the code's default
            is 2000.
        attend_target: whether a task's own prompt is one of its candidates.
        init_prompt: the initializer of each task's own prompt.
        start_from: the source prompt that each task's own prompt starts from: `'first'` (the first
            of `sources`, as in the paper) or a setting of `warm_start`. With an ATTEMPT artifact,
            the runs to start from, as for `MPT`; `'first'` is then an error.

    Raises:
        ValueError: `sources` is empty or a string, or repeats a name; or `TextAttention` rejects
            a setting.
    """

    prompt_length: int
    sources: Sequence[str]
    attention: str = "sub"
    width: int = 100
    temperature: float = 2000.0
    attend_target: bool = True
    init_prompt: PromptInits = SampledVocabulary()
    start_from: StartFrom = FIRST

    name = "attempt"
    needs_artifact = True
    labels = ((r"sources", "frozen"), (r"target", "task"), *prompt_attention.LABELS)
    axes = {
        "sources": ("sources", "prompt", "embed"),
        "target": ("tasks", "prompt", "embed"),
        **prompt_attention.AXES,
    }

    def __post_init__(self):
        object.__setattr__(self, "sources", named_sources(self.sources))
        self._attention()

    def _attention(self) -> TextAttention:
        return TextAttention(self.attention, self.width, self.temperature)

    @property
    def reads_text(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether prompts depend on the text."""
        return self._attention().reads_text

    @property
    def candidates(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the sources and, with `attend_target`, of the task's own prompt."""
        return (*self.sources, TARGET) if self.attend_target else tuple(self.sources)

    def init(self, key, runs, context):
        rows, width = range(runs.num_rows), context.embedding.shape[1]
        target = initial_prompts(self.init_prompt, key, runs, rows, self.prompt_length, context)
        sources = initial_prompts(
            self.init_prompt,
            key,
            Runs(self.sources),
            range(len(self.sources)),
            self.prompt_length,
            context,
        )
        attention = self._attention().init(key, runs.num_groups, width)
        return {"sources": sources, "target": target, **attention}

    def compose(self, params, runs, task_ids, given=NO_CONTEXT):
        weights = self._weights(params, runs, task_ids, given)
        own, count = gather_rows(params["target"], task_ids), len(self.sources)
        by_row = jnp.broadcast_to(weights, (*weights.shape[:-1], self.prompt_length))
        mixed = jnp.einsum(
            "...sp,sph->...ph", by_row[..., :count, :], params["sources"], precision=FLOAT32
        )
        if self.attend_target:
            own = own + weights[..., count, :, None] * own
        return own + mixed

    def mixture(self, params, runs, task_ids, given=NO_CONTEXT):
        """Returns the candidates' weights, averaged over prompt rows if these differ."""
        return self._weights(params, runs, task_ids, given).mean(-1)

    def _weights(self, params, runs, task_ids, given):
        """Returns weights [..., J, 1], or [..., J, P] if the attention is by row."""
        attention = self._attention()
        scores = [
            attention.scores(params, runs, task_ids, given.pooled, prompts)
            for prompts in self._candidate_prompts(params, task_ids)
        ]
        return jax.nn.softmax(jnp.concatenate(scores, axis=-2), axis=-2)

    def _candidate_prompts(self, params, task_ids):
        yield params["sources"]
        if self.attend_target:
            yield gather_rows(params["target"], task_ids)[..., None, :, :]

    def transfer(self, source, source_method, source_runs, runs, initial=dict):
        """Starts from an ATTEMPT artifact, or from the plain prompts of any other artifact.

        The plain prompts named in `sources` become the sources.
        """
        if source_method.name == self.name:
            return self._transfer_own(source, source_method, source_runs, runs)
        prompts = materialize(source_method, source, source_runs)
        sources = prompts[jnp.asarray([source_runs.row(name) for name in self.sources])]
        start = self.sources[0] if self.start_from == FIRST else self.start_from
        target = weighted_mean(source_weights(start, source_runs, runs), prompts)
        return {**initial(), "sources": sources, "target": target}

    def _transfer_own(self, source, source_method, source_runs, runs):
        if changes := differences(source_method.config(), self.config()):
            raise ValueError(
                "This job's ATTEMPT settings differ from those of the initial artifact "
                f"({changes}). Use the artifact's settings."
            )
        if self.start_from == FIRST:
            raise ValueError(
                "START_FROM = 'first' selects a source prompt, but the initial artifact is from "
                "ATTEMPT, so runs start from its runs. Set START_FROM to 'same', 'average' or one "
                f"of {', '.join(source_runs.run_names)}."
            )
        weights = source_weights(self.start_from, source_runs, runs)
        groups = jnp.asarray(shared_groups(weights, source_runs, runs))
        shared = {name: source[name][groups] for name in source if name in prompt_attention.AXES}
        target = weighted_mean(weights, source["target"])
        return {"sources": source["sources"], "target": target, **shared}

    def config(self):
        return {
            "prompt_length": self.prompt_length,
            "sources": list(self.sources),
            "attention": self.attention,
            "width": self.width,
            "temperature": self.temperature,
            "attend_target": self.attend_target,
        }

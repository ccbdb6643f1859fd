"""Methods and ablations, each a chain of stages: teachers, a source stage and a target stage.

The tables and published.toml refer to variants by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mpt_jax.core.runs import look_up

# Examples in the mixtures of six and twelve sources, and the paper's batch size by size of T5.
MIXTURES = {6: 1_151_093, 12: 1_425_899}
BATCHES = {"small": 100, "base": 32, "large": 12}
TEACHER_STAGE = "gin/pt_source.gin"
TARGET = "gin/mpt_target.gin"
PT_TARGET = "gin/pt_target.gin"
MPT, PROMPT_TUNING, SHARED, ATTEMPT, CROSSPT, FULL, BITFIT = (
    f"gin/methods/{name}.gin"
    for name in (
        *("mpt", "prompt_tuning", "shared_prompt", "attempt", "crosspt"),
        *("full_finetuning", "bitfit"),
    )
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A source stage. Target stages start from its artifact.

    Attributes:
        name: The name of its folder.
        files: The gin files, the stage file first.
        bindings: Further gin bindings.
        teachers: The source stage that trains the teachers; None without distillation.
        tasks: The number of source tasks.
        size: The size of the T5 (gin/ablations/size_*.gin; base has no file).
        draws: The number of draws of few-shot images that the prompts of a seed are the mean over.
            All draws are trained in one stage, of the length in its gin files. 0 for stages of
            texts, which train on all examples.
        of_targets: Whether the source tasks are the tasks of the table, not those of the suite.
    """

    name: str
    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    teachers: Source | None = None
    tasks: int = 6
    size: str = "base"
    draws: int = 0
    of_targets: bool = False

    @property
    def length(self) -> tuple[int, int]:
        """(steps, batch size) at the paper's scale: five epochs over the mixture of texts.

        A stage that trains teachers uses a batch that is `tasks` times as large, and sees as many
        examples in total as other source stages.
        """
        batch = BATCHES[self.size] * (self.tasks if self.is_teachers else 1)
        examples = MIXTURES[self.tasks]
        return (5 * examples // batch if self.is_teachers else 5 * (examples // batch)), batch

    @property
    def is_teachers(self) -> bool:
        """Whether the stage trains teachers, which all seeds share."""
        return self.files[0] == TEACHER_STAGE


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: The name in tables.
        files: The gin files of the target stage, the stage file first; () for a method that is
            evaluated without training.
        method: The gin file of the prompt method, for evaluation stages.
        model: The gin file of the model, for evaluation stages; None for that of texts.
        source: The source stage whose artifact the target stage starts from; None without one.
        bindings: Further gin bindings of the target stage.
        rate: The key of the learning rate in `Suite.rates`.
        start: The paper's name of the source task whose prompt initializes all prompts, if any.
        together: Whether a job trains all tasks of one of the table's groups with one shared
            prompt. Each seed has a separate job.
        steps: Task -> number of steps of the target stage on all examples at the paper's scale;
            the key `''` stands for all other tasks. None for the suite's length.
        size: The size of the T5 (gin/ablations/size_*.gin; base has no file).
        joint: Whether all tasks with the same seed form one group of a job. A step has as many
            examples of each task as a separate run would have.
        version: The suffix of the task versions to train on.
        alone: Whether each run is a separate job, because it trains the backbone.
        draw: The draw, from 1, of the source stage to start from; None for the mean over draws.
    """

    name: str
    files: tuple[str, ...]
    method: str
    source: Source | None = None
    bindings: tuple[str, ...] = ()
    rate: str = "mpt"
    start: str | None = None
    together: bool = False
    steps: Mapping[str, int] | None = None
    size: str = "base"
    joint: bool = False
    version: str = ""
    alone: bool = False
    model: str | None = None
    draw: int | None = None

    @property
    def folder(self) -> str:
        """The name in a form suitable as a folder name."""
        kept = "".join(c if c.isalnum() else "_" for c in self.name.lower())
        return "_".join(filter(None, kept.split("_")))


def ablation(name: str) -> str:
    """Returns the path of a file in gin/ablations."""
    return f"gin/ablations/{name}.gin"


TEACHERS = Source("teachers", (TEACHER_STAGE,))
MPT_SOURCE = Source("mpt_source", ("gin/mpt_source.gin",), teachers=TEACHERS)
TWELVE = "gin/runs/source_tasks_12.gin"
TEACHERS_12 = Source("teachers_12", (TEACHER_STAGE, TWELVE), tasks=12)


def _source(name: str, *files: str, bindings: Sequence[str] = (), distilled: bool = True) -> Source:
    """Returns MPT's source stage, with gin files and bindings that change it."""
    teachers = TEACHERS if distilled else None
    return Source(f"mpt_source_{name}", (*MPT_SOURCE.files, *files), tuple(bindings), teachers)


def _mpt(name: str, *files: str, source: Source = MPT_SOURCE, **rest) -> Variant:
    return Variant(name, (TARGET, *files), rest.pop("method", MPT), source, **rest)


def _without_factors(name: str, file: str, source: Source = MPT_SOURCE) -> Variant:
    return _mpt(name, file, source=source, method=SHARED, rate="shared")


def _of_length(length: int) -> tuple[Variant, Variant]:
    """Returns PT and MPT with another prompt length, which MPT's teachers have as well."""
    bindings = (f"PROMPT_LENGTH = {length}",)
    teachers = Source(f"teachers_p{length}", TEACHERS.files, bindings)
    source = Source(f"mpt_source_p{length}", MPT_SOURCE.files, bindings, teachers)
    return (
        Variant(f"PT, P={length}", PT.files, PROMPT_TUNING, bindings=bindings, rate="pt"),
        _mpt(f"MPT, P={length}", source=source, bindings=bindings),
    )


class OfSize(NamedTuple):
    """The variants on another size of T5."""

    pt: Variant
    mpt: Variant
    attempt: Variant
    full_finetuning: Variant


def _of_size(size: str) -> OfSize:
    """Returns the variants on a size of T5."""
    file = ablation(f"size_{size}")
    teachers = Source(f"teachers_{size}", (*TEACHERS.files, file), size=size)
    source = Source(f"mpt_source_{size}", (*MPT_SOURCE.files, file), (), teachers, size=size)
    # ATTEMPT's temperature is the width times e.
    temperature = {"small": 1391.8, "large": 2783.5}[size]
    on_size = lambda of, **rest: dataclasses.replace(  # noqa: E731
        of, name=f"{of.name}, T5-{size}", files=(*of.files, file), size=size, **rest
    )
    return OfSize(
        on_size(PT),
        _mpt(f"MPT, T5-{size}", file, source=source, size=size),
        on_size(
            ATTEMPT_ARM,
            source=teachers,
            bindings=(f"ATTENTION_TEMPERATURE = {temperature}",),
        ),
        on_size(FULL_FINETUNING),
    )


def _of_rank(rank: int) -> Variant:
    bindings = (f"RANK = {rank}",)
    source = _source(f"rank_{rank}", bindings=bindings)
    return _mpt(f"rank {rank}", source=source, bindings=bindings)


PT = Variant("PT", (PT_TARGET, "gin/methods/pt_paper.gin"), PROMPT_TUNING, rate="pt")
# DePT's steps: 300,000 on tasks of more than 100,000 examples and on MRQA.
_LARGE = ("mnli", "qqp", "qnli", "nq", "hotpotqa", "searchqa", "newsqa")
PT_STRONG = Variant(
    "PT, strong recipe",
    (PT_TARGET, "gin/methods/pt_strong.gin"),
    PROMPT_TUNING,
    rate="pt",
    steps={"": 40_000} | dict.fromkeys(_LARGE, 300_000),
)
FULL_FINETUNING = Variant(
    "full fine-tuning", ("gin/full_finetuning.gin",), FULL, rate="full", alone=True
)
FINE_TUNING = (
    FULL_FINETUNING,
    Variant("BitFit", ("gin/full_finetuning.gin", BITFIT), BITFIT, rate="bitfit", alone=True),
)
SPOT = Variant("SPoT", (PT_TARGET,), PROMPT_TUNING, TEACHERS, rate="spot", start="MNLI")
# The best rate of prompt tuning depends on the task more than that of other methods.
PT_RATES = tuple(
    dataclasses.replace(PT, name=f"PT, rate {rate}", bindings=(f"LEARNING_RATE = {rate}",))
    for rate in (0.01, 0.03, 0.1, 0.3, 1.0)
)
# Prompt tuning from each source task's prompt, by the paper's names.
FROM_SOURCES = tuple(
    dataclasses.replace(SPOT, name=f"PT from {source}", start=source)
    for source in ("MNLI", "QQP", "QNLI", "SST-2", "SQuAD", "ReCoRD")
)
MPT_VARIANT = _mpt("MPT")
MPT_TOGETHER = _mpt("MPT, tasks together", "gin/runs/joint_targets.gin", together=True)
MPT_12 = _mpt(
    "MPT, 12 sources",
    source=Source("mpt_source_12", (*MPT_SOURCE.files, TWELVE), (), TEACHERS_12, tasks=12),
)

_NO_DECOMPOSITION = ablation("no_decomposition")
COMPONENTS = (
    _without_factors(
        "neither",
        _NO_DECOMPOSITION,
        _source("neither", _NO_DECOMPOSITION, ablation("no_distillation"), distilled=False),
    ),
    _without_factors(
        "distillation only",
        _NO_DECOMPOSITION,
        _source("distillation_only", _NO_DECOMPOSITION),
    ),
    _mpt(
        "decomposition only",
        source=_source("decomposition_only", ablation("no_distillation"), distilled=False),
    ),
)
LOSSES = (
    _mpt(
        "no hidden loss",
        source=_source("no_hidden", bindings=["losses.Distillation.hidden = False"]),
    ),
    _mpt(
        "no logits loss",
        source=_source("no_logits", bindings=["losses.Distillation.logits = False"]),
    ),
    _mpt("prompt distance", source=_source("prompt_distance", ablation("prompt_distance"))),
    *(
        _mpt(
            f"hidden loss: {name}",
            source=_source(
                f"hidden_{name.replace(' ', '_')}", bindings=[f"losses.Distillation.{setting}"]
            ),
        )
        for name, setting in (
            ("text only", "include_prompt_positions = False"),
            ("prompt only", "include_text_positions = False"),
            ("encoder only", "decoder_weight = 0.0"),
            ("decoder only", "encoder_weight = 0.0"),
        )
    ),
)
SAMPLING = (
    _mpt(
        "no stochastic sampling",
        source=_source("no_stochastic_sampling", ablation("no_stochastic_sampling")),
    ),
)
TARGETS = (
    _without_factors("target: shared prompt only", ablation("target_shared_only")),
    _mpt("target: vectors only", ablation("target_vectors_only"), rate="vectors"),
)
RANKS = tuple(_of_rank(rank) for rank in (2, 4))
# What a new task starts from: other averages of the same factors, one task's factors, and factors
# that moved less in the source stage.
STARTS = (
    _mpt("MPT from mean of products", bindings=('AVERAGE_OF = "products"',)),
    _mpt("MPT from MNLI", start="MNLI"),
    _mpt(
        "MPT, slow source factors",
        source=_source("slow_factors", bindings=["TASK_LEARNING_RATE = 0.03"]),
    ),
)
LENGTHS = {length: _of_length(length) for length in (5, 10, 40, 100, 200, 300, 400)}

# The target prompts start from the same source prompt as SPoT's.
ATTEMPT_ARM = Variant(
    "ATTEMPT", ("gin/attempt_target.gin",), ATTEMPT, TEACHERS, rate="attempt", start="MNLI"
)
ATTEMPT_TOGETHER = dataclasses.replace(
    ATTEMPT_ARM,
    name="ATTEMPT, tasks together",
    files=(*ATTEMPT_ARM.files, "gin/runs/joint_targets.gin"),
    together=True,
)
SIZES = {size: _of_size(size) for size in ("small", "large")}


def _crosspt(name: str, *bindings: str, **rest) -> Variant:
    """Returns a variant of CrossPT, by default trained on all tasks of a seed jointly."""
    settings = {"rate": "crosspt", "joint": True} | rest
    return Variant(name, ("gin/crosspt_target.gin",), CROSSPT, bindings=bindings, **settings)


def _of_sources(count: int) -> Variant:
    """Returns CrossPT with another number of source prompts."""
    names = ", ".join(f'"source_{number}"' for number in range(1, count + 1))
    return _crosspt(f"{count} source{'s' if count > 1 else ''}", f"SOURCES = [{names}]")


CROSSPT_VARIANT = _crosspt("CrossPT")
# Initial values of the sources. The default is sampled vocabulary, through an MLP.
CROSSPT_STARTS = (
    _crosspt(
        "sources from the teachers",
        "SOURCES = %SOURCE_TASKS",
        'REPARAMETERIZE = ["private"]',
        source=TEACHERS,
    ),
    _crosspt("sources at random", "INIT_SOURCES = @init.Uniform()"),
)
CROSSPT_SOURCES = tuple(_of_sources(count) for count in (1, 2, 6))
CROSSPT_PARTS = (
    _crosspt("shared only", 'COMPOSE_BY = "sum"'),
    _crosspt("private only", 'COMPOSE_BY = "private"'),
)
# How shared and private prompts are composed, and whether tasks share the sources.
CROSSPT_COMPOSITIONS = (
    _crosspt("share learned", 'SHARE = "learned"'),
    _crosspt("product with private", 'COMPOSE_BY = "private_product"'),
    _crosspt("private appended", 'COMPOSE_BY = "private_cat"'),
    _crosspt("two sources in a row", 'COMPOSE_BY = "cat"', "TOP_K = 2"),
    _crosspt("sources of its own", joint=False),
)
# Ratios of the three learning rates. CrossPT uses source : private : router = 5 : 2 : 10.
CROSSPT_RATES = (
    _crosspt("equal rates", rate="crosspt_equal"),
    _crosspt("private faster", rate="crosspt_private"),
    _crosspt("router faster", rate="crosspt_router"),
)
CROSSPT_ROUTERS = tuple(
    _crosspt(f"router: {name.replace('_', ' ')}", f'ROUTER = "{name}"')
    for name in ("softmax", "sigmoid", "attention", "uniform")
)


CROSSPT_FACTORS = (
    *(*CROSSPT_PARTS, *CROSSPT_STARTS, *CROSSPT_SOURCES, *CROSSPT_RATES),
    *(*CROSSPT_COMPOSITIONS, *CROSSPT_ROUTERS),
)
# Other versions of the tasks. The paper's tasks have a prefix and words as labels; the toy suite's
# have no prefix.
CROSSPT_LABELS = (
    _crosspt("without prefix", version="_unprefixed"),
    _crosspt("digits for labels", version="_digits"),
    _crosspt("made-up labels", version="_synthetic"),
)
CROSSPT_TOY_LABELS = (
    _crosspt("with prefix", version="_prefixed"),
    _crosspt("numbers for labels", version="_numeric"),
    _crosspt("unrelated labels", version="_synthetic"),
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        *(*FINE_TUNING, PT, PT_STRONG, SPOT, *FROM_SOURCES, MPT_VARIANT, MPT_TOGETHER, MPT_12),
        *(*PT_RATES, *COMPONENTS, *LOSSES, *SAMPLING, *TARGETS, *RANKS, *STARTS),
        *(variant for pair in (*LENGTHS.values(), *SIZES.values()) for variant in pair),
        *(
            ATTEMPT_ARM,
            ATTEMPT_TOGETHER,
            CROSSPT_VARIANT,
            *CROSSPT_FACTORS,
            *CROSSPT_LABELS,
            *CROSSPT_TOY_LABELS,
        ),
    )
}


def get_variant(name: str) -> Variant:
    """Returns a variant by name.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    return look_up("variant", name, VARIANTS)

"""Which tasks stand for the paper's and how long they train: its own, and the toy suite's."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import seqio

from mpt_jax.experiments.paper import variants
from mpt_jax.experiments.paper.variants import Variant

DIGITS = "_digits"  # as mpt_jax/tasks/suite.py calls the versions
SOURCES = ("MNLI", "QQP", "QNLI", "SST-2", "SQuAD", "ReCoRD")
GLUE = ("MNLI", "QQP", "QNLI", "SST-2", "STS-B", "MRPC", "RTE", "CoLA")
SUPER_GLUE = ("MultiRC", "BoolQ", "WiC", "WSC", "CB")
MRQA = ("NQ", "HotpotQA", "SearchQA", "NewsQA")
OTHERS = ("WinoGrande", "Yelp", "SciTail", "PAWS")


class Length(NamedTuple):
    """How long a run trains.

    Attributes:
        steps: of the job.
        rows: the run's examples in each of them.
        period: steps between evaluations that a best step is selected by; None: the gin files'.
        inputs: tokens of an input; None for the gin files'.
    """

    steps: int
    rows: int
    period: int | None = None
    inputs: int | None = None

    def bindings(self) -> list[str]:
        """What a training stage binds for it, beside steps and batch."""
        period = [] if self.period is None else [f"EVAL_PERIOD = {self.period}"]
        return [*period, *self.reading()]

    def reading(self) -> list[str]:
        """What any stage binds that reads the task's texts."""
        if self.inputs is None:
            return []
        return [f'TASK_FEATURE_LENGTHS = {{"inputs": {self.inputs}, "targets": {TARGETS}}}']


TARGETS = 128  # tokens of a target at the paper's scale


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks and lengths.

    Attributes:
        name: `'paper'` or `'toy'`.
        tasks: the paper's name of a target task -> ours; those without a counterpart are left out.
        sources: the same of the source tasks.
        modules: register the tasks.
        files: gin files that come after a training stage's own.
        test_files: the same of a stage that evaluates.
        source_steps: of a source stage; None for the paper's (`Source.length`).
        length: (our task's name, variant, shots) -> how long a run trains.
        rates: name of a rate (`Variant.rate`) -> learning rate, or the several of a method that has
            them (ATTEMPT: own prompt, attention; CrossPT: private, sources, router); {} for those
            of the gin files.
        suffix: of the versions of its tasks, `''` for those with words for labels.
        tested_apart: whether test scores come from a stage of their own, of the best step by the
            validation split; otherwise the training stage scores its last step on the test split.
    """

    name: str
    tasks: Mapping[str, str]
    sources: Mapping[str, str]
    modules: tuple[str, ...]
    files: tuple[str, ...]
    test_files: tuple[str, ...]
    source_steps: int | None
    length: Callable[[str, Variant, int | None], Length]
    rates: Mapping[str, float | tuple[float, ...]]
    tested_apart: bool
    suffix: str = ""

    def named(self, task: str) -> str:
        """A task in the version that this suite takes, where there is one."""
        version = f"{task}{self.suffix}"
        return version if version in seqio.TaskRegistry.names() else task

    def with_digits(self) -> Suite:
        """The suite with digits for labels, sources included, as the paper has them.

        Raises:
            ValueError: its tasks have no such versions.
        """
        self.register()
        digits = dataclasses.replace(self, name=f"{self.name}_digits", suffix=DIGITS)
        tasks = {name: digits.named(task) for name, task in self.tasks.items()}
        if tasks == self.tasks:
            raise ValueError(f"The tasks of the {self.name} suite have no versions with digits.")
        sources = {name: digits.named(task) for name, task in self.sources.items()}
        return dataclasses.replace(digits, tasks=tasks, sources=sources)

    def register(self) -> None:
        """Registers its tasks with SeqIO."""
        for module in self.modules:
            importlib.import_module(module)

    def rate_bindings(self, variant: Variant, shots: int | None, steps: int) -> list[str]:
        """What a variant binds for this suite's learning rate, and the warmup if gin files have one
        that is meant for all examples."""
        if not self.rates:
            counted = _FEW_STEPS.get(variant.method)
            return [] if shots is None or counted is None else counted(steps)
        rate = self.rates[variant.rate]
        peaks = rate if isinstance(rate, tuple) else (rate,)
        return [f"LEARNING_RATE = {peaks[0]}", *_REST_OF_RATE[variant.method](peaks, steps)]


def _warmup(steps: int) -> list[str]:
    return [f"WARMUP_STEPS = {steps // 10}"]


def _annealing(steps: int) -> list[str]:
    """Draws are as good as certain for the second half."""
    return [f"ANNEALING_STEPS = {steps // 2}"]


# What a method's gin file counts in steps, where they are few.
_FEW_STEPS: Mapping[str, Callable[[int], list[str]]] = {
    variants.PROMPT_TUNING: _warmup,
    variants.ATTEMPT: _warmup,
    variants.CROSSPT: _annealing,
}


def _attempt(peaks: Sequence[float], steps: int) -> list[str]:
    _, attention = peaks
    return [f"ATTENTION_LEARNING_RATE = {attention}", *_warmup(steps)]


def _crosspt(peaks: Sequence[float], steps: int) -> list[str]:
    _, source, router = peaks
    return [
        f"SOURCE_LEARNING_RATE = {source}",
        f"ROUTER_LEARNING_RATE = {router}",
        "WARMUP_FRACTION = 0.1",
        *_annealing(steps),
    ]


# What else a method's gin file wants to know of its learning rate. MPT's factors keep the paper's
# 4/3 of the shared prompt's; all warm up for a tenth of the steps.
_REST_OF_RATE: Mapping[str, Callable[[Sequence[float], int], list[str]]] = {
    variants.PROMPT_TUNING: lambda peaks, steps: _warmup(steps),
    variants.SHARED: lambda peaks, steps: [],
    variants.MPT: lambda peaks, steps: [f"TASK_LEARNING_RATE = {peaks[0] * 4 / 3:.6g}"],
    variants.ATTEMPT: _attempt,
    variants.CROSSPT: _crosspt,
}


# --- The paper's ---------------------------------------------------------------------------------

# The paper: 20 epochs, 10 where there are more than 10,000 examples, 5 for MRQA; 256 tokens of an
# input, 348 of MultiRC's and 512 of MRQA's.
_LARGE = 10_000
_INPUTS, _LONG_INPUTS = 256, {"multirc": 348}
# It does not say how long it trains on a few examples. Ours.
_FEW = Length(steps=1_000, rows=16, period=100)


def _paper_length(task: str, variant: Variant, shots: int | None) -> Length:
    inputs = 512 if task in _MRQA_TASKS else _LONG_INPUTS.get(task.removesuffix(DIGITS), _INPUTS)
    if shots is not None:
        return _FEW._replace(rows=min(_FEW.rows, shots), inputs=inputs)
    examples = seqio.TaskRegistry.get(task).num_input_examples("train")
    assert examples is not None  # the suites' sources know their published sizes
    batch = variants.BATCHES[variant.size]
    if variant.steps is not None:
        return Length(variant.steps.get(task, variant.steps[""]), batch, 1_000, inputs)
    epochs = 5 if task in _MRQA_TASKS else 10 if examples > _LARGE else 20
    steps = math.ceil(epochs * examples / batch)
    return Length(steps, batch, math.ceil(steps / epochs), inputs)


_OUR_NAMES = {"SST-2": "sst2", "STS-B": "stsb"}
_ALL = {name: _OUR_NAMES.get(name, name.lower()) for name in (*GLUE, *SUPER_GLUE, *MRQA, *OTHERS)}
_MRQA_TASKS = {_ALL[name] for name in MRQA}

PAPER = Suite(
    name="paper",
    tasks={**_ALL, "E2E": "e2e", "WebNLG": "webnlg"},
    sources={name: _OUR_NAMES.get(name, name.lower()) for name in SOURCES},
    modules=(
        "mpt_jax.tasks.glue",
        "mpt_jax.tasks.super_glue",
        "mpt_jax.tasks.mrqa",
        "mpt_jax.tasks.mpt_others",
        "mpt_jax.tasks.nlg",
    ),
    files=(),
    test_files=(),
    source_steps=None,
    length=_paper_length,
    rates={},
    tested_apart=True,
)

# --- The toy suite -------------------------------------------------------------------------------

_TOY_FEW, _TOY_ALL = Length(steps=200, rows=4), Length(steps=500, rows=16)

# toy_wic and toy_paws chose the learning rates (docs/protocol.md), so they stand in no table.
TOY = Suite(
    name="toy",
    tasks={
        "RTE": "toy_rte",
        "MRPC": "toy_mrpc",
        "BoolQ": "toy_boolq",
        "CB": "toy_cb",
        "SciTail": "toy_scitail",
        "E2E": "toy_d2t",
    },
    sources={name: f"toy_{_OUR_NAMES.get(name, name.lower())}" for name in SOURCES},
    modules=("mpt_jax.tasks.toy",),
    files=("gin/tiny.gin", "gin/runs/demo.gin"),
    test_files=("gin/tiny.gin",),
    source_steps=300,
    length=lambda task, variant, shots: _TOY_ALL if shots is None else _TOY_FEW,
    rates={
        "pt": 0.3,
        "spot": 0.01,
        "mpt": 0.3,
        "shared": 0.3,
        "vectors": 0.03,
        "attempt": (0.03, 0.01),
        "crosspt": (0.12, 0.3, 0.6),
        "crosspt_equal": (0.19, 0.19, 0.6),
        "crosspt_private": (0.3, 0.12, 0.6),
        "crosspt_router": (0.12, 0.3, 6.0),
    },
    tested_apart=False,
)

SUITES = {suite.name: suite for suite in (PAPER, TOY)}

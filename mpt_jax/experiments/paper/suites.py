"""The two task suites for the paper's tables, paper and toy, and their training lengths."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import seqio

from mpt_jax.experiments.paper import variants
from mpt_jax.experiments.paper.variants import Variant

DIGITS = "_digits"  # suffix of task versions in mpt_jax/tasks/suite.py
SOURCES = ("MNLI", "QQP", "QNLI", "SST-2", "SQuAD", "ReCoRD")
GLUE = ("MNLI", "QQP", "QNLI", "SST-2", "STS-B", "MRPC", "RTE", "CoLA")
SUPER_GLUE = ("MultiRC", "BoolQ", "WiC", "WSC", "CB")
MRQA = ("NQ", "HotpotQA", "SearchQA", "NewsQA")
OTHERS = ("WinoGrande", "Yelp", "SciTail", "PAWS")


class Length(NamedTuple):
    """Training length of a run, with the settings that depend on it.

    Attributes:
        steps: The number of steps of the job.
        rows: The number of examples of the run in each step.
        period: The number of steps between the evaluations that select the best step; None uses
            the value from the gin files.
        inputs: The maximum number of input tokens; None uses the value from the gin files.
        epoch: The number of steps of an epoch, at whose ends learning rates of images change; None
            uses the value from the gin files.
    """

    steps: int
    rows: int
    period: int | None = None
    inputs: int | None = None
    epoch: int | None = None

    def bindings(self) -> list[str]:
        """Returns this length's bindings for a training stage: evaluation period and input length.
        The number of steps and the batch size are bound elsewhere."""
        set_values = {"EVAL_PERIOD": self.period, "STEPS_PER_EPOCH": self.epoch}
        named = [f"{name} = {value}" for name, value in set_values.items() if value is not None]
        return [*named, *self.reading()]

    def reading(self) -> list[str]:
        """Returns the bindings for reading inputs, which training and evaluation stages share."""
        if self.inputs is None:
            return []
        return [f'TASK_FEATURE_LENGTHS = {{"inputs": {self.inputs}, "targets": {TARGETS}}}']


TARGETS = 128  # maximum tokens of a target at the paper's scale


@dataclasses.dataclass(frozen=True)
class Suite:
    """A set of tasks, with training lengths and learning rates.

    Attributes:
        name: The name of its folder: `'paper'` or `'toy'` for texts, with `'_digits'` if the labels
            are digits; `'images'` or `'toy_images'`.
        tasks: The paper's name of a target task -> our task. Tasks without a counterpart are
            omitted.
        sources: The paper's name of a source task -> our task.
        modules: The modules that register the tasks.
        files: The gin files to add after those of a training stage.
        test_files: The gin files to add after those of an evaluation stage.
        source_steps: The number of steps of a source stage; None for the paper's (`Source.length`).
        length: Function from (our name of a task, variant, shots) to the training length of a run.
        rates: Key of a learning rate (`Variant.rate`) -> learning rate, or a tuple for methods with
            several (ATTEMPT: target prompt, attention; CrossPT: private prompts, source prompts,
            router). {} uses the learning rates from the gin files.
        suffix: The suffix of the suite's versions of tasks; `''` if labels are words.
        is_toy: Whether the tasks are toy tasks, which have no published figures.
        source_files: The gin files to add after `files` for source stages.
        sequence: Function from (name of a sequence, seed) to its tasks, for tables of sequences.
        sequence_steps: The number of steps of a stage of a sequence; None uses the value from the
            gin files.
        tested_apart: Whether the best step is selected on the validation split, and a separate
            stage evaluates it on the test split. Otherwise, the training stage evaluates its last
            step.
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
    is_toy: bool = False
    source_files: tuple[str, ...] = ()
    sequence: Callable[[str, int], Sequence[str]] = lambda name, seed: ()
    sequence_steps: int | None = None

    def named(self, task: str) -> str:
        """Returns the task's name with the suite's suffix, or `task` if no such version exists."""
        version = f"{task}{self.suffix}"
        return version if version in seqio.TaskRegistry.names() else task

    def with_digits(self) -> Suite:
        """Returns the suite with digits as the labels of source and target tasks, as in the paper.

        Raises:
            ValueError: the tasks have no versions with digits.
        """
        self.register()
        digits = dataclasses.replace(self, name=f"{self.name}_digits", suffix=DIGITS)
        tasks = {name: digits.named(task) for name, task in self.tasks.items()}
        if tasks == self.tasks:
            raise ValueError(
                f"The tasks of the {self.name} suite have no versions with digits as labels. Use "
                "--labels words."
            )
        sources = {name: digits.named(task) for name, task in self.sources.items()}
        return dataclasses.replace(digits, tasks=tasks, sources=sources)

    def start_of(self, variant: Variant) -> str | None:
        """Returns the task whose prompt initializes all prompts of a variant, if any."""
        if variant.start is None:
            return None
        of_targets = variant.source is not None and variant.source.of_targets
        return (self.tasks if of_targets else self.sources)[variant.start]

    def register(self) -> None:
        """Registers the suite's tasks with SeqIO."""
        for module in self.modules:
            importlib.import_module(module)

    def rate_bindings(self, variant: Variant, shots: int | None, steps: int) -> list[str]:
        """Returns a variant's bindings of learning rates and of the steps of warmup or annealing.

        Without `rates`, only few-shot runs have bindings: they shorten a warmup or annealing that
        the gin files set for training on all examples.
        """
        if not self.rates:
            few_shot = _FEW_STEPS.get(variant.method)
            return [] if shots is None or few_shot is None else few_shot(steps)
        rate = self.rates[variant.rate]
        peaks = rate if isinstance(rate, tuple) else (rate,)
        rest = _REST_OF_RATE.get(variant.method)
        return [f"LEARNING_RATE = {peaks[0]}", *(rest(peaks, steps) if rest else ())]


def _warmup(steps: int) -> list[str]:
    return [f"WARMUP_STEPS = {steps // 10}"]


def _annealing(steps: int) -> list[str]:
    """Returns the binding that anneals the router over half of the steps. Later draws are almost
    deterministic."""
    return [f"ANNEALING_STEPS = {steps // 2}"]


# Bindings of few-shot runs for schedules that a method's gin file counts in steps.
_FEW_STEPS: Mapping[str, Callable[[int], list[str]]] = {
    variants.PROMPT_TUNING: _warmup,
    variants.FULL: _warmup,
    variants.BITFIT: _warmup,
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


# Further learning-rate bindings of a method's gin file, if any. The rate of MPT's factors is 4/3 of
# the shared prompt's, as in the paper. All methods of texts warm up for a tenth of the steps.
_REST_OF_RATE: Mapping[str, Callable[[Sequence[float], int], list[str]]] = {
    variants.PROMPT_TUNING: lambda peaks, steps: _warmup(steps),
    variants.FULL: lambda peaks, steps: _warmup(steps),
    variants.BITFIT: lambda peaks, steps: _warmup(steps),
    variants.MPT: lambda peaks, steps: [f"TASK_LEARNING_RATE = {peaks[0] * 4 / 3:.6g}"],
    variants.ATTEMPT: _attempt,
    variants.CROSSPT: _crosspt,
}


# --- The paper's suite ---------------------------------------------------------------------------

# The paper: 20 epochs, 10 for tasks with more than 10,000 examples, 5 for MRQA. Inputs have 256
# tokens, 348 for MultiRC and 512 for MRQA.
_LARGE = 10_000
_INPUTS, _LONG_INPUTS = 256, {"multirc": 348}
# The paper does not state how long few-shot runs train. This is our choice.
_FEW = Length(steps=1_000, rows=16, period=100)


def _paper_length(task: str, variant: Variant, shots: int | None) -> Length:
    inputs = 512 if task in _MRQA_TASKS else _LONG_INPUTS.get(task.removesuffix(DIGITS), _INPUTS)
    if shots is not None:
        return _FEW._replace(rows=min(_FEW.rows, shots), inputs=inputs)
    examples = seqio.TaskRegistry.get(task).num_input_examples("train")
    assert examples is not None  # the suites' data sources know their published sizes
    batch = variants.BATCHES[variant.size]
    if variant.steps is not None:
        steps = variant.steps.get(task.removesuffix(DIGITS), variant.steps[""])
        return Length(steps, batch, 1_000, inputs)
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

# toy_wic and toy_paws were used to choose the learning rates (docs/study/protocol.md), so no table
# has them.
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
        "full": 3e-4,
        "pt": 0.3,
        "spot": 0.03,
        "mpt": 0.3,
        "shared": 0.3,
        "vectors": 0.03,
        "attempt": (0.03, 0.01),
        "crosspt": (0.004, 0.01, 0.02),
        "crosspt_equal": (0.0063, 0.0063, 0.02),
        "crosspt_private": (0.01, 0.004, 0.02),
        "crosspt_router": (0.004, 0.01, 0.2),
    },
    tested_apart=False,
    is_toy=True,
)

SUITES = {suite.name: suite for suite in (PAPER, TOY)}

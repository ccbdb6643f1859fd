"""Which tasks stand for the paper's and how long they train: its own, and the toy suite's."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import seqio

from mpt_jax.paper import arms
from mpt_jax.paper.arms import Arm

SOURCES = ("MNLI", "QQP", "QNLI", "SST-2", "SQuAD", "ReCoRD")
GLUE = ("MNLI", "QQP", "QNLI", "SST-2", "STS-B", "MRPC", "RTE", "CoLA")
SUPER_GLUE = ("MultiRC", "BoolQ", "WiC", "WSC", "CB")
MRQA = ("NQ", "HotpotQA", "SearchQA", "NewsQA")
OTHERS = ("WinoGrande", "Yelp", "SciTail", "PAWS")


class Length(NamedTuple):
    """How long a run trains: steps, and its examples in each of them."""

    steps: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks and lengths.

    Attributes:
        name: `'paper'` or `'toy'`.
        tasks: the paper's name of a target task -> ours; those without a counterpart are left out.
        sources: the same of the source tasks.
        modules: register the tasks.
        files: gin files that come after a stage's own.
        source_steps: of a source stage; None for its gin file's.
        length: (our task's name, shots) -> how long a run trains.
        rates: name of a rate (`Arm.rate`) -> learning rate; {} for those of the gin files.
        tested_apart: whether test scores come from a stage of their own, of the best step by the
            validation split; otherwise the training stage scores its last step on the test split.
    """

    name: str
    tasks: Mapping[str, str]
    sources: Mapping[str, str]
    modules: tuple[str, ...]
    files: tuple[str, ...]
    source_steps: int | None
    length: Callable[[str, int | None], Length]
    rates: Mapping[str, float]
    tested_apart: bool

    def register(self) -> None:
        """Registers its tasks with SeqIO."""
        for module in self.modules:
            importlib.import_module(module)

    def rate_bindings(self, arm: Arm, steps: int) -> list[str]:
        """What an arm binds for this suite's learning rate; nothing where gin files know better."""
        if not self.rates:
            return []
        rate = self.rates[arm.rate]
        return [f"LEARNING_RATE = {rate}", *_REST_OF_RATE[arm.method](rate, steps)]


# What else a method's gin file wants to know of its learning rate. MPT's factors keep the paper's
# 4/3 of the shared prompt's; all warm up for a tenth of the steps.
_REST_OF_RATE: Mapping[str, Callable[[float, int], list[str]]] = {
    arms.PROMPT_TUNING: lambda rate, steps: [f"WARMUP_STEPS = {steps // 10}"],
    arms.SHARED: lambda rate, steps: [],
    arms.MPT: lambda rate, steps: [f"TASK_LEARNING_RATE = {rate * 4 / 3:.6g}"],
}

# --- The paper's ---------------------------------------------------------------------------------

_BATCH = 32
# The paper: 20 epochs, 10 where there are more than 10,000 examples, 5 for MRQA.
_LARGE = 10_000
# It does not say how long it trains on a few examples. Ours.
_FEW = Length(steps=1_000, rows=16)


def _paper_length(task: str, shots: int | None) -> Length:
    if shots is not None:
        return Length(_FEW.steps, min(_FEW.rows, shots))
    examples = seqio.TaskRegistry.get(task).num_input_examples("train")
    assert examples is not None  # the suites' sources know their published sizes
    epochs = 5 if task in _MRQA_TASKS else 10 if examples > _LARGE else 20
    return Length(math.ceil(epochs * examples / _BATCH), _BATCH)


_OUR_NAMES = {"SST-2": "sst2", "STS-B": "stsb"}
_ALL = {name: _OUR_NAMES.get(name, name.lower()) for name in (*GLUE, *SUPER_GLUE, *MRQA, *OTHERS)}
_MRQA_TASKS = {_ALL[name] for name in MRQA}

PAPER = Suite(
    name="paper",
    tasks={**_ALL, "E2E": "e2e", "WebNLG": "webnlg"},
    sources={name: _OUR_NAMES.get(name, name.lower()) for name in SOURCES},
    modules=("tasks.glue", "tasks.super_glue", "tasks.mrqa", "tasks.others", "tasks.nlg"),
    files=(),
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
    modules=("tasks.toy",),
    files=("gin/tiny.gin", "gin/runs/demo.gin"),
    source_steps=300,
    length=lambda task, shots: _TOY_ALL if shots is None else _TOY_FEW,
    rates={"pt": 0.3, "spot": 0.01, "mpt": 0.3, "shared": 0.3, "vectors": 0.03},
    tested_apart=False,
)

SUITES = {suite.name: suite for suite in (PAPER, TOY)}

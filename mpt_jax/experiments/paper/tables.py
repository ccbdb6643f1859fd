"""The variants, tasks, numbers of examples and seeds of each table (their stages: chains.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_jax.core.runs import look_up
from mpt_jax.experiments.paper import suites, variants
from mpt_jax.experiments.paper.suites import Length, Suite
from mpt_jax.experiments.paper.variants import Variant
from mpt_jax.experiments.stages import Draws

Groups = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        name: The argument of `mpt-jax paper`, and the key of the figures in published.toml.
        title: The title in the output.
        variants: The variants, one row for each.
        groups: Name of an average -> its tasks, by the paper's names.
        metrics: Task -> metrics to show, one column for each and no averages. {} shows the main
            metric of every task, and averages.
        shots: The numbers of training examples; None for all.
        seeds: The number of seeds.
        reference: The variant that other variants are subtracted from; None for MPT, or for the
            first variant if MPT is not in the table.
        full: The training length on all examples; None for the suite's length.
        source_per_seed: Whether each seed has a separate source stage, so that a comparison of
            source stages does not depend on a single seed.
        toy: Attribute -> value that replaces it on the toy suite.
        draws: How few-shot runs draw their examples.
        repeats: The number of random seeds (initial values and order) for each draw of examples.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    groups: Groups
    shots: tuple[int | None, ...] = (None,)
    seeds: int = 3
    reference: str | None = None
    full: Length | None = None
    source_per_seed: bool = False
    metrics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    toy: Mapping[str, object] = dataclasses.field(default_factory=dict)
    draws: Draws = Draws()
    repeats: int = 1

    def on(self, suite: Suite) -> Table:
        """Returns the table adapted to a suite, without the tasks that the suite does not have.

        Raises:
            ValueError: no task or no variant is left.
        """
        table = (
            dataclasses.replace(self, **dict(self.toy)) if suite.name == suites.TOY.name else self
        )
        groups = {
            name: tuple(task for task in tasks if task in suite.tasks)
            for name, tasks in table.groups.items()
        }
        groups = {name: tasks for name, tasks in groups.items() if tasks}
        if not groups:
            raise ValueError(
                f"The {suite.name} suite has no counterpart of any task in table {self.name!r}. "
                "Choose another table, or --suite paper."
            )
        if not table.variants:
            raise ValueError(
                f"The {suite.name} suite has only one size of T5, so it cannot run table "
                f"{self.name!r}, which compares sizes. Choose another table, or --suite paper."
            )
        return dataclasses.replace(table, groups=groups)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The paper's names of all tasks, each once."""
        return tuple(dict.fromkeys(task for tasks in self.groups.values() for task in tasks))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns: the tasks, or `'<task> <metric>'` if `metrics` is set."""
        if not self.metrics:
            return self.tasks
        return tuple(f"{task} {metric}" for task in self.tasks for metric in self.metrics[task])

    @property
    def averages(self) -> Groups:
        """Name of an average -> its tasks; {} if `metrics` is set."""
        return {} if self.metrics else self.groups


_BOTH = {"GLUE": suites.GLUE, "SuperGLUE": suites.SUPER_GLUE}
_FEW = (4, 16, 32)
# Every toy target task, except the two used to choose learning rates and toy_d2t.
_TOY_TARGETS = {"toy targets": ("BoolQ", "CB", "RTE", "MRPC", "SciTail")}
_TOY_ABLATION = {"groups": _TOY_TARGETS, "shots": (32,), "seeds": 10, "source_per_seed": True}
_METHODS = (variants.PT, variants.SPOT, variants.MPT_VARIANT)
_ONE_PASS = {"shots": (*_FEW, None), "full": Length(steps=500, rows=4)}  # over 2,000 examples
_FOUR = {"toy targets": ("BoolQ", "CB", "RTE", "MRPC")}


def _crosspt(name: str, title: str, rows: tuple[Variant, ...], **rest: Any) -> Table:
    """Returns a table of CrossPT: on GLUE, or on the demo's four tasks on the toy suite."""
    rest = {"shots": (32,)} | rest
    toy = {"groups": _FOUR} | dict(rest.pop("toy", {}))
    return Table(name, title, rows, {"GLUE": suites.GLUE}, seeds=10, toy=toy, **rest)


TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "GLUE and SuperGLUE, all training examples",
            (
                *variants.FINE_TUNING,
                variants.PT,
                variants.PT_STRONG,
                variants.SPOT,
                variants.ATTEMPT_ARM,
                variants.MPT_VARIANT,
                variants.ATTEMPT_TOGETHER,
                variants.MPT_TOGETHER,
            ),
            _BOTH,
            toy={"variants": (*_METHODS, variants.MPT_TOGETHER)},
        ),
        Table(
            "table2",
            "MRQA and others, all training examples",
            (
                *variants.FINE_TUNING,
                variants.PT,
                variants.PT_STRONG,
                variants.SPOT,
                variants.ATTEMPT_ARM,
                variants.MPT_VARIANT,
                variants.MPT_12,
            ),
            {"MRQA": suites.MRQA, "Others": suites.OTHERS},
            toy={"variants": _METHODS},
        ),
        Table(
            "table3",
            "BoolQ, CB and SciTail, few training examples",
            (variants.FULL_FINETUNING, *_METHODS[:2], variants.ATTEMPT_ARM, *_METHODS[2:]),
            {"mean": ("BoolQ", "CB", "SciTail")},
            toy={"variants": _METHODS},
            shots=_FEW,
            seeds=10,
        ),
        Table(
            "table4",
            "GLUE and SuperGLUE, few training examples",
            (variants.PT, variants.MPT_VARIANT),
            _BOTH,
            shots=_FEW,
            seeds=10,
        ),
        Table(
            "table5",
            "Text generation, T5-large",
            (variants.SIZES["large"].pt, variants.SIZES["large"].mpt),
            {"NLG": ("E2E", "WebNLG")},
            metrics={
                "E2E": ("bleu", "nist", "meteor_exact_stem", "rouge_l", "cider_d"),
                "WebNLG": ("bleu", "meteor_exact_stem", "ter"),
            },
            toy={
                "variants": (variants.PT, variants.MPT_VARIANT),
                "metrics": {"E2E": ("f1", "exact_match")},
            },
        ),
        Table(
            "ablations",
            "What the parts do",
            (
                *(*variants.COMPONENTS, variants.MPT_VARIANT),
                *(*variants.LOSSES, *variants.SAMPLING, *variants.TARGETS, *variants.RANKS),
            ),
            {"SuperGLUE": suites.SUPER_GLUE},
            toy=_TOY_ABLATION,
        ),
        Table(
            "scaling",
            "Sizes of T5",
            (
                variants.FULL_FINETUNING,
                variants.PT,
                variants.ATTEMPT_ARM,
                variants.MPT_VARIANT,
                *(variant for group in variants.SIZES.values() for variant in group),
            ),
            {"mean": ("WiC", "MultiRC", "BoolQ")},
            toy={"variants": ()},
        ),
        Table(
            "transfer",
            "Which source helps which target (ours, not the paper's)",
            (variants.PT, *variants.FROM_SOURCES),
            _BOTH,
            shots=(32,),
            toy={"groups": _TOY_TARGETS},
        ),
        Table(
            "starts",
            "What a new task starts from, and learning rates of prompt tuning",
            (variants.MPT_VARIANT, *variants.STARTS, *variants.PT_RATES),
            {"SuperGLUE": suites.SUPER_GLUE},
            shots=(32,),
            toy=_TOY_ABLATION,
        ),
        _crosspt(
            "crosspt",
            "Mixed prompts beside others, few training examples",
            (
                variants.PT,
                variants.SPOT,
                variants.ATTEMPT_ARM,
                variants.MPT_VARIANT,
                variants.CROSSPT_VARIANT,
            ),
            shots=_FEW,
            reference="CrossPT",
            toy={**_ONE_PASS, "source_per_seed": True},
        ),
        _crosspt(
            "crosspt_factors",
            "What the parts of CrossPT do",
            (variants.CROSSPT_VARIANT, *variants.CROSSPT_FACTORS),
        ),
        _crosspt(
            "crosspt_starts",
            "Where CrossPT's sources start, by the number of examples",
            (variants.CROSSPT_VARIANT, *variants.CROSSPT_STARTS),
            shots=_FEW,
            toy=_ONE_PASS,
        ),
        _crosspt(
            "crosspt_labels",
            "CrossPT with and without a prefix, and with other labels",
            (variants.CROSSPT_VARIANT, *variants.CROSSPT_LABELS),
            toy={"variants": (variants.CROSSPT_VARIANT, *variants.CROSSPT_TOY_LABELS)},
        ),
        Table(
            "length",
            "Prompt length",
            (
                variants.PT,
                *(a for p in (200, 300, 400) for a in variants.LENGTHS[p]),
                variants.MPT_VARIANT,
            ),
            {"SuperGLUE": suites.SUPER_GLUE},
            toy={
                **_TOY_ABLATION,
                "variants": (variants.PT, variants.MPT_VARIANT)
                + tuple(variant for length in (5, 10, 40) for variant in variants.LENGTHS[length]),
            },
        ),
    )
}


def get_table(name: str) -> Table:
    """Returns a table by name.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    return look_up("table", name, TABLES)

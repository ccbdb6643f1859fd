"""All tables on texts, and tables by name."""

from __future__ import annotations

from typing import Any

from mpt_jax.core.runs import look_up
from mpt_jax.experiments.paper import image_tables, suites, variants
from mpt_jax.experiments.paper.suites import Length
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.paper.variants import Variant

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
        *image_tables.TABLES,
    )
}


def get_table(name: str) -> Table:
    """Returns a table by name.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    return look_up("table", name, TABLES)

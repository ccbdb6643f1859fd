"""All tables on images."""

from __future__ import annotations

from typing import Any

from mpt_jax.experiments.paper import image_suites as suites
from mpt_jax.experiments.paper import image_variants as variants
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.sequence_metrics import METRICS
from mpt_jax.experiments.stages import Draws

_SHOTS = (1, 5, 20)
_ELEVATER = {
    "others": suites.OTHERS,
    "all": (*suites.OTHERS, *suites.ALSO_SOURCES),
}
_TOY = {"toy targets": suites.TOY_TARGETS}


def _halves(names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the groups of a table of base and new classes, and which are held out."""
    base, new = (tuple(f"{x}{half}" for x in names) for half in (suites.BASE, suites.NEW))
    return {"groups": {"base": base, "new": new}, "held_out": dict(zip(new, base, strict=True))}


def _table(name: str, title: str, rows: tuple[variants.Variant, ...], **rest: Any) -> Table:
    """Returns a table on ELEVATER, or on the toy targets with a separate source for each seed."""
    toy = {"groups": _TOY, "seeds": 10, "source_per_seed": True} | rest.pop("toy", {})
    settings = {"groups": _ELEVATER, "shots": _SHOTS} | rest
    return Table(
        name,
        title,
        rows,
        draws=Draws(per_class=True),
        suites=suites.SUITES,
        toy=toy,
        **settings,
    )


TABLES = (
    _table(
        "mvlpt",
        "MVLPT on ELEVATER, few images of each class",
        (variants.ZERO_SHOT, variants.PROBE, *variants.SINGLE, *variants.MULTITASK),
        reference="MVPT",
    ),
    _table(
        "mvlpt_parts",
        "Ablation of MVLPT's parts (ours)",
        (variants.MUPT, *variants.COUPLINGS, variants.UNION, *variants.ONE_DRAW),
        shots=(5,),
        reference="MUPT",
    ),
    _table(
        "mvlpt_transfer",
        "Transfer between tasks",
        tuple(x for name in _ELEVATER["all"] for x in variants.from_task(name)) + variants.SINGLE,
        groups={"all": _ELEVATER["all"]},
        shots=(20,),
        reference="CoOp",
        toy={
            "variants": (
                *(variants.from_task(name)[0] for name in suites.TOY_TRANSFER),
                variants.COOP_VARIANT,
            ),
            "groups": {"all": suites.TOY_TRANSFER},
            "shots": (5,),
        },
    ),
    _table(
        "clip_mpt",
        "MPT on CLIP (ours)",
        (
            variants.MPT_VARIANT,
            variants.SHARED,
            variants.PER_TASK,
            variants.SCRATCH_BOTH,
            variants.MPT_ZERO_SHOT,
            variants.MPT_ALONE,
            *variants.MPT_SITES,
            *variants.MPT_LAYERS,
            variants.MPT_ONES,
        ),
        shots=(5,),
    ),
    Table(
        "multilane",
        "Tasks learned one after another (MULTI-LANE)",
        variants.lanes(classes=20, selectors=(1, 20), merged=10, rows=255),
        {"sequence": (suites.VOC_SEQUENCE,)},
        metrics={suites.VOC_SEQUENCE: METRICS},
        suites=suites.SUITES,
        of_sequences=True,
        toy={
            "variants": variants.lanes(classes=12, selectors=(1, 10), merged=4, rows=16),
            "groups": {"sequence": (suites.TOY_SEQUENCE,)},
            "metrics": {suites.TOY_SEQUENCE: METRICS},
            "seeds": 10,
        },
    ),
    _table(
        "base_to_new",
        "Trained on half of the classes, tested on both halves",
        (
            variants.ZERO_SHOT,
            *variants.SINGLE,
            variants.COCOOP_VARIANT,
        ),
        **_halves(tuple(f"coop_{name}" for name in suites.SOURCES)),
        shots=(16,),
        harmonic=True,
        reference="CoOp",
        toy=_halves(suites.TOY_HALVES) | {"shots": (5,)},
    ),
)

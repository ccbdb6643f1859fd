"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_jax.plan.hlo import Cost
from mpt_jax.plan.steps import DoesNotFit, MeshLayout, StepCost

NOTE = (
    "The TPU compiler's estimates, per chip and step; nothing was run. accessed: every read and "
    "write, of the chip's fast memory too, by the compiler's count (ours where there are loops, "
    "which count times their trips); HBM: of main memory alone, by our count. ms: operations over "
    "peak, accessed bytes over the bandwidth of HBM, communicated bytes over that of all links "
    "(what crosses slices left out). of ideal: compute over the larger of compute and memory."
)
_HEAD = (
    "slice", "data x model", "parts", "rows", "step", "arguments", "temporaries", "peak", "of HBM",
    "TFLOP", "accessed", "HBM", "ms compute", "ms memory", "ms network", "bound by", "of ideal",
)  # fmt: skip


def table(found: Sequence[StepCost | DoesNotFit]) -> str:
    """A Markdown table, a step on each line."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_row(each)) + " |" for each in found]
    return "\n".join(lines)


def _row(each: StepCost | DoesNotFit) -> list[str]:
    choice = each.choice
    mesh = f"{each.num_chips // choice.model_axis} x {choice.model_axis}"
    parts = "" if choice.num_microbatches is None else str(choice.num_microbatches)
    if isinstance(each, DoesNotFit):
        blank = ["" for _ in _HEAD[6:]]
        return [
            choice.name,
            mesh,
            parts,
            "",
            each.step,
            f"does not fit: {each.message}",
            *blank,
        ]
    cost = each.cost
    return [
        choice.name, mesh, parts, f"{each.rows:g}", each.step,
        _gib(each.arguments), _gib(each.temporaries), _gib(each.peak),
        f"{each.peak / choice.chip.hbm_bytes:.0%}" + ("" if each.fits else " (does not fit)"),
        f"{cost.flops / 1e12:.2f}", f"{each.accessed_bytes / 1e9:.1f} GB",
        f"{cost.hbm_bytes / 1e9:.1f} GB",
        f"{1e3 * each.compute_seconds:.1f}", f"{1e3 * each.accessed_seconds:.1f}",
        f"{1e3 * each.ici_seconds:.2f}", each.bound_by, f"{each.fraction_of_ideal:.2f}",
    ]  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def details(found: Sequence[StepCost | DoesNotFit]) -> str:
    """Communication by kind, kernels, loops of unknown length."""
    lines = []
    for each in found:
        if isinstance(each, DoesNotFit):
            continue
        said = [
            f"{kind} {count} ({size / 1e6:.1f} MB)"
            for kind, (count, size) in sorted(each.cost.collectives.items())
        ]
        said += [
            f"{name} {count} ({flops / 1e9:.0f} GFLOP, {size / 1e9:.2f} GB by our own estimate)"
            for name, (count, flops, size) in sorted(each.cost.kernels.items())
        ]
        if each.cost.unknown_loops:
            said.append("decoding as long as it may take, one token after another")
        lines.append(f"{each.choice.name} {each.step}: {'; '.join(said) or 'no communication'}")
    return "\n".join(lines)


def verdicts(found: Sequence[StepCost | DoesNotFit]) -> str:
    """The smallest slice that fits, and the layout with the lowest estimate on each slice."""
    lines = []
    layouts = {each.choice for each in found}
    fitting = [c for c in layouts if all(each.fits for each in found if each.choice == c)]
    sizes = {each.choice: each.num_chips for each in found}
    for chip in sorted({choice.chip.name for choice in layouts}):
        mine = [choice for choice in fitting if choice.chip.name == chip]
        if not mine:
            lines.append(f"{chip}: none of the layouts tried fits.")
            continue
        least = min(mine, key=lambda choice: sizes[choice])
        lines.append(f"{chip}: the smallest slice tried that fits is {least.name}.")
    by_slice: dict[str, list[StepCost]] = {}
    for each in found:
        if isinstance(each, StepCost) and each.step == "train" and each.choice in fitting:
            by_slice.setdefault(each.choice.name, []).append(each)
    for topology, several in by_slice.items():
        if len(several) > 1:
            best = min(several, key=lambda each: each.estimate).choice
            parts = best.num_microbatches or 1
            lines.append(
                f"{topology}: by estimate, a model axis of {best.model_axis} and {parts} "
                "microbatches is the fastest layout tried."
            )
    return "\n".join(lines)


def as_json(found: Sequence[StepCost | DoesNotFit]) -> list[dict[str, Any]]:
    """Every figure, bytes and seconds unrounded."""
    return [dataclasses.asdict(each) | derived(each) for each in found]


def from_json(record: Mapping[str, Any]) -> StepCost:
    """What `as_json` made a record of; what was derived is derived anew."""
    given = {field.name: record[field.name] for field in dataclasses.fields(StepCost)}
    cost = dict(given["cost"])
    for name in ("collectives", "kernels"):  # JSON has no tuples
        cost[name] = {kind: tuple(numbers) for kind, numbers in cost[name].items()}
    return StepCost(**given | {"choice": MeshLayout(**given["choice"]), "cost": Cost(**cost)})


def derived(each: StepCost | DoesNotFit) -> dict[str, Any]:
    """What follows from the counts and the chip's peaks (`chips.CHIPS`)."""
    names = (
        "fits", "accessed_bytes", "compute_seconds", "accessed_seconds", "hbm_seconds",
        "ici_seconds", "bound_by", "fraction_of_ideal", "estimate",
    )  # fmt: skip
    return {name: getattr(each, name) for name in names if hasattr(each, name)}

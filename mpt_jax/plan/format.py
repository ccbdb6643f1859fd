"""Text and JSON output of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_jax.core import schema
from mpt_jax.plan.steps import DoesNotFit, Job, StepCost

NOTE = (
    "The TPU compiler's estimates, per chip and step; nothing was run. accessed: all reads and "
    "writes, including the chip's fast memory, by the compiler's count (for programs with loops by "
    "our count, which multiplies a loop's body by its trips); HBM: only main memory, by our count. "
    "ms: operations over peak, accessed bytes over the bandwidth of HBM, communicated bytes over "
    "the bandwidth of all links (without traffic between slices). of ideal: compute over the "
    "larger of compute and memory."
)
_HEAD = (
    "slice", "data x model", "parts", "rows", "step", "arguments", "temporaries", "peak", "of HBM",
    "TFLOP", "accessed", "HBM", "ms compute", "ms memory", "ms network", "bound by", "of ideal",
)  # fmt: skip


def table(found: Sequence[StepCost | DoesNotFit]) -> str:
    """Returns a Markdown table with a row for each step."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_row(cost)) + " |" for cost in found]
    return "\n".join(lines)


def _row(cost: StepCost | DoesNotFit) -> list[str]:
    choice, mesh = cost.choice, _mesh(cost)
    parts = "" if choice.num_microbatches is None else str(choice.num_microbatches)
    if isinstance(cost, DoesNotFit):
        blank = ["" for _ in _HEAD[6:]]
        return [
            choice.name,
            mesh,
            parts,
            "",
            cost.step,
            f"does not fit: {cost.message}",
            *blank,
        ]
    counts = cost.cost
    return [
        choice.name, mesh, parts, f"{cost.rows:g}", cost.step,
        _gib(cost.arguments), _gib(cost.temporaries), _gib(cost.peak),
        f"{cost.peak / choice.chip.hbm_bytes:.0%}" + ("" if cost.fits else " (does not fit)"),
        f"{counts.flops / 1e12:.2f}", f"{cost.accessed_bytes / 1e9:.1f} GB",
        f"{counts.hbm_bytes / 1e9:.1f} GB",
        f"{1e3 * cost.compute_seconds:.1f}", f"{1e3 * cost.accessed_seconds:.1f}",
        f"{1e3 * cost.ici_seconds:.2f}", cost.bound_by, f"{cost.fraction_of_ideal:.2f}",
    ]  # fmt: skip


def _mesh(cost: StepCost | DoesNotFit) -> str:
    model_axis = cost.choice.model_axis
    return f"{cost.num_chips // model_axis} x {model_axis}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def details(found: Sequence[StepCost | DoesNotFit]) -> str:
    """Returns a line for each step that was compiled: communication by kind, kernels, and how
    decoding was counted."""
    lines = []
    for cost in found:
        if isinstance(cost, DoesNotFit):
            continue
        notes = [
            f"{kind} {count} ({size / 1e6:.1f} MB)"
            for kind, (count, size) in sorted(cost.cost.collectives.items())
        ]
        notes += [
            f"{name} {count} ({flops / 1e9:.0f} GFLOP, {size / 1e9:.2f} GB by our own estimate)"
            for name, (count, flops, size) in sorted(cost.cost.kernels.items())
        ]
        if cost.cost.unknown_loops:
            notes.append("decoding counted at the maximum length")
        lines.append(f"{cost.choice.name} {cost.step}: {'; '.join(notes) or 'no communication'}")
    return "\n".join(lines)


def verdicts(found: Sequence[StepCost | DoesNotFit]) -> str:
    """Returns a line for each chip, with the smallest slice that fits, and one for each slice on
    which several layouts fit, with the layout that trains fastest by estimate."""
    lines = []
    layouts = {cost.choice for cost in found}
    fitting = [c for c in layouts if all(cost.fits for cost in found if cost.choice == c)]
    sizes = {cost.choice: cost.num_chips for cost in found}
    for chip in sorted({choice.chip.name for choice in layouts}):
        of_chip = [choice for choice in fitting if choice.chip.name == chip]
        if not of_chip:
            lines.append(f"{chip}: none of the layouts tried fits.")
            continue
        least = min(of_chip, key=lambda choice: sizes[choice])
        lines.append(f"{chip}: the smallest slice tried that fits is {least.name}.")
    by_slice: dict[str, list[StepCost]] = {}
    for cost in found:
        if isinstance(cost, StepCost) and cost.step == "train" and cost.choice in fitting:
            by_slice.setdefault(cost.choice.name, []).append(cost)
    for topology, several in by_slice.items():
        if len(several) > 1:
            best = min(several, key=lambda cost: cost.estimate).choice
            parts = best.num_microbatches or 1
            lines.append(
                f"{topology}: by estimate, a model axis of {best.model_axis} and {parts} "
                "microbatches is the fastest layout tried."
            )
    return "\n".join(lines)


def job_costs(found: Sequence[StepCost | DoesNotFit], job: Job) -> str:
    """Returns the job's estimated chip hours: a line for each layout whose train step fits, and
    what they leave out. '' if the job has no steps, or no train step fits."""
    lines = []
    for cost in found:
        if not (hours := _chip_hours(cost, job)) or not cost.fits:
            continue
        step = 1e3 * max(cost.compute_seconds, cost.accessed_seconds)
        parts = cost.choice.num_microbatches
        line = (
            f"* {cost.choice.name}, {_mesh(cost)}{f', {parts} microbatches' if parts else ''}: "
            f"{cost.num_chips} chips x {step:.1f} ms x {job.total_steps:,} steps = "
            f"{_hours(hours['estimated_chip_hours'])} chip hours"
        )
        if each := hours.get("estimated_chip_hours_per_run"):
            line += f", {_hours(each)} for each of {job.model.runs.num_rows} independent runs"
        lines.append(line)
    if not lines:
        return ""
    return "\n".join(
        (
            "Estimated cost of the job, in chip hours. A step takes the larger of ms compute and "
            "ms memory. Left out: data loading, evaluation, compilation, checkpoints, "
            "communication.",
            *lines,
        )
    )


def _chip_hours(cost: StepCost | DoesNotFit, job: Job) -> dict[str, float]:
    """Returns the estimated chip hours of the job, and of each run if all runs are independent; {}
    unless `cost` is a compiled train step and the job has steps."""
    if isinstance(cost, DoesNotFit) or cost.step != "train" or not job.total_steps:
        return {}
    hours, runs = cost.chip_hours(job.total_steps), job.model.runs
    found = {"estimated_chip_hours": hours}
    if 1 < runs.num_groups == runs.num_rows:
        found["estimated_chip_hours_per_run"] = hours / runs.num_rows
    return found


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def as_json(found: Sequence[StepCost | DoesNotFit], job: Job) -> list[dict[str, Any]]:
    """Returns all figures as JSON values, unrounded, in bytes, seconds and chip hours."""
    return [dataclasses.asdict(cost) | derived(cost) | _chip_hours(cost, job) for cost in found]


def from_json(record: Mapping[str, Any]) -> StepCost:
    """Returns the `StepCost` in a record of `as_json`. Derived figures are computed again.

    Raises:
        ValueError: a field is missing or has another type.
    """
    advice = "Compile the step again, with `mpt-jax plan --json`."
    return schema.check(record, StepCost, "The record of a plan", advice)


def derived(each: StepCost | DoesNotFit) -> dict[str, Any]:
    """Returns the figures derived from the counts and the chip's peaks (`chips.CHIPS`); only
    `fits` for a step that was not compiled."""
    names = (
        "fits", "accessed_bytes", "compute_seconds", "accessed_seconds", "hbm_seconds",
        "ici_seconds", "bound_by", "fraction_of_ideal", "estimate",
    )  # fmt: skip
    return {name: getattr(each, name) for name in names if hasattr(each, name)}

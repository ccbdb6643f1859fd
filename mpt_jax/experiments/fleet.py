"""Fleets: the independent runs of one job, a product of tasks, examples, seeds and settings.

    tasks x k x seeds x learning rates x learning rates of factors x starts x initial values

A run's name contains its task, k and seed, and those settings that differ in the fleet:
`rte_k16_s1`, `rte_k16_s1_lr0.3`, `rte_k16_s1_lr0.3_tlr0.4_from_mnli`. A run's data and initial
values depend only on this name, so a run is the same in any fleet and as a single run
(`runs.data_name`).
"""

from __future__ import annotations

import collections
import dataclasses
import decimal
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mpt_jax.core.runs import data_name, unknown_name
from mpt_jax.prompts.init import PromptInit, PromptInits


class Member(NamedTuple):
    """One run of a fleet. A setting is None if the fleet leaves it to the stage."""

    name: str
    task: str
    learning_rate: float | None
    task_learning_rate: float | None
    start: str | None
    init: str | None


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The runs of a job. The file in `gin/runs` that binds a field is given in parentheses.

    Attributes:
        tasks: SeqIO tasks (fleet.gin).
        shots: k, training examples of each run; None for all (fleet.gin).
        seeds: draws of the k examples, or with all examples repeats in another order. Each seed
            has different initial values. None: draw 0, or a single repeat under the task's own
            name (fleet.gin).
        learning_rates: peak learning rates (fleet.gin).
        task_learning_rates: peak learning rates of MPT's factors (fleet_task_rates.gin).
        starts: rows of INITIAL_ARTIFACT that runs start from: `'average'` or a row's name
            (fleet_starts.gin).
        inits: name -> initializer, for prompts without a source prompt (fleet_inits.gin).

    Raises:
        ValueError: a list is empty or repeats a value, or a number is out of range.
    """

    tasks: Sequence[str]
    shots: Sequence[int | None] = (None,)
    seeds: Sequence[int] | None = None
    learning_rates: Sequence[int | float] | None = None
    task_learning_rates: Sequence[int | float] | None = None
    starts: Sequence[str] | None = None
    inits: Mapping[str, PromptInit] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            listed = isinstance(values, Sequence | Mapping) and not isinstance(values, str)
            if not listed or not values:
                raise ValueError(f"Fleet.{field.name} must be a list of values, got {values!r}.")
            counts = collections.Counter(list(values))
            repeated = [value for value, count in counts.items() if count > 1]
            if repeated:
                raise ValueError(
                    f"Fleet.{field.name} lists {repeated} more than once, so several runs would "
                    "have the same name. To repeat a run, list several seeds."
                )
        if any(k is not None and k < 1 for k in self.shots):
            raise ValueError(f"Fleet.shots must be positive, or None for all, got {self.shots}.")
        if any(seed < 0 for seed in self.seeds or ()):
            raise ValueError(f"Fleet.seeds must not be negative, got {self.seeds}.")

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """All runs; the task is the slowest axis.

        Raises:
            ValueError: two runs have the same name, or a task's own name ends like a setting.
        """
        inits = self.inits and tuple(self.inits)
        rates = (self.learning_rates, self.task_learning_rates)
        axes: tuple[Any, ...] = (*rates, self.starts, inits)
        members = []
        for draw in itertools.product(self.tasks, self.shots, self.seeds or (None,)):
            data = _name(*draw, (None,) * len(axes))
            for values in itertools.product(*(axis or (None,) for axis in axes)):
                name = _name(*draw, _if_several(axes, values))
                _check_reads(name, data)
                members.append(Member(name, draw[0], *values))
        counts = collections.Counter(member.name for member in members)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                f"The fleet has several runs named {repeated}: one task is named like another task "
                "with k, a seed or settings appended. Register one of them under another name."
            )
        return tuple(members)


def task_names(fleet: Fleet) -> list[str]:
    """Returns the task of every run."""
    return [member.task for member in fleet.members]


def run_names(fleet: Fleet) -> list[str]:
    """Returns the name of every run, which is the name of its SeqIO task."""
    return [member.name for member in fleet.members]


def learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """Returns the peak learning rate of every run; one number if all are equal."""
    return _column(fleet, lambda member: member.learning_rate)


def task_learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """Returns the peak learning rate of MPT's factors; one number if all runs share it."""
    return _column(fleet, lambda member: member.task_learning_rate)


def start_from(fleet: Fleet) -> str | dict[str, str] | None:
    """Returns a prompt method's `start_from`: run -> row, or one row for all."""
    rows = _column(fleet, lambda member: member.start)
    if not isinstance(rows, list):
        return rows
    return {member.name: row for member, row in zip(fleet.members, rows, strict=True)}


def inits(fleet: Fleet) -> PromptInits:
    """Returns a prompt method's `init_prompt`: run -> initializer, or one for all.

    Raises:
        ValueError: the fleet has no initializers.
    """
    if not fleet.inits:
        raise ValueError("Fleet.inits is empty. Set INITS, or leave out fleet_inits.gin.")
    by_run = {member.name: fleet.inits[member.init or ""] for member in fleet.members}
    return by_run if len(fleet.inits) > 1 else next(iter(by_run.values()))


def total_steps(
    fleet: Fleet, train_steps: int, task_steps: Mapping[str, int] | None = None
) -> int | list[int]:
    """Returns the last step of every run's schedule; one number if all are equal.

    Args:
        fleet: the runs.
        train_steps: steps of the job.
        task_steps: task -> steps of its runs, for runs that end before the job does.

    Raises:
        ValueError: a task is not in the fleet, a run has more steps than the job, or every run has
            fewer.
    """
    for task, steps in (task_steps or {}).items():
        if task not in fleet.tasks:
            raise ValueError(unknown_name("task in TASK_STEPS", task, list(fleet.tasks)))
        if not 1 <= steps <= train_steps:
            raise ValueError(
                f"TASK_STEPS gives {task!r} {steps} steps, which is not between 1 and the job's "
                f"{train_steps}. Set TRAIN_STEPS to the largest number of steps of a run."
            )
    last_steps = [(task_steps or {}).get(member.task, train_steps) for member in fleet.members]
    if max(last_steps) != train_steps:
        raise ValueError(
            f"TASK_STEPS gives every task of the fleet fewer steps than the job's {train_steps}. "
            f"Set TRAIN_STEPS = {max(last_steps)}, the largest of them."
        )
    return last_steps[0] if len(set(last_steps)) == 1 else last_steps


def _column(fleet: Fleet, field: Callable[[Member], Any]) -> Any:
    values = [field(member) for member in fleet.members]
    return values[0] if len(set(values)) == 1 else values


def _if_several(axes: Sequence[Sequence[Any] | None], values: Sequence[Any]) -> list[Any]:
    """Returns the values, with None for axes that have only one."""
    return [
        value if axis is not None and len(axis) > 1 else None
        for axis, value in zip(axes, values, strict=True)
    ]


def _name(task: str, shots: int | None, seed: int | None, differing: Sequence[Any]) -> str:
    """Returns a run's name; `differing` are its settings, None for those that all runs share."""
    rate, task_rate, start, init = differing
    name = task if shots is None else f"{task}_k{shots}"
    if shots is not None or seed is not None:
        name += f"_s{seed or 0}"
    name += "" if rate is None else f"_lr{_plain(rate)}"
    name += "" if task_rate is None else f"_tlr{_plain(task_rate)}"
    name += "" if start is None else f"_from_{start}"
    return name + ("" if init is None else f"_init_{init}")


def _check_reads(name: str, data: str) -> None:
    """Checks that `data_name` recovers the data's name from the run's name."""
    if (read := data_name(name)) != data:
        raise ValueError(
            f"The fleet's run {name!r} has the data of {data!r}, but its name reads as {read!r} "
            "with settings. Register the task under a name without '_lr', '_tlr', '_from_' and "
            "'_init_'."
        )


def _plain(number: int | float) -> str:
    """Formats a number without an exponent, because SeqIO names may not contain a minus sign."""
    return format(decimal.Decimal(repr(number)), "f")

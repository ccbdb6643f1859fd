"""A fleet: independent runs of one job, the product of tasks, examples, seeds and settings.

    tasks x k x seeds x learning rates x learning rates of factors x starts x initial values

A run's name carries its task, k, seed, and of the settings only those that differ in the fleet:
`rte_k16_s1`, `rte_k16_s1_lr0.3`, `rte_k16_s1_lr0.3_tlr0.4_from_mnli`. Such a name says everything
that a run's data and initial values depend on, so the run of that name is the same in any fleet and
alone (`runs.data_name`).
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
    """One run of a fleet; a setting is None where the fleet leaves it to the stage."""

    name: str
    task: str
    learning_rate: float | None
    task_learning_rate: float | None
    start: str | None
    init: str | None


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The runs of a job. Names of files in `gin/runs` that bind the fields are in brackets.

    Attributes:
        tasks: SeqIO tasks (fleet.gin).
        shots: k, training examples of each run; None for all (fleet.gin).
        seeds: draws of the k examples, or with all of them repeats in another order; each has
            initial values of its own. None: draw 0, or a single repeat under the task's own name
            (fleet.gin).
        learning_rates: peaks (fleet.gin).
        task_learning_rates: those of MPT's factors (fleet_task_rates.gin).
        starts: rows of INITIAL_ARTIFACT that runs start from: `'average'`, or the name of one
            (fleet_starts.gin).
        inits: name -> initializer of prompts that start from none (fleet_inits.gin).

    Raises:
        ValueError: an empty list, a value that stands twice, numbers out of range.
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
                    f"Fleet.{field.name} has {repeated} more than once, so runs would have one "
                    "name. For repeats of a run give it several seeds."
                )
        if any(k is not None and k < 1 for k in self.shots):
            raise ValueError(f"Fleet.shots must be positive, or None for all, got {self.shots}.")
        if any(seed < 0 for seed in self.seeds or ()):
            raise ValueError(f"Fleet.seeds must not be negative, got {self.seeds}.")

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """Every run; tasks change slowest.

        Raises:
            ValueError: two runs of one name; a task whose own name ends like a setting.
        """
        inits = self.inits and tuple(self.inits)
        rates = (self.learning_rates, self.task_learning_rates)
        axes: tuple[Any, ...] = (*rates, self.starts, inits)
        made = []
        for draw in itertools.product(self.tasks, self.shots, self.seeds or (None,)):
            data = _name(*draw, (None,) * len(axes))
            for values in itertools.product(*(axis or (None,) for axis in axes)):
                name = _name(*draw, _if_several(axes, values))
                _check_reads(name, data)
                made.append(Member(name, draw[0], *values))
        counts = collections.Counter(member.name for member in made)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                f"The fleet has several runs of one name, {repeated}: of its tasks, one is called "
                "as another with some of k, seed and settings is."
            )
        return tuple(made)


def task_names(fleet: Fleet) -> list[str]:
    """The task of every run."""
    return [member.task for member in fleet.members]


def run_names(fleet: Fleet) -> list[str]:
    """The name of every run: that of its SeqIO task."""
    return [member.name for member in fleet.members]


def learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """The peak of every run's schedule; one number where all have the same."""
    return _column(fleet, lambda member: member.learning_rate)


def task_learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """The same of MPT's factors."""
    return _column(fleet, lambda member: member.task_learning_rate)


def start_from(fleet: Fleet) -> str | dict[str, str] | None:
    """What a prompt method's `start_from` is to be: run -> row, or one row for all."""
    found = _column(fleet, lambda member: member.start)
    if not isinstance(found, list):
        return found
    return {member.name: row for member, row in zip(fleet.members, found, strict=True)}


def inits(fleet: Fleet) -> PromptInits:
    """What a prompt method's `init_prompt` is to be: run -> initializer, or one for all.

    Raises:
        ValueError: the fleet has none.
    """
    if not fleet.inits:
        raise ValueError("Fleet.inits names no initializers; set INITS, or leave the file out.")
    made = {member.name: fleet.inits[member.init or ""] for member in fleet.members}
    return made if len(fleet.inits) > 1 else next(iter(made.values()))


def total_steps(
    fleet: Fleet, train_steps: int, task_steps: Mapping[str, int] | None = None
) -> int | list[int]:
    """Where the schedule of every run ends; one number where all have the same.

    Args:
        fleet: the runs.
        train_steps: steps of the job.
        task_steps: task -> steps of its runs, for those that end before the job does.

    Raises:
        ValueError: a task that the fleet does not have, more steps than the job's, or fewer for
            every task.
    """
    for task, steps in (task_steps or {}).items():
        if task not in fleet.tasks:
            raise ValueError(unknown_name("task in TASK_STEPS", task, list(fleet.tasks)))
        if not 1 <= steps <= train_steps:
            raise ValueError(
                f"TASK_STEPS gives {task!r} {steps} steps, and the job has {train_steps}: set "
                "TRAIN_STEPS to the largest of them."
            )
    found = [(task_steps or {}).get(member.task, train_steps) for member in fleet.members]
    if max(found) != train_steps:
        raise ValueError(
            f"TASK_STEPS gives every task of the fleet fewer steps than the job's {train_steps}, "
            f"{max(found)} at most: set TRAIN_STEPS to the largest of them."
        )
    return found[0] if len(set(found)) == 1 else found


def _column(fleet: Fleet, of: Callable[[Member], Any]) -> Any:
    found = [of(member) for member in fleet.members]
    return found[0] if len(set(found)) == 1 else found


def _if_several(axes: Sequence[Sequence[Any] | None], values: Sequence[Any]) -> list[Any]:
    """The values of those axes that have several."""
    return [
        value if axis is not None and len(axis) > 1 else None
        for axis, value in zip(axes, values, strict=True)
    ]


def _name(task: str, shots: int | None, seed: int | None, differing: Sequence[Any]) -> str:
    """A run's name; `differing` are its settings, None for those that all runs share."""
    rate, task_rate, start, init = differing
    name = task if shots is None else f"{task}_k{shots}"
    if shots is not None or seed is not None:
        name += f"_s{seed or 0}"
    name += "" if rate is None else f"_lr{_plain(rate)}"
    name += "" if task_rate is None else f"_tlr{_plain(task_rate)}"
    name += "" if start is None else f"_from_{start}"
    return name + ("" if init is None else f"_init_{init}")


def _check_reads(name: str, data: str) -> None:
    """Refuses a run's name that tells another name of its data than what it was made from."""
    if (read := data_name(name)) != data:
        raise ValueError(
            f"The fleet's run {name!r} has the data of {data!r}, but its name reads as {read!r} "
            "with settings. Register its task under a name without '_lr', '_tlr', '_from_' and "
            "'_init_'."
        )


def _plain(number: int | float) -> str:
    """A number without an exponent, whose minus sign no SeqIO name may have."""
    return format(decimal.Decimal(repr(number)), "f")

"""Fleets: independent runs in one job, one per combination of tasks, k, seeds and settings.

    tasks x k x seeds x learning rates x learning rates of factors x starts x initializers

A run's name contains its task, k and seed, and the settings that differ between runs of the fleet:
`rte_k16_s1`, `rte_k16_s1_lr0.3`, `rte_k16_s1_lr0.3_tlr0.4_from_mnli`. A run's examples, their order
and its random key depend only on the part of this name before the settings (`runs.data_name`), so a
run does not depend on the fleet that contains it. (Dropout masks do: they are drawn for the batch.)
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

# Field of `Fleet` -> the macro that gin files bind it to.
_MACROS = {
    "tasks": "TARGET_TASKS",
    "shots": "SHOTS",
    "seeds": "SEEDS",
    "learning_rates": "LEARNING_RATES",
    "task_learning_rates": "TASK_LEARNING_RATES",
    "starts": "STARTS",
    "inits": "INITS",
}


class Member(NamedTuple):
    """One run of a fleet. A setting is None if the gin file of the stage determines it."""

    name: str
    task: str
    learning_rate: float | None
    task_learning_rate: float | None
    start: str | None
    init: str | None


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The runs of a job: all combinations of the values of the fields.

    The file in gin/runs that binds a field is in parentheses.

    Attributes:
        tasks: The names of the SeqIO tasks (fleet.gin).
        shots: The numbers k of training examples per run; a None in the list stands for all
            (fleet.gin).
        per_class: Whether k is the number of training examples of each class, as it must be for
            images (fleet.gin).
        seeds: The seeds. A seed selects the draw of the k examples, or the order if a run uses all
            examples, and the initial values. None stands for draw 0 or, with all examples, for a
            single run with the name of its task (fleet.gin).
        learning_rates: The peak learning rates (fleet.gin).
        task_learning_rates: The peak learning rates of MPT's factors (fleet_task_rates.gin).
        starts: The prompts of INITIAL_ARTIFACT that runs start from: a prompt's name, or
            `'average'` for their mean (fleet_starts.gin).
        inits: Initializers by name, for runs that do not start from a prompt (fleet_inits.gin).

    Raises:
        ValueError: a field is not a list, is empty or repeats a value, or a number is out of range.
    """

    tasks: Sequence[str]
    shots: Sequence[int | None] = (None,)
    seeds: Sequence[int] | None = None
    learning_rates: Sequence[int | float] | None = None
    task_learning_rates: Sequence[int | float] | None = None
    starts: Sequence[str] | None = None
    inits: Mapping[str, PromptInit] | None = None
    per_class: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is None or field.name == "per_class":
                continue
            listed = isinstance(values, Sequence | Mapping) and not isinstance(values, str)
            if not listed or not values:
                kind, form = "list", "[VALUE, ...]"
                if field.name == "inits":
                    kind, form = "dictionary", "{'NAME': @init.INITIALIZER(), ...}"
                raise ValueError(
                    f"{_MACROS[field.name]} must be a non-empty {kind}, got {values!r}. Set "
                    f"{_MACROS[field.name]} = {form}, even for a single value."
                )
            counts = collections.Counter(list(values))
            repeated = [value for value, count in counts.items() if count > 1]
            if repeated:
                raise ValueError(
                    f"{_MACROS[field.name]} lists {', '.join(map(repr, repeated))} more than once, "
                    "so several runs would have the same name. Remove the duplicates. To repeat a "
                    "run, list several seeds in SEEDS."
                )
        if small := [k for k in self.shots if k is not None and k < 1]:
            raise ValueError(
                f"The numbers in SHOTS must be positive, got {small[0]}. Use numbers of at least "
                "1, or None for all examples."
            )
        if negative := [seed for seed in self.seeds or () if seed < 0]:
            raise ValueError(
                f"The numbers in SEEDS must not be negative, got {negative[0]}. Use numbers of at "
                "least 0."
            )

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """All runs, ordered by task first.

        Raises:
            ValueError: two runs have the same name, or a run's name cannot be split into task, draw
                and settings, because a task has a name such as `qa_from_text`.
        """
        inits = self.inits and tuple(self.inits)
        rates = (self.learning_rates, self.task_learning_rates)
        axes: tuple[Any, ...] = (*rates, self.starts, inits)
        members = []
        for draw in itertools.product(self.tasks, self.shots, self.seeds or (None,)):
            data = _name(*draw, self.per_class, (None,) * len(axes))
            for values in itertools.product(*(axis or (None,) for axis in axes)):
                name = _name(*draw, self.per_class, _if_several(axes, values))
                _check_reads(name, data)
                members.append(Member(name, draw[0], *values))
        counts = collections.Counter(member.name for member in members)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                f"The fleet has several runs named {', '.join(repeated)}: the name of one task is "
                "the name of another task plus k, a seed or settings. Register one of the tasks "
                "under another name."
            )
        return tuple(members)


def task_names(fleet: Fleet) -> list[str]:
    """Returns the task of every run."""
    return [member.task for member in fleet.members]


def run_names(fleet: Fleet) -> list[str]:
    """Returns the name of every run, which is the name of its SeqIO task."""
    return [member.name for member in fleet.members]


def joint_groups(fleet: Fleet) -> list[int]:
    """Returns the group of every run: runs that differ only in their task are trained jointly, so a
    job trains a shared prompt for each seed and setting."""
    rest = [member.name.removeprefix(member.task) for member in fleet.members]
    number = {name: group for group, name in enumerate(dict.fromkeys(rest))}
    return [number[name] for name in rest]


def learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """Returns the peak learning rate of every run, or one number if all are equal; None if the
    fleet sets none."""
    return _column(fleet, lambda member: member.learning_rate)


def task_learning_rates(fleet: Fleet) -> int | float | list[int | float] | None:
    """Returns the peak learning rate of every run's MPT factors, or one number if all are equal;
    None if the fleet sets none."""
    return _column(fleet, lambda member: member.task_learning_rate)


def start_from(fleet: Fleet) -> str | dict[str, str] | None:
    """Returns a prompt method's `start_from`: run -> name of a prompt, or one name for all runs;
    None if the fleet sets none."""
    rows = _column(fleet, lambda member: member.start)
    if not isinstance(rows, list):
        return rows
    return {member.name: row for member, row in zip(fleet.members, rows, strict=True)}


def inits(fleet: Fleet) -> PromptInits:
    """Returns a prompt method's `init_prompt`: run -> initializer, or one initializer for all runs.

    Raises:
        ValueError: the fleet has no initializers.
    """
    if not fleet.inits:
        raise ValueError(
            "The fleet has no initializers. Set INITS, or drop --gin_file=gin/runs/fleet_inits.gin."
        )
    by_run = {member.name: fleet.inits[member.init or ""] for member in fleet.members}
    return by_run if len(fleet.inits) > 1 else next(iter(by_run.values()))


def total_steps(
    fleet: Fleet, train_steps: int, task_steps: Mapping[str, int] | None = None
) -> int | list[int]:
    """Returns the last step of every run's schedule, or one number if all are equal.

    Args:
        fleet: The runs.
        train_steps: The number of steps of the job.
        task_steps: Task -> number of steps of its runs, for runs that finish before the job.

    Raises:
        ValueError: a task is not in the fleet, a run has fewer than 1 step or more steps than the
            job, or every run has fewer steps than the job.
    """
    for task, steps in (task_steps or {}).items():
        if task not in fleet.tasks:
            raise ValueError(unknown_name("TASK_STEPS task", task, list(fleet.tasks)))
        if not 1 <= steps <= train_steps:
            raise ValueError(
                f"TASK_STEPS[{task!r}] = {steps} is not between 1 and TRAIN_STEPS = {train_steps}. "
                "Change it; if this is the longest run, set TRAIN_STEPS to its number of steps."
            )
    last_steps = [(task_steps or {}).get(member.task, train_steps) for member in fleet.members]
    if max(last_steps) != train_steps:
        raise ValueError(
            f"TASK_STEPS sets fewer steps than TRAIN_STEPS = {train_steps} for every task of the "
            f"fleet. Set TRAIN_STEPS = {max(last_steps)}, the number of steps of the longest run."
        )
    return last_steps[0] if len(set(last_steps)) == 1 else last_steps


def _column(fleet: Fleet, field: Callable[[Member], Any]) -> Any:
    values = [field(member) for member in fleet.members]
    return values[0] if len(set(values)) == 1 else values


def _if_several(axes: Sequence[Sequence[Any] | None], values: Sequence[Any]) -> list[Any]:
    """Returns a run's setting on each axis, with None for axes that have only one value."""
    return [
        value if axis is not None and len(axis) > 1 else None
        for axis, value in zip(axes, values, strict=True)
    ]


def _name(
    task: str, shots: int | None, seed: int | None, per_class: bool, differing: Sequence[Any]
) -> str:
    """Returns a run's name. `differing` holds its settings, or None for shared settings."""
    rate, task_rate, start, init = differing
    name = task if shots is None else f"{task}_k{shots}{'_per_class' if per_class else ''}"
    if shots is not None or seed is not None:
        name += f"_s{seed or 0}"
    name += "" if rate is None else f"_lr{_plain(rate)}"
    name += "" if task_rate is None else f"_tlr{_plain(task_rate)}"
    name += "" if start is None else f"_from_{start}"
    return name + ("" if init is None else f"_init_{init}")


def _check_reads(name: str, data: str) -> None:
    """Raises ValueError unless `data_name(name)` is `data`, the run's name without settings."""
    if (read := data_name(name)) != data:
        raise ValueError(
            f"The run name {name!r} is ambiguous: it would be parsed as {read!r} plus settings, "
            f"although the run uses the data of {data!r}. Choose names in TARGET_TASKS, STARTS and "
            "INITS that do not contain '_lr', '_tlr', '_from_' or '_init_'."
        )


def _plain(number: int | float) -> str:
    """Formats a number without an exponent, because SeqIO names may not contain a minus sign."""
    return format(decimal.Decimal(repr(number)), "f")

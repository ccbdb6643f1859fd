"""Runs: the rows of the prompt bank, and their groups.

A bank has K rows. Each row is a *run*: one task, trained once. Usually each task has one run of
the same name; a job that adapts to one task with three seeds has three runs of it. The rows are
divided into G groups. Groups never affect each other: each has its own shared parameters, learning
rate, clipping and best step. A source stage is one group; independent adaptations are one group
each.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mpt_jax.core.comparison import abbreviate

_Value = TypeVar("_Value")

# A run name: `data`, then settings that affect neither its examples nor its random key.
_SETTINGS = re.compile(
    r"(?P<data>.+?)(_lr\d+(\.\d+)?)?(_tlr\d+(\.\d+)?)?(_from_[\w.:]+?)?(_init_[\w.:]+)?",
    re.ASCII | re.DOTALL,
)

JOINT = "joint"
INDEPENDENT = "independent"


@dataclasses.dataclass(frozen=True)
class Runs:
    """The rows of a prompt bank.

    Attributes:
        task_names: the name of each row's task; K names.
        run_names: the name of each row's run; K distinct names. A run's name is also the name of
            the SeqIO task that provides its training examples. Defaults to `task_names`.
        groups: `'joint'` (all rows in one group), `'independent'` (one group per row), or K
            group numbers, 0 .. G-1 without gaps.

    Raises:
        ValueError: `task_names` is not a list or is empty, a run name is repeated, the lists differ
            in length, or `groups` has another form.
    """

    task_names: Sequence[str]
    run_names: Sequence[str] = ()
    groups: str | Sequence[int] = JOINT

    def __post_init__(self):
        tasks = tuple(self.task_names)
        runs = tuple(self.run_names) or tasks
        if isinstance(self.task_names, str) or not tasks:
            raise ValueError(
                f"task_names must be a list of at least one task name, got {self.task_names!r}. "
                "Write, for example, TARGET_TASKS = ['rte'] in gin, or task_names=['rte'] in "
                "Python."
            )
        if len(runs) != len(tasks):
            raise ValueError(
                f"Got {len(tasks)} task names but {len(runs)} run names. Bind as many RUN_NAMES as "
                "TASK_NAMES, or leave RUN_NAMES at its default to name each run after its task."
            )
        repeated = sorted(name for name, count in collections.Counter(runs).items() if count > 1)
        if repeated:
            raise ValueError(
                f"Run names must be distinct, but these occur more than once: "
                f"{', '.join(repeated)}. Remove the repeated names, or give each run of a task its "
                "own name, such as rte_s0 and rte_s1."
            )
        if isinstance(self.groups, str):
            if self.groups not in (JOINT, INDEPENDENT):
                raise ValueError(
                    f"groups must be {JOINT!r}, {INDEPENDENT!r} or a list of group numbers, got "
                    f"{self.groups!r}. Correct GROUPS."
                )
            groups = (0,) * len(tasks) if self.groups == JOINT else tuple(range(len(tasks)))
        else:
            groups = _integers(self.groups)
        if len(groups) != len(tasks) or set(groups) != set(range(len(set(groups)))):
            raise ValueError(
                f"groups must give each of the {len(tasks)} runs a group number from 0 to G-1, "
                f"without a gap, got {groups}. Renumber GROUPS, or bind it to {JOINT!r} or "
                f"{INDEPENDENT!r}."
            )
        object.__setattr__(self, "task_names", tasks)
        object.__setattr__(self, "run_names", runs)
        object.__setattr__(self, "groups", groups)

    @property
    def num_rows(self) -> int:
        """Number of rows, K."""
        return len(self.task_names)

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return max(self.group_of_row) + 1

    @property
    def group_of_row(self) -> tuple[int, ...]:
        """Group number of each row."""
        assert not isinstance(self.groups, str)
        return tuple(self.groups)

    def names_of_group(self, group: int) -> tuple[str, ...]:
        """Returns the names of a group's runs."""
        rows = zip(self.run_names, self.group_of_row, strict=True)
        return tuple(name for name, row_group in rows if row_group == group)

    def row(self, run_name: str) -> int:
        """Returns the bank row of a run.

        Raises:
            ValueError: there is no such run; the message lists the closest names, then the known
                names.
        """
        return look_up("run", run_name, self._rows)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        """Bank row of each run, by run name."""
        return {name: row for row, name in enumerate(self.run_names)}


def _integers(groups: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(group) for group in groups)
    except TypeError as error:
        shown = abbreviate([repr(x) for x in groups]) if isinstance(groups, Sequence) else groups
        raise ValueError(
            f"groups must be a list of integers, got {shown}. Set GROUPS to one integer per run, "
            f"or to {JOINT!r} or {INDEPENDENT!r}."
        ) from error


def data_name(run_name: str) -> str:
    """Returns the name that determines a run's examples, their order and its random key.

    Run names may end in settings: `_lr0.3`, `_tlr0.4`, `_from_mnli` and `_init_text`, in this
    order. Runs that differ only in these settings (a learning rate, or what they start from) have
    the same examples, order and random key; the key does not depend on the initializer. The name
    after `_from_` may contain settings itself.

    A task whose own name ends like this, such as `qa_from_text`, is treated the same way: it keeps
    its examples, but their order and its random key are those of `qa`. Fleets reject such a name.
    """
    match = _SETTINGS.fullmatch(run_name)
    assert match is not None  # any non-empty name matches
    return match["data"]


def global_batch_size(runs: Runs, examples: int) -> int:
    """Returns the number of examples per step of a job.

    Args:
        runs: the runs of the job.
        examples: the number of examples per group and step: the batch size of a job that trains
            only one group.
    """
    return runs.num_groups * examples


def look_up(what: str, name: str, known: Mapping[str, _Value]) -> _Value:
    """Returns `known[name]`.

    Raises:
        ValueError: the name is unknown; the message lists the closest names, then the known names.
    """
    if name not in known:
        raise ValueError(unknown_name(what, name, list(known)))
    return known[name]


def entry_of_run(table: Mapping[str, _Value], name: str, what: str, kind: str = "run") -> _Value:
    """Returns the entry of a run in a table that must have one for every run.

    Args:
        table: run name (or task name, see `kind`) -> value.
        name: the key to look up.
        what: the user-facing name of the table in the error message, such as a setting or macro.
        kind: what each key identifies, `'run'` or `'task'`.

    Raises:
        ValueError: the table has no such entry; the message lists its keys.
    """
    if name not in table:
        others = f", only for {', '.join(table)}" if table else ""
        raise ValueError(
            f"{what} has no entry for the {kind} {name!r}{others}. Add an entry for {name!r}."
        )
    return table[name]


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """Returns the message for an unknown name. It suggests the closest names and lists at most
    `MOST_SHOWN` known names."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown {what} {name!r}.{hint} Known: {abbreviate(sorted(known)) or 'none'}."

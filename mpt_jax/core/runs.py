"""Which row of the prompt bank is which.

A bank has K rows. A row is a *run*: one task, learned once. Usually each task has one run and the
two names agree; a job that adapts one task with three seeds has three runs of it. Rows fall into
G groups, and groups never see each other: each has its own shared parameters, learning rate,
clipping and best step. A source stage is one group; independent adaptations are a group each.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

_Value = TypeVar("_Value")

# What a run's name says of settings that neither its data nor its initial values depend on.
_SETTINGS = re.compile(
    r"(?P<data>.+?)(_lr\d+(\.\d+)?)?(_tlr\d+(\.\d+)?)?(_from_[\w.:]+?)?(_init_[\w.:]+)?",
    re.ASCII,
)

JOINT = "joint"
INDEPENDENT = "independent"


@dataclasses.dataclass(frozen=True)
class Runs:
    """The rows of a prompt bank.

    Attributes:
        task_names: K names, the task that each row answers.
        run_names: K distinct names, the SeqIO task whose examples train the row. Default: the
            task names.
        groups: `'joint'` (all rows in one group), `'independent'` (a group for each row), or K
            group numbers, 0 .. G-1 without a gap.

    Raises:
        ValueError: no rows, a repeated run name, tables of different lengths, a gap in groups.
    """

    task_names: Sequence[str]
    run_names: Sequence[str] = ()
    groups: str | Sequence[int] = JOINT

    def __post_init__(self):
        tasks = tuple(self.task_names)
        runs = tuple(self.run_names) or tasks
        if isinstance(self.task_names, str) or not tasks:
            raise ValueError(f"task_names must be a list of names, got {self.task_names!r}.")
        if len(runs) != len(tasks):
            raise ValueError(
                f"{len(tasks)} task names but {len(runs)} run names; each row needs one of each."
            )
        repeated = sorted(name for name, count in collections.Counter(runs).items() if count > 1)
        if repeated:
            raise ValueError(
                f"Run names must be distinct; repeated: {repeated}. Give several runs of one task "
                "their own run_names."
            )
        if isinstance(self.groups, str):
            if self.groups not in (JOINT, INDEPENDENT):
                raise ValueError(
                    f"groups must be {JOINT!r}, {INDEPENDENT!r} or a list of group numbers, got "
                    f"{self.groups!r}."
                )
            groups = (0,) * len(tasks) if self.groups == JOINT else tuple(range(len(tasks)))
        else:
            groups = tuple(int(group) for group in self.groups)
        if len(groups) != len(tasks) or set(groups) != set(range(max(groups) + 1)):
            raise ValueError(
                f"groups must give each of the {len(tasks)} rows a number, 0 .. G-1 without a "
                f"gap, got {groups}."
            )
        object.__setattr__(self, "task_names", tasks)
        object.__setattr__(self, "run_names", runs)
        object.__setattr__(self, "groups", groups)

    @property
    def num_rows(self) -> int:
        """K."""
        return len(self.task_names)

    @property
    def num_groups(self) -> int:
        """G."""
        return max(self.group_of_row) + 1

    @property
    def group_of_row(self) -> tuple[int, ...]:
        """K group numbers."""
        assert not isinstance(self.groups, str)
        return tuple(self.groups)

    def names_of_group(self, group: int) -> tuple[str, ...]:
        """The runs of a group."""
        rows = zip(self.run_names, self.group_of_row, strict=True)
        return tuple(name for name, of in rows if of == group)

    def row(self, run_name: str) -> int:
        """The bank row of a run.

        Raises:
            ValueError: no such run; lists the known ones, the closest first.
        """
        return look_up("run", run_name, self._rows)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        """Run -> its row."""
        return {name: row for row, name in enumerate(self.run_names)}


def data_name(run_name: str) -> str:
    """The name that a run's examples, their order and its initial values depend on.

    Runs that differ in a learning rate or in what they start from, and say so at the end of their
    names, `_lr0.3`, `_tlr0.4`, `_from_mnli` and `_init_text` in this order, are alike in all of
    these. (Of one initializer or another the random key is the same.) What a run starts from may be
    called with settings itself.

    A task whose own name has such an end, `qa_from_text`, is read in the same way: it keeps its
    examples, and their order and its random key are those of `qa`. Fleets refuse it.
    """
    found = _SETTINGS.fullmatch(run_name)
    assert found is not None  # of any text but the empty one
    return found["data"]


def global_batch_size(runs: Runs, examples: int) -> int:
    """Examples in a step of a job whose groups have `examples` each, as many as each has alone."""
    return runs.num_groups * examples


def look_up(what: str, name: str, known: Mapping[str, _Value]) -> _Value:
    """`known[name]`.

    Raises:
        ValueError: there is none; lists the known names, the closest first.
    """
    if name not in known:
        raise ValueError(unknown_name(what, name, list(known)))
    return known[name]


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The message for an unknown name: the closest known ones, then all of them."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known)) or 'none'}."

"""A table: its variants, tasks, numbers of examples and seeds. Its stages are in chains.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mpt_jax.experiments.paper import suites
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
        held_out: Name of a task that is not trained on -> the task whose prompts are evaluated on
            it, which has other classes of the same data.
        harmonic: Whether to show the harmonic mean of the averages.
        suites: The suites by name.
        of_sequences: Whether tasks are sequences of tasks that are learned one after another.
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
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    harmonic: bool = False
    suites: Mapping[str, Suite] = dataclasses.field(default_factory=lambda: suites.SUITES)
    of_sequences: bool = False

    def on(self, suite: Suite) -> Table:
        """Returns the table adapted to a suite, without the tasks that the suite does not have.

        Raises:
            ValueError: no task or no variant is left.
        """
        table = dataclasses.replace(self, **dict(self.toy)) if suite.is_toy else self
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
        held_out = {new: old for new, old in table.held_out.items() if new in suite.tasks}
        return dataclasses.replace(table, groups=groups, held_out=held_out)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The paper's names of all tasks, each once."""
        return tuple(dict.fromkeys(task for tasks in self.groups.values() for task in tasks))

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The names of the tasks that jobs train on."""
        return tuple(task for task in self.tasks if task not in self.held_out)

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

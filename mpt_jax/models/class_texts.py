"""Class texts: the tokens of every class name, with positions reserved for a prompt.

A dual encoder classifies an image by comparing it with a text for each class. The texts are made
once, on the host. With a context of P positions, a class has one text, of one of the forms

    end      [start] [context 1..P] [name] [.] [end]
    middle   [start] [context 1..P//2] [name] [context P//2+1..P] [.] [end]
    front    [start] [name] [context 1..P] [.] [end]

and the prompt is written into the context positions, as in CoOp (arXiv 2109.01134). Without a
context, a class has one text for each of its task's templates, and their features are averaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import unknown_name

POSITIONS = ("end", "middle", "front")
MULTIPLE = 8  # texts are cut to a multiple of this many positions


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a tokenizer that class texts need."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> Sequence[int]:
        """Returns the token ids of a text, without start and end."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskClasses:
    """The classes of one task.

    Attributes:
        task: the name of the task.
        names: the names of its classes, in the order of their ids.
        templates: texts with `{}` in place of the name, for texts without a context.
        multi_label: whether an example can have any number of classes.
    """

    task: str
    names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    multi_label: bool = False


@dataclasses.dataclass(frozen=True)
class ClassTexts:
    """Tokens of the texts of all classes of several tasks.

    Classes are numbered through, task by task. Tasks with the same names and templates, such as
    few-shot draws of one task, share their classes. A class has as many texts as its task has
    templates, or one if there is a context.

    Attributes:
        tasks: the tasks.
        first: the number of the first class of each task.
        context_length: P.
        tokens: int32 [texts, T], 0 after the end.
        slots: int32 [texts, T], i + 1 at context position i, else 0.
        eot: int32 [texts], the position of the end of each text.
        class_of_text: int32 [texts], the class of each text, from 0.
        position: the position of class names among context positions.
    """

    tasks: tuple[TaskClasses, ...]
    first: tuple[int, ...]
    context_length: int
    tokens: np.ndarray
    slots: np.ndarray
    eot: np.ndarray
    class_of_text: np.ndarray
    position: str = "end"

    @property
    def num_classes(self) -> int:
        """The number of different classes of all tasks."""
        return int(self.class_of_text.max()) + 1

    @property
    def most_classes(self) -> int:
        """C, the largest number of classes of a task."""
        return max(len(task.names) for task in self.tasks)

    @property
    def has_multi_label(self) -> bool:
        """Whether any task is multi-label."""
        return any(task.multi_label for task in self.tasks)

    def first_class(self, task: str) -> int:
        """Returns the number of a task's first class.

        Raises:
            ValueError: the task is unknown.
        """
        names = [known.task for known in self.tasks]
        if task not in names:
            raise ValueError(unknown_name("task with classes", task, names))
        return self.first[names.index(task)]

    def of_task(self, task: str) -> TaskClasses:
        """Returns the classes of a task. Raises ValueError if the task is unknown."""
        self.first_class(task)
        return next(known for known in self.tasks if known.task == task)

    @property
    def sha256(self) -> str:
        """The digest of the tokens, which depend on names, templates, context and tokenizer."""
        hasher = hashlib.sha256()
        for array in (self.tokens, self.slots, self.eot, self.class_of_text):
            hasher.update(f"{array.shape} ".encode() + np.ascontiguousarray(array, "<i4").tobytes())
        return hasher.hexdigest()


def class_texts(
    tasks: Sequence[TaskClasses],
    tokenizer: Tokenizer,
    most_positions: int,
    context_length: int = 0,
    position: str = "end",
) -> ClassTexts:
    """Makes the texts of all classes.

    Args:
        tasks: the tasks, with distinct names.
        tokenizer: the backbone's tokenizer.
        most_positions: the number of positions of the text encoder.
        context_length: P; 0 uses templates.
        position: `'end'`, `'middle'` or `'front'`; see the module docstring.

    Raises:
        ValueError: a text is longer than the encoder's positions; two classes of a task have the
            same name; a name is empty; a template has no `{}`; or `position` is unknown.
    """
    if position not in POSITIONS:
        raise ValueError(unknown_name("CONTEXT_POSITION", position, POSITIONS))
    rows: list[tuple[list[int], list[int], int]] = []
    first_of: dict[tuple[Any, ...], int] = {}  # of names and templates
    firsts: list[int] = []
    num_classes = 0
    for task in tasks:
        _check_names(task)
        templates = ("{}.",) if context_length else task.templates
        first = first_of.setdefault((task.names, templates), num_classes)
        firsts.append(first)
        if first < num_classes:
            continue
        for number, name in enumerate(task.names):
            for template in templates:
                text = template.replace("{}", name.replace("_", " "))
                if context_length:
                    ids, slots = _with_context(tokenizer, text, context_length, position)
                else:
                    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                    slots = [0] * len(ids)
                if len(ids) > most_positions:
                    raise _too_long(task, name, template, context_length, len(ids), most_positions)
                rows.append((ids, slots, first + number))
        num_classes += len(task.names)
    longest = max(len(ids) for ids, _, _ in rows)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, most_positions)
    pad = lambda x: [*x, *[0] * (length - len(x))]  # noqa: E731
    return ClassTexts(
        tuple(tasks),
        tuple(firsts),
        context_length,
        np.array([pad(ids) for ids, _, _ in rows], np.int32),
        np.array([pad(slots) for _, slots, _ in rows], np.int32),
        np.array([len(ids) - 1 for ids, _, _ in rows], np.int32),
        np.array([number for _, _, number in rows], np.int32),
        position,
    )


def untokenized(tasks: Sequence[TaskClasses]) -> ClassTexts:
    """Returns the classes of tasks for a model that reads no texts: every class has an empty one.

    Raises:
        ValueError: as in `class_texts`.
    """
    for task in tasks:
        _check_names(task)
    counts = [len(task.names) for task in tasks]
    first = np.cumsum([0, *counts[:-1]]).tolist()
    empty, zeros = np.zeros((sum(counts), 0), np.int32), np.zeros(sum(counts), np.int32)
    numbers = np.arange(sum(counts), dtype=np.int32)
    return ClassTexts(tuple(tasks), tuple(first), 0, empty, empty, zeros, numbers)


def _with_context(
    tokenizer: Tokenizer, text: str, length: int, position: str
) -> tuple[list[int], list[int]]:
    """Returns the ids and slots of a class text "name." with context positions, whose ids are 0."""
    before = {"end": length, "middle": length // 2, "front": 0}[position]
    slots = list(range(1, length + 1))
    # As in CoOp: tokens of the whole text, since a "?" at the end of a name merges with the stop.
    whole = list(tokenizer.encode(text))
    number = len(tokenizer.encode(text.removesuffix(".")))
    words, rest = whole[:number], [*whole[number:], tokenizer.eos_id]
    ids = [tokenizer.bos_id, *[0] * before, *words, *[0] * (length - before), *rest]
    marks = [0, *slots[:before], *[0] * len(words), *slots[before:], *[0] * len(rest)]
    return ids, marks


def _check_names(task: TaskClasses) -> None:
    """Raises ValueError if classes of a task cannot be distinguished by their texts."""
    if not task.names:
        raise ValueError(f"The task {task.task!r} has no classes. Register it with class names.")
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(task.names):
        numbers.setdefault(" ".join(name.replace("_", " ").lower().split()), []).append(number)
    if "" in numbers:
        raise ValueError(
            f"Class {numbers[''][0]} of the task {task.task!r} has an empty name. Name every class."
        )
    if repeated := {name: ids for name, ids in numbers.items() if len(ids) > 1}:
        shown = [f"{name!r} for {' and '.join(map(str, ids))}" for name, ids in repeated.items()]
        raise ValueError(
            f"Classes of the task {task.task!r} have the same name: {abbreviate(shown)}. Their "
            "texts would be equal; give each class its own name."
        )
    if bad := [template for template in task.templates if "{}" not in template]:
        raise ValueError(
            f"The template {bad[0]!r} of the task {task.task!r} has no {{}} for the class name. "
            "Add it."
        )


def _too_long(
    task: TaskClasses, name: str, template: str, context: int, length: int, most: int
) -> ValueError:
    used = f"a context of {context} positions" if context else f"the template {template!r}"
    fix = "Lower CONTEXT_LENGTH, or shorten" if context else "Shorten the template or"
    return ValueError(
        f"The text of class {name!r} of the task {task.task!r} has {length} positions with {used}, "
        f"but the text encoder has {most}. {fix} the name of the class."
    )

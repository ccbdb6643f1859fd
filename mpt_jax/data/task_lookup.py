"""Lookup of tasks by name: suites, naming schemes, and errors for missing tasks and data."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax.core.runs import unknown_name

# See `register_task_resolver`.
_NAMING: list[Callable[[str], bool]] = []


# TensorFlow's error text when a tf.debugging.Assert with one message fails.
_ASSERTION = re.compile(r"assertion failed: \[(.*?)\](?: \[|\n|$)", re.DOTALL)


def import_suites(modules: Sequence[str], task_names: Sequence[str] = ()) -> None:
    """Imports the modules that register tasks.

    Raises:
        ValueError: a module does not exist, is the name of a file, or imports this library's suites
            by a name of an earlier version.
    """
    for module in modules:
        if module.endswith(".py"):
            name = module.removesuffix(".py").removeprefix("./").replace("/", ".")
            raise ValueError(
                f"The task suite {module!r} is the name of a file, but TASK_MODULES takes names of "
                f"modules. Leave off .py: write {name!r}."
            )
        try:
            importlib.import_module(module)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name is not None
            if not absent or not (module + ".").startswith(f"{error.name}."):
                if (error.name or "").split(".")[0] in ("tasks", "mpt_jax"):
                    raise ValueError(
                        f"The task suite {module} cannot be imported ({error}). In it, import the "
                        "suites of MPT-JAX from mpt_jax.tasks, for example with `from "
                        "mpt_jax.tasks import files`. The name `tasks` refers to your own module "
                        "if you have one, and tasks.jsonl of earlier versions is now "
                        "mpt_jax.tasks.files."
                    ) from error
                raise
            named = ", so some of these tasks may be missing: " + ", ".join(task_names)
            raise ValueError(
                f"The task suite {module} cannot be imported (no module {error.name})"
                f"{named if task_names else ''}. Run in the folder that holds the module, add that "
                "folder to PYTHONPATH, or bind TASK_MODULES and the task names to another suite "
                "(--gin_file=gin/tiny.gin binds the toy suite)."
            ) from error


def register_task_resolver(register_run: Callable[[str], bool]) -> None:
    """Adds a naming scheme, which is tried for task names that SeqIO does not know.

    Args:
        register_run: a function that takes a name. If the name follows the scheme, it registers the
            task and returns True; otherwise it returns False. It raises ValueError for a name that
            follows the scheme but cannot be registered.
    """
    _NAMING.append(register_run)


def is_task(name: str) -> bool:
    """Whether a task is registered. Registers it first if its name follows a naming scheme."""
    return name in seqio.TaskRegistry.names() or any(register(name) for register in _NAMING)


def few_shot_rows(provider: Any) -> dict[str, dict[str, list[int]]]:
    """Returns the row numbers that the few-shot runs of `provider` use, for the run record.

    Returns:
        {'few_shot': {run: its training rows}}, with a second key 'few_shot_validation' for the runs
        whose validation split is also a subset; {} if no run is few-shot.
    """
    rows_by_split: dict[str, dict[str, list[int]]] = {}
    for task in seqio.get_subtasks(provider):
        rows_of = getattr(task.source, "few_shot_indices", None)
        for key, split in (("few_shot", "train"), ("few_shot_validation", "validation")):
            if rows_of is not None and (rows := rows_of(split)) is not None:
                rows_by_split.setdefault(key, {})[task.name] = rows
    return rows_by_split


def find_task(name: str) -> seqio.Task:
    """Returns the task of a name; raises ValueError with the closest names if it is unknown."""
    if not is_task(name):
        raise ValueError(
            f"{unknown_name('task', name, sorted(seqio.TaskRegistry.names()))} Correct the name, "
            "or add the module that registers the task to TASK_MODULES."
        )
    return seqio.TaskRegistry.get(name)


def check_split(task: seqio.Task, split: str) -> None:
    """Raises ValueError if the task does not have the split, or has no prepared data."""
    with explain_missing_data(task, split):
        splits = task.source.splits
        if not splits:  # TFDS has no splits before the data is prepared
            raise FileNotFoundError("its data has not been prepared")
    if split not in splits:
        raise ValueError(
            f"Task {task.name!r} has no {split!r} split; it has {', '.join(splits)}. Choose one of "
            "these splits."
        )


@contextlib.contextmanager
def explain_missing_data(task_or_mixture: Any, split: str) -> Iterator[None]:
    """Context manager that converts errors about missing data into a ValueError that says how to
    get the data, and failed assertions of preprocessors (tf.debugging.Assert) into a ValueError
    with their message.

    Any other error, such as one from a bug in a preprocessor, is left unchanged.
    """
    kind = "task" if isinstance(task_or_mixture, seqio.Task) else "mixture"
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if not (assertion := _ASSERTION.search(error.message)):
            raise
        raise ValueError(
            f"The {split!r} split of {kind} {task_or_mixture.name!r} cannot be used: "
            + assertion.group(1).replace("\\'", "'")  # TensorFlow escapes quotes
        ) from error
    except Exception as error:
        if not is_missing_data(error):
            raise
        source = getattr(task_or_mixture, "source", "its tasks' sources")
        reason = str(error).partition("\n")[0].rstrip(".")  # TFDS lists all data sets after it
        has_advice = any(advice in reason for advice in ("tfds build", "Correct the path"))
        how = (
            " If the data is not on this machine, run `tfds build <name> --data_dir DIR` on a "
            "machine with internet access, copy DIR here, and pass --tfds_data_dir=DIR."
        )
        raise ValueError(
            f"The {split!r} split of {kind} {task_or_mixture.name!r} could not be read from "
            f"{source}: {type(error).__name__}: {reason}.{'' if has_advice else how}"
        ) from error


def is_missing_data(error: Exception) -> bool:
    """Whether an error was raised because data is missing from this machine."""
    if isinstance(error, AssertionError):  # TFDS's, if there are no files or no such version
        messages = ("could not find data in", "cannot be loaded at version")
        return any(text in str(error).lower() for text in messages)
    is_from_tfds = type(error).__module__.startswith("tensorflow_datasets.")
    return is_from_tfds or isinstance(error, (OSError, tf.errors.NotFoundError))

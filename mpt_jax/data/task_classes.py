"""Classes of a job's tasks and their texts, for the models of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import seqio

from mpt_jax.backbones.clip.config import CLIPConfig
from mpt_jax.data.classes import classes_of
from mpt_jax.data.task_lookup import find_task, import_suites
from mpt_jax.models.class_texts import ClassTexts, TaskClasses, class_texts, untokenized


def texts_of_tasks(
    task_names: Sequence[str],
    tokenizer: Any,
    config: CLIPConfig,
    context_length: int = 0,
    position: str = "end",
    modules: Sequence[str] = (),
    names_of: Callable[[seqio.Task], Sequence[str]] = lambda task: classes_of(task).names,
) -> ClassTexts:
    """Returns the class texts of registered image tasks.

    Args:
        task_names: the names of the tasks; a name may occur more than once.
        tokenizer: the backbone's tokenizer.
        config: the configuration of the backbone, which has a text tower.
        context_length, position: see `class_texts`.
        modules: the modules that register the tasks; imported first.
        names_of: returns the class names of a task; `plan` has stand-ins for missing data.

    Raises:
        ValueError: a module or task is unknown, a task is not an image task, the backbone has no
            text tower or another vocabulary than the tokenizer, or as in `class_texts`.
    """
    if config.text is None:
        raise ValueError(
            "The backbone has no text tower, so it cannot compare images with class names. Set "
            "CLIP_NAME or INITIAL_CHECKPOINT_PATH to a CLIP model."
        )
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the backbone embeds "
            f"{config.text.vocab_size}. Set CLIP_TOKENIZER to the folder with the vocab.json and "
            "merges.txt of the backbone."
        )
    tasks = _task_classes(task_names, modules, names_of)
    return class_texts(tasks, tokenizer, config.text.context_length, context_length, position)


def classes_of_tasks(
    task_names: Sequence[str],
    modules: Sequence[str] = (),
    names_of: Callable[[seqio.Task], Sequence[str]] = lambda task: classes_of(task).names,
) -> ClassTexts:
    """Returns the classes of registered image tasks, for a model that reads no texts; the arguments
    are those of `texts_of_tasks`.

    Raises:
        ValueError: a module or task is unknown, or a task is not an image task.
    """
    return untokenized(_task_classes(task_names, modules, names_of))


def most_classes(texts: ClassTexts) -> int:
    """Returns C, the number of classes of the largest task, for use in gin files."""
    return texts.most_classes


def _task_classes(
    task_names: Sequence[str],
    modules: Sequence[str],
    names_of: Callable[[seqio.Task], Sequence[str]],
) -> list[TaskClasses]:
    import_suites(modules, task_names)
    tasks = []
    for name in dict.fromkeys(task_names):
        task = find_task(name)
        classes, names = classes_of(task), tuple(names_of(task))
        tasks.append(TaskClasses(name, names, classes.templates, classes.multi_label))
    return tasks

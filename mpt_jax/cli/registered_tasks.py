"""Tasks registered with SeqIO: the tables of `mpt-jax tasks`, and the index of the shipped suites.

    python -m mpt_jax.cli.registered_tasks      rewrites mpt_jax/tasks/data/index.json

Unless a shipped data set is on this machine or --modules is given, `mpt-jax tasks list` prints the
index instead of importing TensorFlow, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
from absl import logging
from etils import epath

from mpt_jax.cli.tasks import INDEX, MADE, SUITES, images_folder, print_table, print_tasks
from mpt_jax.data import image_formats, task_lookup, vocabularies
from mpt_jax.data.classes import classes_of, is_image_task
from mpt_jax.tasks import text_metrics
from mpt_jax.tasks.few_shot import text_rows
from mpt_jax.tasks.image_sets import published
from mpt_jax.tasks.splits import PartsSource

SHOWN = 10  # class names of a task


def shipped() -> list[str]:
    """Returns the modules of this repository that register tasks."""
    names = [f"mpt_jax.tasks.{suite}" for suite in SUITES]
    return [name for name in names if importlib.util.find_spec(name) is not None]


def tasks_by_module(modules: Sequence[str]) -> dict[str, list[str]]:
    """Imports modules, and returns {module: names of the tasks that the module registered}.

    Raises:
        ValueError: as in `task_lookup.import_suites`.
    """
    tasks = {}
    for module in modules:
        before = set(seqio.TaskRegistry.names())
        task_lookup.import_suites([module])
        tasks[module] = [name for name in seqio.TaskRegistry.names() if name not in before]
    return tasks


def list_tasks(found: Mapping[str, Sequence[str]]) -> None:
    """Prints a table for each module that registered tasks."""
    for module, names in found.items():
        if names:
            print_tasks(module, [_described(seqio.TaskRegistry.get(name)) for name in names])


def show_task(name: str, number: int, split: str, vocabulary: str | None) -> None:
    """Prints the first examples of a split as text, with their lengths in tokens, EOS included, and
    the share of unknown tokens if there are any; of an image task, see `_show_images`.

    Args:
        name: The name of a task or a few-shot run.
        number: The number of examples.
        split: The split of the examples.
        vocabulary: The vocabulary that counts tokens, see `vocabularies.load`. None for the task's
            vocabulary. Tasks of the paper have none, because they use the job's, so they are shown
            without lengths.

    Raises:
        ValueError: the task or split does not exist, its data cannot be read, `number` is not
            positive, or a vocabulary is given for an image task.
        FileNotFoundError: the vocabulary does not exist.
    """
    if number < 1:
        raise ValueError(f"-n must be positive, got {number}.")
    task = task_lookup.find_task(name)
    task_lookup.check_split(task, split)
    if is_image_task(task):
        if vocabulary:
            raise ValueError(
                f"--vocabulary={vocabulary} counts tokens of texts, but the examples of {name} are "
                "images. Drop --vocabulary."
            )
        _show_images(task, number, split)
        return
    counted = vocabularies.load(vocabulary) if vocabulary else _own_vocabulary(task)
    rows = []
    with task_lookup.explain_missing_data(task, split):
        stream = text_rows(task, task.source.get_dataset(split=split, shuffle=False))
        for row in stream.take(number).as_numpy_iterator():
            inputs, targets = (row[feature].decode() for feature in ("inputs", "targets"))
            lengths = [_tokens(counted, text) if counted else "" for text in (inputs, targets)]
            rows.append((lengths[0], lengths[1], _on_one_line(targets), _on_one_line(inputs)))
    headers = ("input tokens", "target tokens", "targets", "inputs")
    columns = slice(None) if counted else slice(2, None)
    print_table(_title(task, split), headers[columns], [row[columns] for row in rows])


def _show_images(task: seqio.Task, number: int, split: str) -> None:
    """Prints the classes and templates of an image task, and of the first examples of a split the
    name, the classes, and the height and width in pixels.

    Raises:
        ValueError: the data cannot be read.
    """
    rows = []
    with task_lookup.explain_missing_data(task, split):
        classes = classes_of(task)
        names = ", ".join(classes.names[:SHOWN])
        more = ", ..." if len(classes.names) > SHOWN else ""
        dataset = task.get_dataset(None, split, shuffle=False)
        for row in dataset.take(number).as_numpy_iterator():
            name, image = row["example_names"][0].decode(), row["image"][0]
            try:
                height, width = image_formats.pixels(image).shape[:2]
            except ValueError as error:
                raise ValueError(f"The image of {name} cannot be used: {error}") from error
            shown = ", ".join(classes.names[label] for label in row["targets"]) or "none"
            rows.append((name, shown, f"{height} x {width}"))
    kind = "multi-label, " if classes.multi_label else ""
    print(f"{kind}{len(classes.names):,} classes: {names}{more}")
    print(f"templates: {' | '.join(classes.templates)}")
    print_table(_title(task, split), ("example", "classes", "height x width"), rows)


def _title(task: seqio.Task, split: str) -> str:
    return f"{task.name}, {split}; metrics (the first selects the best step): {_metrics(task)}"


def _described(task: seqio.Task) -> tuple[str, ...]:
    """Returns a task's name, data set, split sizes, metrics and number of classes, and whether its
    data is on this machine and has the published size."""
    if is_image_task(task):
        return _described_images(task)
    source, sizes = task.source, _sizes(task)
    if isinstance(source, seqio.FunctionDataSource):
        data, here = MADE, True
    elif isinstance(source, seqio.TfdsDataSource):
        data, here = str(source.tfds_dataset.name), bool(sizes)
    else:
        data = str(getattr(source, "data", source))
        here = source.is_prepared() if isinstance(source, PartsSource) else bool(sizes)
    present = "yes" + _other_sizes(source) if here else "no"
    return task.name, data, _as_text(sizes), _metrics(task), "", present


def _described_images(task: seqio.Task) -> tuple[str, ...]:
    """Returns what `_described` returns, of an image task. The numbers of a suite's task are known
    without its data."""
    source, sizes = task.source, _sizes(task)
    while hasattr(source, "source"):  # of a division or a selection
        source = source.source
    data = str(getattr(source, "data", source))
    folder = os.path.join(epath.Path(images_folder()), "")
    data = data.removeprefix(folder)  # the rest is the same on every machine
    here = source.is_prepared() if hasattr(source, "is_prepared") else bool(sizes)
    present = "yes" + _other_sizes(source) if here else "no"
    rows = _as_text(sizes or published.sizes(task.name))
    return task.name, data, rows, _metrics(task), _num_classes(task), present


def _num_classes(task: seqio.Task) -> str:
    """Returns the number of classes; 'unknown' if a user's task needs data that is missing."""
    try:
        number = len(classes_of(task).names)
    except Exception as error:
        if not task_lookup.is_missing_data(error):
            raise
        number = published.num_classes(task)
    return "unknown" if number is None else f"{number:,}"


def _as_text(sizes: Mapping[str, int | None]) -> str:
    return ", ".join(split if n is None else f"{split} {n:,}" for split, n in sizes.items())


def _other_sizes(source: Any) -> str:
    """Returns a note on splits whose number of rows differs from the published one, or ''."""
    if not hasattr(source, "other_sizes"):
        return ""
    sizes = source.other_sizes().items()
    return "".join(f"; {split} has {n:,}, published {size:,}" for split, (n, size) in sizes)


def _sizes(task: seqio.Task) -> dict[str, int | None]:
    """Returns the declared number of rows of each split; {} if that needs data that is missing."""
    try:
        return {split: task.source.num_input_examples(split) for split in task.source.splits}
    except Exception as error:
        if not task_lookup.is_missing_data(error):
            raise
        return {}


def _metrics(task: seqio.Task) -> str:
    names = [name for metric in task.metric_fns for name in text_metrics.value_names(metric)]
    return ", ".join(dict.fromkeys(names)) or "none"


def _own_vocabulary(task: seqio.Task) -> seqio.Vocabulary | None:
    """Returns the task's vocabulary; None if the task uses the job's, which gin files bind."""
    try:
        return task.output_features["inputs"].vocabulary
    except ValueError:
        return None


def _tokens(vocabulary: seqio.Vocabulary, text: str) -> str:
    """Returns the number of tokens of a text, EOS included, such as '9' or '9 (25% <unk>)'."""
    ids = list(vocabulary.encode(text))
    unknown = 0 if vocabulary.unk_id is None else ids.count(vocabulary.unk_id)
    return f"{len(ids) + 1}" + (f" ({unknown / len(ids):.0%} <unk>)" if unknown else "")


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def index() -> dict[str, list[list[str]]]:
    """Returns {module: [name, data set, rows, metrics and number of classes of each task]} of the
    shipped suites.

    Call it in a process that has not imported these suites.
    """
    found = tasks_by_module(shipped())
    return {
        module: [list(_described(seqio.TaskRegistry.get(name))[:-1]) for name in names]
        for module, names in found.items()
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS warns about every absent data set
    INDEX.write_text(json.dumps(index(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

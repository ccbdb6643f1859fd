"""`mpt-jax tasks`: lists the tasks, and shows examples of a task as the model reads them.

    mpt-jax tasks list
    mpt-jax tasks show boolq_k16_s3 -n 3 --vocabulary runs/backbones/t5-base

It prints a table on a terminal and plain columns otherwise. It reads no gin files. On a mistake, it
prints a one-line message and exits with code 2.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence

import seqio
from absl import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpt_jax.data import task_lookup, vocabularies
from mpt_jax.runtime.exits import exit_with
from mpt_jax.tasks.few_shot import text_rows
from mpt_jax.tasks.splits import PartsSource

# The suites of this repository, in the order of the list.
SUITES = ("glue", "super_glue", "mrqa", "mpt_others", "extra_sources", "nlg", "toy")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `list` or `show`."""
    parser = argparse.ArgumentParser(prog="mpt-jax tasks", description="Lists or shows tasks.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all tasks, suite by suite")
    showing = commands.add_parser("show", help="examples of one task, as the model reads them")
    showing.add_argument("name", help="a task, or a few-shot run such as boolq_k16_s3")
    showing.add_argument("-n", type=int, default=3, help="how many examples (3)")
    showing.add_argument("--split", default="train", help="which split (train)")
    showing.add_argument("--vocabulary", help="a vocabulary file or folder, to count tokens")
    for command in (listing, showing):
        command.add_argument("--modules", nargs="+", default=[], help="your modules with tasks")
        command.add_argument("--tfds_data_dir", help="where TensorFlow Datasets keeps its data")
    args = parser.parse_args(argv)
    if args.tfds_data_dir:
        seqio.set_tfds_data_dir_override(args.tfds_data_dir)
    try:
        tasks = tasks_by_module([*shipped(), *args.modules])
        if args.command == "list":
            list_tasks(tasks)
        else:
            show_task(args.name, args.n, args.split, args.vocabulary)
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)


def shipped() -> list[str]:
    """Returns the modules of this repository that register tasks."""
    names = [f"mpt_jax.tasks.{suite}" for suite in SUITES]
    return [name for name in names if importlib.util.find_spec(name) is not None]


def tasks_by_module(modules: Sequence[str]) -> dict[str, list[str]]:
    """Imports modules, and returns {module: names of the tasks that it registered}.

    Raises:
        ValueError: a module does not exist.
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
            rows = [_described(seqio.TaskRegistry.get(name)) for name in names]
            _print(module, ("task", "data set", "rows", "metrics", "here"), rows)


def show_task(name: str, number: int, split: str, vocabulary: str | None) -> None:
    """Prints the first examples of a split as text, with their lengths in tokens, EOS included, and
    the share of unknown tokens if there are any.

    Args:
        name: name of a task or a few-shot run.
        number: number of examples.
        split: the split of the examples.
        vocabulary: the vocabulary that counts tokens (see `vocabularies.load`); by default the
            task's. Tasks of the paper have none, because they use the job's, so by default they
            are shown without lengths.

    Raises:
        ValueError: the task or split does not exist, its data cannot be read, or `number` is not
            positive.
        FileNotFoundError: the vocabulary does not exist.
    """
    if number < 1:
        raise ValueError(f"-n must be positive, got {number}.")
    task = task_lookup.find_task(name)
    task_lookup.check_split(task, split)
    counted = vocabularies.load(vocabulary) if vocabulary else _own_vocabulary(task)
    rows = []
    with task_lookup.explain_missing_data(task, split):
        stream = text_rows(task, task.source.get_dataset(split=split, shuffle=False))
        for row in stream.take(number).as_numpy_iterator():
            inputs, targets = (row[feature].decode() for feature in ("inputs", "targets"))
            lengths = [_tokens(counted, text) if counted else "" for text in (inputs, targets)]
            rows.append((lengths[0], lengths[1], _on_one_line(targets), _on_one_line(inputs)))
    headers = ("input tokens", "target tokens", "targets", "inputs")
    title = f"{name}, {split}; metrics, the first one selects: {_metrics(task)}"
    columns = slice(None) if counted else slice(2, None)
    _print(title, headers[columns], [row[columns] for row in rows])


def _described(task: seqio.Task) -> tuple[str, ...]:
    """Returns a task's name, data set, split sizes and metrics, and whether its data is on this
    machine and has the published size."""
    source, sizes = task.source, _sizes(task)
    if isinstance(source, seqio.FunctionDataSource):
        data, here = "made by a function", True
    elif isinstance(source, seqio.TfdsDataSource):
        data, here = str(source.tfds_dataset.name), bool(sizes)
    else:
        data = str(getattr(source, "data", source))
        here = source.is_prepared() if isinstance(source, PartsSource) else bool(sizes)
    rows = ", ".join(split if n is None else f"{split} {n:,}" for split, n in sizes.items())
    present = "yes" + _other_sizes(source) if here else "no"
    return task.name, data, rows, _metrics(task), present


def _other_sizes(source: seqio.DataSource) -> str:
    """Returns a note on splits whose number of rows differs from the published one, or ''."""
    if not isinstance(source, PartsSource):
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
    return ", ".join(metric.__name__ for metric in task.metric_fns) or "none"


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


def _print(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on a terminal; otherwise plain lines, with two spaces between columns."""
    console = Console()
    if console.is_terminal:
        table = Table(title=Text(title), title_justify="left")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    print(title)
    for row in (headers, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    print()


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS warns about every absent data set
    main()

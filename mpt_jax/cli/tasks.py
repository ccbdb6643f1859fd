"""`mpt-jax tasks`: lists the tasks, and shows examples of a task as the model reads them.

    mpt-jax tasks list
    mpt-jax tasks show boolq_k16_s3 -n 3 --vocabulary runs/backbones/t5-base

It prints a table on a terminal and plain columns otherwise. It reads no gin files. On a mistake, it
prints a one-line message and exits with code 2. The shipped tasks are listed from an index, without
TensorFlow, unless one of their data sets is on this machine. In that case, TFDS checks its size.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpt_jax.runtime.exits import exit_with

# The suites of this repository, in the order of the list.
SUITES = (
    *("glue", "super_glue", "mrqa", "mpt_others", "extra_sources", "nlg", "toy"),
    *("image_sets.coop", "image_sets.elevater"),
)
INDEX = Path(__file__).parents[1] / "tasks" / "data" / "index.json"
HEADERS = ("task", "data set", "rows", "metrics", "classes", "here")
MADE = "made by a function"  # in place of a data set


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
    try:
        if args.command == "list" and not args.modules and not _has_data(args.tfds_data_dir):
            list_index()
        else:
            _run_with_seqio(args)
    except (ValueError, OSError) as error:
        exit_with(parser.prog, error)


def list_index() -> None:
    """Prints a table for each shipped suite from the index, for a machine without the data sets."""
    for module, tasks in json.loads(INDEX.read_text(encoding="utf-8")).items():
        print_tasks(module, [(*task, "yes" if task[1] == MADE else "no") for task in tasks])


def print_tasks(module: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of tasks, one cell for each of `HEADERS`. Only image tasks have classes."""
    classes = HEADERS.index("classes")
    shown = [i for i in range(len(HEADERS)) if i != classes or any(row[classes] for row in rows)]
    print_table(module, [HEADERS[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _has_data(folder: str | None) -> bool:
    """Whether the folder of TensorFlow Datasets has a data set of the index, in any version, or the
    folder of images has one. True for a storage bucket, which is not searched."""
    folder = folder or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    folders = (folder, images_folder())
    if any("://" in folder for folder in folders):
        return True
    roots = [Path(folder).expanduser() for folder in folders]
    suites = json.loads(INDEX.read_text(encoding="utf-8")).values()
    names = {task[1].partition(":")[0] for tasks in suites for task in tasks} - {MADE}
    return any(os.path.exists(root / name) for root in roots for name in names)


def images_folder() -> str:
    """Returns the folder of `image_sets.rows.root`, whose module imports TensorFlow."""
    project = os.environ.get("MPT_JAX_ROOT") or os.path.join(os.curdir, "runs")
    return os.environ.get("MPT_JAX_IMAGES") or os.path.join(project, "images")


def _run_with_seqio(args: argparse.Namespace) -> None:
    import seqio  # takes seconds, and the index does not need it

    from mpt_jax.cli import registered_tasks

    if args.tfds_data_dir:
        seqio.set_tfds_data_dir_override(args.tfds_data_dir)
    tasks = registered_tasks.tasks_by_module([*registered_tasks.shipped(), *args.modules])
    if args.command == "list":
        registered_tasks.list_tasks(tasks)
    else:
        registered_tasks.show_task(args.name, args.n, args.split, args.vocabulary)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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

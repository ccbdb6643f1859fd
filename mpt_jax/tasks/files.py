"""Tasks from the user's JSONL, CSV, TSV or Parquet files and templates.

    from mpt_jax.tasks import files

    files.register(
        "support",
        train="support/train.jsonl",
        validation="support/dev.jsonl",
        inputs="question: {question} context: {context}",
        targets="{answer}",
        labels=("yes", "no"),
    )

Registration only checks paths, extensions, templates, labels and names, so that a module of many
tasks is imported quickly. The first request for examples of any split reads all files of the task,
so that an invalid test file is reported before training starts. mpt_jax/tasks/file_formats.py
describes the formats.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
from etils import epath

from mpt_jax.data import preprocessors
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import file_formats, suite, text_metrics
from mpt_jax.tasks.file_readers import Template, read, scalar_text
from mpt_jax.tasks.file_sources import Files, FileSource, SplitFile

SHARES = (0.8, 0.1, 0.1)

File = str | os.PathLike[str]


def register(  # noqa: PLR0913 - one keyword for each property of a task
    name: str,
    *,
    inputs: str,
    targets: str,
    train: File | None = None,
    validation: File | None = None,
    test: File | None = None,
    data: File | None = None,
    split: Sequence[float] | None = None,
    seed: int | None = None,
    labels: Sequence[Any] | Mapping[Any, str] = (),
    metrics: Sequence[Callable[..., Any]] = (),
    quoting: bool = False,
) -> None:
    """Registers a SeqIO task that is tokenized with the vocabulary of the job.

    Args:
        name: The name of the task.
        inputs, targets: The templates with the fields of a row, see `file_readers.Template`.
        train, validation, test: The file of each split. Some of them may be omitted.
        data: A single file to split by a hash of the inputs (`file_sources.divide`), instead of a
            file for each split.
        split: The shares of train, validation and test; None for `SHARES`. 0 omits a split.
        seed: The seed of the hash; None for 42.
        labels: The labels of a classification task. Any other target is an error. A mapping maps
            values in the file to label words: {0: "no", 1: "yes"}. Empty for free text.
        metrics: The SeqIO metrics `(targets, predictions)` of texts, in percent. The first one
            selects the best step. Empty for the defaults: with labels, accuracy, macro F1 and the
            share of invalid predictions; for free text, SQuAD's F1 and exact match.
        quoting: Whether cells of TSV files may be in quotation marks, as they always may in CSV
            files. By default, a quotation mark in a TSV file is a character like any other.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file, template, split, label or name cannot be used, or `quoting` has no
            effect.
    """
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(
            f"A task or mixture named {name!r} is already registered. Choose another name."
        )
    words = _words(labels, name)
    reader = functools.partial(
        read,
        inputs=Template("inputs", inputs),
        targets=Template("targets", targets),
        words=words,
        quoting=quoting,
    )
    files = {"train": train, "validation": validation, "test": test}
    files = {split: epath.Path(file) for split, file in files.items() if file is not None}
    if (data is None) == (not files):
        raise ValueError(
            f"Task {name!r} got {'both data= and' if files else 'neither data= nor'} files for "
            "splits. Pass either data=, one file to split, or any of train=, validation= and test=."
        )
    if data is not None:
        source: FileSource = SplitFile(epath.Path(data), split or SHARES, seed, reader)
    elif split is not None or seed is not None:
        raise ValueError(
            f"split= and seed= of task {name!r} have no effect without data=. Remove them, or pass "
            "data= instead of a file for each split."
        )
    else:
        source = Files(name, files, reader)
    if quoting and not any(file_formats.is_tsv(path) for path in source.paths):
        raise ValueError(
            f"quoting=True of task {name!r} has no effect, because none of its files is a TSV "
            "file. Remove it; cells of CSV files may always be in quotation marks."
        )
    metric_fns = _metrics(tuple(dict.fromkeys(words.values())), metrics)
    source.template = {
        "inputs": inputs,
        "targets": targets,
        "labels": words,
        "metrics": [getattr(metric, "__name__", type(metric).__name__) for metric in metric_fns],
    }
    task = suite.RunTask(
        name,
        source=source,
        output_features={},
        preprocessors=preprocessors.finish(name),
        postprocess_fn=None if words or metrics else _only_answer,
        metric_fns=[text_metrics.of_task(name, metric) for metric in metric_fns],
    )
    seqio.TaskRegistry.add_provider(name, task)


def _words(labels: Sequence[Any] | Mapping[Any, str], task: str) -> dict[str, str]:
    """Returns text in the file -> label word; {} for free text.

    Raises:
        ValueError: `labels` is a single text, or has fewer than two different words, a repeated
            text, or a label that is empty, not text, or has extra white space.
    """
    if isinstance(labels, str):
        raise ValueError(
            f"labels= of task {task!r} must be a sequence of labels, got the text {labels!r}. Pass "
            "a tuple, such as labels=('yes', 'no')."
        )
    pairs = labels.items() if isinstance(labels, Mapping) else zip(labels, labels, strict=True)
    words: dict[str, str] = {}
    for value, word in pairs:
        text, answer = scalar_text(value), scalar_text(word)
        for given, label in ((value, text), (word, answer)):
            # White space around a text is removed, and a tokenizer does not keep repeated spaces.
            if not label or label != " ".join(label.split()):
                raise ValueError(
                    f"The label {given!r} of task {task!r} is empty, not text, or has extra white "
                    "space. Use a number, a boolean, or words separated by single spaces."
                )
        assert text is not None and answer is not None
        if text in words:
            raise ValueError(
                f"The label {text!r} is given twice in labels= of task {task!r}. Remove one of the "
                "two."
            )
        words[text] = answer
    if words and len(set(words.values())) < 2:
        raise ValueError(
            f"Classification needs at least two labels, but task {task!r} has labels={labels!r}. "
            "Add a label, or omit labels= if targets are free text."
        )
    return words


def _metrics(labels: Sequence[str], metrics: Sequence[Callable[..., Any]]) -> list[Any]:
    if not labels:
        return list(metrics) or [text_metrics.answer_overlap]
    first, *others = metrics or (
        text_metrics.accuracy,
        text_metrics.macro_f1(labels),
        text_metrics.invalid_rate(labels),
    )
    return [evaluator.with_labels(first, labels), *others]


def _only_answer(text: str, example: Any = None, is_target: bool = False) -> Any:
    """SeqIO postprocessor that makes a target the only gold answer for `answer_overlap`."""
    del example
    return {"answers": [text], "group": ""} if is_target else text

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
so that an invalid test file is reported before training starts. mpt_jax/tasks/file_readers.py
describes the formats.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from mpt_jax.data import preprocessors
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import splits, suite, text_metrics
from mpt_jax.tasks.file_readers import Examples, Template, check_readable, read, scalar_text

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)

Read = Callable[[epath.Path], Examples]
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
) -> None:
    """Registers a task with SeqIO, which is tokenized with the vocabulary of the job.

    Args:
        name: The name of the task.
        inputs, targets: The templates with the fields of a row, see `file_readers.Template`.
        train, validation, test: The file of each split. Some of them may be omitted.
        data: A single file instead, which is split according to `split` and `seed`.
        split: The shares of train, validation and test; None for `SHARES`. 0 omits a split.
        seed: The seed of the split; None for 42.
        labels: The labels of a classification task. Any other target is an error. A mapping maps
            values in the file to label words: {0: "no", 1: "yes"}. Empty for free text.
        metrics: The SeqIO metrics `(targets, predictions)` of texts, in percent. The first one
            selects the best step. Empty for the defaults: with labels, accuracy, macro F1 and the
            share of invalid predictions; for free text, SQuAD's F1 and exact match.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file, template, split, label or name cannot be used.
    """
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(
            f"A task or mixture named {name!r} is already registered. Choose another name."
        )
    words = _words(labels, name)
    reader = functools.partial(
        read, inputs=Template("inputs", inputs), targets=Template("targets", targets), words=words
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
    task = suite.RunTask(
        name,
        source=source,
        output_features={},
        preprocessors=preprocessors.finish(name),
        postprocess_fn=None if words or metrics else _only_answer,
        metric_fns=[
            text_metrics.of_task(name, metric)
            for metric in _metrics(tuple(dict.fromkeys(words.values())), metrics)
        ],
    )
    seqio.TaskRegistry.add_provider(name, task)


class FileSource(seqio.DataSource):
    """Source of examples in files, which are read at first use and kept in memory as text.

    Args:
        split_names: The names of the splits.
        paths: The files, which the constructor checks without reading them.
    """

    def __init__(self, split_names: Sequence[str], paths: Sequence[epath.Path]):
        for path in paths:
            check_readable(path)
        super().__init__(splits=split_names)
        self.paths = tuple(paths)

    def read(self) -> Mapping[str, Examples]:
        """Reads the examples of each split. Raises ValueError like `file_readers.read`."""
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Mapping[str, Examples]:
        """The examples of each split, read at first use."""
        return self.read()

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: examples are split among hosts after they are read."""
        return False

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard; SeqIO splits its examples among the hosts."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows of a split. Reads all files if they have not been read."""
        return len(self.examples[split].inputs)

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the {inputs, targets} of a split in file order, regardless of `shuffle`.

        Raises:
            ValueError: rows of a file cannot be used.
        """
        del shuffle, seed, unused  # batches are shuffled downstream
        examples = self.examples[split]
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": tf.constant(examples.inputs), "targets": tf.constant(examples.targets)}
        )


class Files(FileSource):
    """Source with one file per split. Logs a warning if another split shares inputs with train.

    Args:
        name: The name of the task.
        files: Split -> path.
        reader: The function that reads a file.
    """

    def __init__(self, name: str, files: Mapping[str, epath.Path], reader: Read):
        super().__init__(tuple(files), tuple(files.values()))
        self.name, self.files, self.reader = name, files, reader

    def read(self) -> Mapping[str, Examples]:
        """Reads the file of each split; see `FileSource.read`."""
        examples = {split: self.reader(path) for split, path in self.files.items()}
        train_inputs = set(examples["train"].inputs) if "train" in examples else set()
        for split in examples:
            if split == "train":
                continue
            shared = sum(text in train_inputs for text in examples[split].inputs)
            if shared:
                logging.warning(
                    "%s: %d of the %d inputs of %s also occur in train, so scores on %s are too "
                    "optimistic.",
                    *(self.name, shared, len(examples[split].inputs), split, split),
                )
        return examples


class SplitFile(FileSource):
    """Source with one file, split at random into train, validation and test.

    The split of a row depends on its position in a permutation, which depends only on the number of
    rows and the seed, as in `splits`. All rows with equal inputs are in the split of the first of
    them, so no input is in two splits.

    Args:
        path: The file.
        shares: The shares of train, validation and test.
        seed: The seed of the permutation; None for `splits.SEED`.
        reader: The function that reads the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `shares` are not three numbers of at least 0 that sum to 1, the seed is out of
            range, or the file's format is not supported.
    """

    def __init__(self, path: epath.Path, shares: Sequence[float], seed: int | None, reader: Read):
        self.seed = splits.SEED if seed is None else seed
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed={seed} is out of range, so {path} cannot be split. Use a seed from 0 to "
                "2^32 - 1."
            )
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"split={tuple(shares)} for {path} is not three numbers of at least 0 that sum to "
                "1. Pass one share for each of train, validation and test."
            )
        self.shares = dict(zip(SPLITS, shares, strict=True))
        super().__init__([split for split, share in self.shares.items() if share], [path])
        self.reader = reader

    def read(self) -> Mapping[str, Examples]:
        """Reads the file and splits its rows. Raises ValueError if a split would be empty."""
        (path,) = self.paths
        whole = self.reader(path)
        parts = divide(whole.inputs, tuple(self.shares.values()), self.seed)
        examples = {split: whole.take(rows) for split, rows in zip(SPLITS, parts, strict=True)}
        for split in self.splits:
            if not examples[split].inputs:
                raise ValueError(
                    f"{path} has {len(whole.inputs)} rows, and a share of {self.shares[split]:g} "
                    f"leaves none for {split}. Add rows, change split=, or use one file per split."
                )
        return {split: examples[split] for split in self.splits}


def divide(inputs: Sequence[str], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Returns the row numbers of each split in ascending order; see `SplitFile`."""
    size = len(inputs)
    first: dict[str, int] = {}
    leader = np.array([first.setdefault(text, row) for row, text in enumerate(inputs)])
    position = np.empty(size, np.int64)
    position[splits.permutation(size, seed)] = np.arange(size)
    bounds = np.rint(np.cumsum(shares)[:-1] * size)
    part = np.searchsorted(bounds, position[leader], side="right")
    return [np.flatnonzero(part == number) for number in range(len(shares))]


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

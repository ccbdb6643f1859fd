"""Tasks from your own files: JSONL, CSV, TSV or Parquet, and a template.

    from mpt_jax.tasks import files

    files.register(
        "support",
        train="support/train.jsonl",
        validation="support/dev.jsonl",
        inputs="question: {question} context: {context}",
        targets="{answer}",
        labels=("yes", "no"),
    )

Registering a task checks its paths, extensions, templates, labels and names, all of which is cheap.
The first request for an example of any split reads all files of the task. So importing a module of
many tasks stays fast, and a broken test file is reported before training starts. The formats are
described in `mpt_jax/tasks/file_readers.py`.
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
    """Registers a task with SeqIO. The vocabulary of the run tokenizes it.

    Args:
        name: name of the task.
        inputs, targets: templates with the fields of a row, see `file_readers.Template`.
        train, validation, test: one file per split; any of them may be omitted.
        data: alternatively, a single file, which is split by `split` and `seed`.
        split: shares of train, validation and test; default `SHARES`. 0 omits a split.
        seed: seed of the split; default 42.
        labels: the answers of a classification task; any other target is an error. A mapping
            names the values in the file: {0: "no", 1: "yes"}. Empty for free text.
        metrics: SeqIO metrics `(targets, predictions)` of texts, in percent; the first one
            selects the best step. Default: accuracy, macro F1 and the share of predictions that
            are not a label; for free text, SQuAD's F1 and exact match.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file, template, split, label or name cannot be used.
    """
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(f"A task named {name!r} is registered already. Choose another name.")
    words = _words(labels)
    reader = functools.partial(
        read, inputs=Template("inputs", inputs), targets=Template("targets", targets), words=words
    )
    files = {"train": train, "validation": validation, "test": test}
    files = {split: epath.Path(file) for split, file in files.items() if file is not None}
    if (data is None) == (not files):
        raise ValueError(
            f"Task {name!r} got {'both' if files else 'neither'} data= and files of splits. Give "
            "either data= (one file to split) or some of train=, validation= and test=."
        )
    if data is not None:
        source: FileSource = SplitFile(epath.Path(data), split or SHARES, seed, reader)
    elif split is not None or seed is not None:
        raise ValueError(
            f"split= and seed= of task {name!r} have no effect without data=. Remove them."
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
    """Examples of files, all read at first use and kept in memory as text.

    Args:
        split_names: names of the splits.
        paths: the files; checked by the constructor, read at first use.
    """

    def __init__(self, split_names: Sequence[str], paths: Sequence[epath.Path]):
        for path in paths:
            check_readable(path)
        super().__init__(splits=split_names)
        self.paths = tuple(paths)

    def read(self) -> Mapping[str, Examples]:
        """Returns the examples of each split; raises ValueError as `file_readers.read`."""
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Mapping[str, Examples]:
        """The examples of each split."""
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
        """Returns the number of rows of a split; reads the files."""
        return len(self.examples[split].inputs)

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns {inputs, targets} of a split in file order, regardless of `shuffle`.

        Raises:
            ValueError: rows of a file cannot be used.
        """
        del shuffle, seed, unused  # batches are shuffled downstream
        examples = self.examples[split]
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": tf.constant(examples.inputs), "targets": tf.constant(examples.targets)}
        )


class Files(FileSource):
    """One file per split. Logs a warning if another split shares inputs with train.

    Args:
        name: name of the task.
        files: split -> path.
        reader: reads a file.
    """

    def __init__(self, name: str, files: Mapping[str, epath.Path], reader: Read):
        super().__init__(tuple(files), tuple(files.values()))
        self.name, self.files, self.reader = name, files, reader

    def read(self) -> Mapping[str, Examples]:
        """See `FileSource`."""
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
    """One file, split at random into train, validation and test.

    A row's position in a permutation of (number of rows, seed) decides, as in `splits`. Rows with
    equal inputs follow the first of them, so no input occurs in two splits.

    Args:
        path: the file.
        shares: shares of train, validation and test.
        seed: seed of the permutation; None is `splits.SEED`.
        reader: reads the file.

    Raises:
        ValueError: `shares` are not three numbers that sum to one, or the seed is out of range.
    """

    def __init__(self, path: epath.Path, shares: Sequence[float], seed: int | None, reader: Read):
        self.seed = splits.SEED if seed is None else seed
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2^32 - 1, but got {seed}.")
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"split={tuple(shares)} is invalid. Give the shares of {', '.join(SPLITS)}: three "
                "numbers of at least 0 that sum to 1."
            )
        self.shares = dict(zip(SPLITS, shares, strict=True))
        super().__init__([split for split, share in self.shares.items() if share], [path])
        self.reader = reader

    def read(self) -> Mapping[str, Examples]:
        """See `FileSource`."""
        (path,) = self.paths
        whole = self.reader(path)
        parts = divide(whole.inputs, tuple(self.shares.values()), self.seed)
        examples = {split: whole.take(rows) for split, rows in zip(SPLITS, parts, strict=True)}
        for split in self.splits:
            if not examples[split].inputs:
                raise ValueError(
                    f"{path} has {len(whole.inputs)} rows, and a share of {self.shares[split]:g} "
                    f"leaves none for {split}. Give more rows, other shares, or one file per split."
                )
        return {split: examples[split] for split in self.splits}


def divide(inputs: Sequence[str], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Returns the row numbers of each share, ascending; see `SplitFile`."""
    size = len(inputs)
    first: dict[str, int] = {}
    leader = np.array([first.setdefault(text, row) for row, text in enumerate(inputs)])
    position = np.empty(size, np.int64)
    position[splits.permutation(size, seed)] = np.arange(size)
    bounds = np.rint(np.cumsum(shares)[:-1] * size)
    part = np.searchsorted(bounds, position[leader], side="right")
    return [np.flatnonzero(part == number) for number in range(len(shares))]


def _words(labels: Sequence[Any] | Mapping[Any, str]) -> dict[str, str]:
    """Returns {text in the file: word to answer}.

    Raises:
        ValueError: labels are equal, are not text, or are fewer than two.
    """
    if isinstance(labels, str):
        raise ValueError(
            f"labels must be a sequence, but got the text {labels!r}. Write labels=('yes', 'no')."
        )
    pairs = labels.items() if isinstance(labels, Mapping) else zip(labels, labels, strict=True)
    words: dict[str, str] = {}
    for value, word in pairs:
        text, answer = scalar_text(value), scalar_text(word)
        for label in (text, answer):
            # White space around a text is removed, and a tokenizer does not keep repeated spaces.
            if not label or label != " ".join(label.split()):
                raise ValueError(
                    f"The label {value!r}: {word!r} is not text with single spaces between words. "
                    "Use words, numbers or booleans."
                )
        assert text is not None and answer is not None
        if text in words:
            raise ValueError(f"The label {text!r} is given twice. Remove one of the two.")
        words[text] = answer
    if words and len(set(words.values())) < 2:
        raise ValueError(f"Classification needs at least two labels, but got {labels!r}.")
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
    """SeqIO postprocessor: turns a target into the only gold answer of `answer_overlap`."""
    del example
    return {"answers": [text], "group": ""} if is_target else text

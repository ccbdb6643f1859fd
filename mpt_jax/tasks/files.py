"""Tasks of your own files: JSONL, CSV, TSV or Parquet, and a template.

    jsonl.register(
        "support",
        train="support/train.jsonl",
        validation="support/dev.jsonl",
        inputs="question: {question} context: {context}",
        targets="{answer}",
        labels=("yes", "no"),
    )

What costs nothing is checked when a task is registered: paths, extensions, templates, labels and
names. The files are read when the first example of any split is asked for, all of them, so that
importing a module of many tasks stays fast, and yet a broken test file is told of before training
and not after it. `mpt_jax/tasks/file_readers.py` has the formats.
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


def register(  # noqa: PLR0913 - one keyword for each thing that a task is made of
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
    """Registers a task with SeqIO. It is tokenized with the vocabulary of the run.

    Args:
        name: of the task.
        inputs, targets: templates with the fields of a row, see `jsonl_read.Template`.
        train, validation, test: a file for each split; any of them may be left out.
        data: instead of these, one file, which is split by `split` and `seed`.
        split: shares of train, validation and test; default `SHARES`. 0 leaves a split out.
        seed: of the split; default 42.
        labels: the answers of a classification task; another target is an error. A mapping says
            what the values in the file are called: {0: "no", 1: "yes"}. Empty for free text.
        metrics: SeqIO metrics `(targets, predictions)` of texts, in percent; the first one
            selects the best step. Default: accuracy, macro F1 and the share of predictions that
            are no label; for free text SQuAD's F1 and exact match.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file, template, split, label or name cannot be used.
    """
    if name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names():
        raise ValueError(f"A task named {name!r} is registered already. Give this one another.")
    words = _words(labels)
    reader = functools.partial(
        read, inputs=Template("inputs", inputs), targets=Template("targets", targets), words=words
    )
    files = {"train": train, "validation": validation, "test": test}
    files = {split: epath.Path(file) for split, file in files.items() if file is not None}
    if (data is None) == (not files):
        raise ValueError(
            f"The task {name!r} needs either data= (one file, which is split) or some of train=, "
            f"validation= and test=; got {'both' if files else 'neither'}."
        )
    if data is not None:
        source: FileSource = SplitFile(epath.Path(data), split or SHARES, seed, reader)
    elif split is not None or seed is not None:
        raise ValueError(f"split= and seed= of the task {name!r} have no effect without data=.")
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
    """Examples of files, read whole at first use and kept as text.

    Args:
        split_names: the splits.
        paths: the files; checked here, read later.
    """

    def __init__(self, split_names: Sequence[str], paths: Sequence[epath.Path]):
        for path in paths:
            check_readable(path)
        super().__init__(splits=split_names)
        self.paths = tuple(paths)

    def read(self) -> Mapping[str, Examples]:
        """Returns the examples of each split; raises ValueError as `jsonl_read.read` does."""
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Mapping[str, Examples]:
        """The examples of each split."""
        return self.read()

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Examples are dealt to hosts after they are read."""
        return False

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def list_shards(self, split: str) -> Sequence[str]:
        """One shard: SeqIO deals its examples to the hosts."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Rows of a split; reads the files."""
        return len(self.examples[split].inputs)

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns {inputs, targets} of a split in the order of its file, whatever `shuffle` says.

        Raises:
            ValueError: rows of a file cannot be used.
        """
        del shuffle, seed, unused  # batches are shuffled downstream
        found = self.examples[split]
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": tf.constant(found.inputs), "targets": tf.constant(found.targets)}
        )


class Files(FileSource):
    """A file for each split. Inputs that train shares with another split are warned of.

    Args:
        name: of the task.
        files: split -> path.
        reader: reads one.
    """

    def __init__(self, name: str, files: Mapping[str, epath.Path], reader: Read):
        super().__init__(tuple(files), tuple(files.values()))
        self.name, self.files, self.reader = name, files, reader

    def read(self) -> Mapping[str, Examples]:
        """See `FileSource`."""
        found = {split: self.reader(path) for split, path in self.files.items()}
        seen = set(found["train"].inputs) if "train" in found else set()
        for split in found:
            if split == "train":
                continue
            shared = sum(text in seen for text in found[split].inputs)
            if shared:
                logging.warning(
                    "%s: %d of the %d inputs of %s occur in train too, so scores on %s flatter.",
                    *(self.name, shared, len(found[split].inputs), split, split),
                )
        return found


class SplitFile(FileSource):
    """One file, split at random into train, validation and test.

    A row's place in a permutation of (number of rows, seed) decides, as in `splits`. Rows with the
    same inputs all go where the first of them goes, so that no input is in two splits.

    Args:
        path: the file.
        shares: of train, validation and test.
        seed: of the permutation; None is `splits.SEED`.
        reader: reads the file.

    Raises:
        ValueError: shares that are not three or do not sum to one; a seed out of range.
    """

    def __init__(self, path: epath.Path, shares: Sequence[float], seed: int | None, reader: Read):
        self.seed = splits.SEED if seed is None else seed
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2^32 - 1, got {seed}.")
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"split gives the shares of {', '.join(SPLITS)}, three numbers from 0 that sum to "
                f"1; got {tuple(shares)}."
            )
        self.shares = dict(zip(SPLITS, shares, strict=True))
        super().__init__([split for split, share in self.shares.items() if share], [path])
        self.reader = reader

    def read(self) -> Mapping[str, Examples]:
        """See `FileSource`."""
        (path,) = self.paths
        whole = self.reader(path)
        parts = divide(whole.inputs, tuple(self.shares.values()), self.seed)
        found = {split: whole.take(rows) for split, rows in zip(SPLITS, parts, strict=True)}
        for split in self.splits:
            if not found[split].inputs:
                raise ValueError(
                    f"{path} has {len(whole.inputs)} rows, and a share of {self.shares[split]:g} "
                    f"leaves none for {split}. Give more rows, another split, or a file for each."
                )
        return {split: found[split] for split in self.splits}


def divide(inputs: Sequence[str], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Returns the row numbers of each share, ascending; see `SplitFile`."""
    size = len(inputs)
    first: dict[str, int] = {}
    leader = np.array([first.setdefault(text, row) for row, text in enumerate(inputs)])
    place = np.empty(size, np.int64)
    place[splits.permutation(size, seed)] = np.arange(size)
    bounds = np.rint(np.cumsum(shares)[:-1] * size)
    part = np.searchsorted(bounds, place[leader], side="right")
    return [np.flatnonzero(part == number) for number in range(len(shares))]


def _words(labels: Sequence[Any] | Mapping[Any, str]) -> dict[str, str]:
    """Returns {text in the file: word to answer}.

    Raises:
        ValueError: labels that cannot be told apart, are no text, or fewer than two.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be several, got the text {labels!r}: ('yes', 'no').")
    given = labels.items() if isinstance(labels, Mapping) else zip(labels, labels, strict=True)
    words: dict[str, str] = {}
    for value, word in given:
        text, called = scalar_text(value), scalar_text(word)
        for found in (text, called):
            # White space around a text is removed, and between words is not kept by a tokenizer.
            if not found or found != " ".join(found.split()):
                raise ValueError(
                    f"The label {value!r}: {word!r} is no text with single spaces between words. "
                    "Labels are words, numbers or booleans."
                )
        assert text is not None and called is not None
        if text in words:
            raise ValueError(f"The label {text!r} is given twice.")
        words[text] = called
    if words and len(set(words.values())) < 2:
        raise ValueError(f"A classification needs two labels or more, got {labels!r}.")
    return words


def _metrics(labels: Sequence[str], given: Sequence[Callable[..., Any]]) -> list[Any]:
    if not labels:
        return list(given) or [text_metrics.answer_overlap]
    first, *others = given or (
        text_metrics.accuracy,
        text_metrics.macro_f1(labels),
        text_metrics.invalid_rate(labels),
    )
    return [evaluator.with_labels(first, labels), *others]


def _only_answer(text: str, example: Any = None, is_target: bool = False) -> Any:
    """SeqIO postprocessor: a target as `text_metrics.answer_overlap` has it, the only answer."""
    del example
    return {"answers": [text], "group": ""} if is_target else text

"""Few-shot runs: `boolq_k16_s3` trains on 16 rows of boolq, selected by draw 3.

    <task>_k<k>_s<draw>                k training rows in total, as the MPT paper counts them
    <task>_k<k>_per_class_s<draw>      k training rows of each label; not in the paper
    <task>_s<draw>                     all rows; their order and the initial values depend on the
                                       draw
    ..._dev                            also cuts validation to k rows (of each label, with
                                       per_class), from a separate draw
    ..._lr0.3, _tlr0.4, _from_mnli,    the same rows in the same order, for runs of a fleet that
        _init_text                     differ in these settings (`runs.data_name`)

The paper uses k = 4, 16, 32 and ten draws (0 .. 9 here). It does not say whether the whole
validation split is used; by default it is. Any k and draw are possible, because a run is registered
when its name is first used (`task_lookup.register_task_resolver`). The test split, and without
`_dev` the validation split, are those of the task.

The training rows of a run depend only on (task, k, draw) and on the number of rows to choose from:
`random.Random(f"{task} {k} {draw}").sample`, seeded by SHA-512 of the text, so the draw is the
same on every machine. For the validation rows of `_dev`, ` validation` is added to the text. With
`_per_class`, rows are drawn separately for each label, and ` class <number>` is added as well.
Versions of a task, such as `boolq_digits`, use the same rows (`draw_as`).
Row numbers count from 0 in the order of the task's training split. For the tasks of the suites,
this is the order of the original files or, for a split that is part of a permutation, the order of
the permutation (`splits.PartsSource.positions`). For other tasks, it is the order in which the
source yields rows without shuffling.

k counts rows of the data set, not examples: a row of ReCoRD becomes one example per answer.

Image tasks have the same names, but their images are drawn by a hash: see `image_few_shot`.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax.core.runs import data_name
from mpt_jax.data import fingerprints, preprocessors, task_lookup
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import text_metrics
from mpt_jax.tasks.splits import where

_NAME = re.compile(
    r"(?P<task>.+)_k(?P<k>[1-9]\d*)(?P<per_class>_per_class)?_s(?P<seed>0|[1-9]\d*)(?P<dev>_dev)?",
    re.ASCII,
)
# Attribute of a task: the task name that seeds its draws, if it differs from the task's name.
_DRAWN_AS = "drawn_as"
_REPEAT = re.compile(r"(?P<task>.+)_s(0|[1-9]\d*)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Draw:
    """The parts of a few-shot run's name.

    Attributes:
        task: The name of the task to train on.
        k: The number of training rows, in total or for each label.
        seed: The number of the draw.
        per_class: Whether k is the number of rows of each label.
        dev: Whether the validation split is also cut to k rows, in total or for each label.
    """

    task: str
    k: int
    seed: int
    per_class: bool = False
    dev: bool = False

    @property
    def name(self) -> str:
        """The name of the run. `parse` converts it back to this draw."""
        middle = "_per_class" if self.per_class else ""
        return f"{self.task}_k{self.k}{middle}_s{self.seed}{'_dev' if self.dev else ''}"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are cut to the drawn rows."""
        return ("train", "validation") if self.dev else ("train",)


def parse(name: str) -> Draw | None:
    """Returns the draw that a run name describes, or None if it does not name a few-shot run."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    k, seed = int(match["k"]), int(match["seed"])
    return Draw(match["task"], k, seed, bool(match["per_class"]), bool(match["dev"]))


def indices(draw: Draw, split: str, num_rows: int) -> list[int]:
    """Returns the k row numbers that a run uses, out of `num_rows` rows, in the order drawn.

    Raises:
        ValueError: the split has fewer than k rows.
    """
    _check(draw, split, num_rows)
    return _generator(draw, split).sample(range(num_rows), draw.k)


def indices_per_class(
    draw: Draw, split: str, row_labels: np.ndarray, labels: Sequence[str]
) -> list[int]:
    """Returns k row numbers of each label, label by label, in the order drawn.

    Args:
        draw: The draw.
        split: The name of the split to draw from.
        row_labels: The label number of each row [n].
        labels: The name of each label number.

    Raises:
        ValueError: a label has fewer than k rows.
    """
    drawn = []
    for number, label in enumerate(labels):
        rows = np.flatnonzero(row_labels == number).tolist()
        _check(draw, split, len(rows), f" of label {label!r}")
        drawn += _generator(draw, split, f"class {number}").sample(rows, draw.k)
    return drawn


def draw_as(task: seqio.Task, name: str) -> None:
    """Makes few-shot runs of `task` draw the same rows as runs of the task called `name`.

    Args:
        task: A task with the same rows in the same order as the other task. Its labels may have
            other names, but must have the same order.
        name: The name of the other task.
    """
    setattr(task, _DRAWN_AS, name)


def drawn_as(task: seqio.Task) -> str:
    """Returns the name of the task whose few-shot rows runs of `task` draw."""
    return getattr(task, _DRAWN_AS, task.name)


def _generator(draw: Draw, split: str, *rest: str) -> random.Random:
    split_words = () if split == "train" else (split,)
    return random.Random(" ".join([draw.task, str(draw.k), str(draw.seed), *split_words, *rest]))


def _check(draw: Draw, split: str, num_rows: int, suffix: str = "") -> None:
    if num_rows < draw.k:
        raise ValueError(
            f"{draw.task} has {num_rows:,} rows{suffix} in its {split} split, but {draw.name} "
            f"needs k = {draw.k}. Use a smaller k in SHOTS or in the run's name."
        )


class FewShotSource(seqio.DataSource):
    """Source of a few-shot run: the task's source, with `draw.splits` cut to the drawn rows.

    Only the drawn rows are held in memory. Drawing rows of each class needs one pass over the
    labels, and some sources need one pass to sort the rows (`splits`).

    Args:
        task: The task to train on. Its source must report the number of rows of a split, by
            `num_rows(split)` or SeqIO's `num_input_examples(split)`.
        draw: The draw that selects the rows. `draw.task` is part of the seed.

    Attributes:
        source: The source of the task.
        draw: The draw that selects the rows.
    """

    def __init__(self, task: seqio.Task, draw: Draw):
        super().__init__(splits=())
        self._task, self.source, self.draw = task, task.source, draw
        self._drawn: dict[str, list[int]] = {}

    @property
    def splits(self) -> Sequence[str]:
        """The splits of the task's source, which may have to read its data."""
        return self.source.splits

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: examples are split among hosts after they are read."""
        return False

    def __str__(self) -> str:
        return f"{self.source}, {self.draw.name}"

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard; SeqIO splits its examples among the hosts."""
        return [split]

    def num_input_examples(self, split: str) -> int | None:  # type: ignore[override]
        """Returns the number of rows of a split; None if the task's source does not report it."""
        if split not in self.draw.splits:
            return self.source.num_input_examples(split)
        classes = len(evaluator.labels_of(self._task)) if self.draw.per_class else 1
        return self.draw.k * classes

    def fingerprint(self, split: str) -> Any:
        """Returns what the rows of a split depend on, as JSON values (see `data.fingerprints`)."""
        if not hasattr(self.source, "fingerprint"):
            raise fingerprints.Unknown(f"{type(self.source).__name__} has no method fingerprint")
        whole = [fingerprints.describe(type(self.source)), self.source.fingerprint(split)]
        if split not in self.draw.splits:
            return whole
        labels = evaluator.labels_of(self._task) if self.draw.per_class else []
        return [whole, dataclasses.asdict(self.draw), list(labels)]

    def few_shot_indices(self, split: str) -> list[int] | None:
        """Returns the drawn row numbers of a split, in the order drawn; None if it is not cut.

        Raises:
            ValueError: the split, or a label, has fewer than k rows, the number of rows is
                unknown, or the labels of the rows cannot be determined.
        """
        if split not in self.draw.splits:
            return None
        if split not in self._drawn:
            if self.draw.per_class:
                labels = evaluator.labels_of(self._task)
                row_labels = self._row_labels(split, labels)
                drawn = indices_per_class(self.draw, split, row_labels, labels)
            else:
                drawn = indices(self.draw, split, self._num_rows(split))
            self._drawn[split] = drawn
        return list(self._drawn[split])

    def get_dataset(  # type: ignore[override]  # what SeqIO passes
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **settings: Any
    ) -> tf.data.Dataset:
        """Returns the rows of a split: if it is in `draw.splits`, only those drawn, in the order
        drawn, whatever `shuffle` and `seed` are."""
        drawn = self.few_shot_indices(split)
        if drawn is None:
            return self.source.get_dataset(split=split, shuffle=shuffle, seed=seed, **settings)
        positions = self._positions(split)
        chosen = np.zeros(len(positions), bool)
        chosen[positions[drawn]] = True
        stream = where(self.source.get_dataset(split=split, shuffle=False), chosen)
        rows = dict(zip(np.flatnonzero(chosen).tolist(), stream, strict=True))
        ordered = [tf.data.Dataset.from_tensors(rows[i]) for i in positions[drawn].tolist()]
        return tf.data.Dataset.choose_from_datasets(
            ordered, tf.data.Dataset.range(len(ordered)), stop_on_empty_dataset=False
        )

    def _num_rows(self, split: str) -> int:
        count = getattr(self.source, "num_rows", self.source.num_input_examples)(split)
        if count is None:
            raise ValueError(
                f"The source of task {self._task.name!r} does not report how many rows its {split} "
                "split has, so few-shot runs cannot draw rows from it. Pass num_input_examples to "
                "the source, or implement num_input_examples() in its class."
            )
        return count

    def _positions(self, split: str) -> np.ndarray:
        """Returns the positions of a split's rows [n] in the unshuffled output of the source."""
        if hasattr(self.source, "positions"):
            return self.source.positions(split)
        return np.arange(self._num_rows(split))

    def _row_labels(self, split: str, labels: Sequence[str]) -> np.ndarray:
        """Returns the label number of each row [n], after one pass over the split.

        Raises:
            ValueError: a row's target is not one of the labels, or the task's preprocessors do not
                make one example from each row.
        """
        stream = text_rows(self._task, self.source.get_dataset(split=split, shuffle=False))
        targets = stream.map(tf.autograph.experimental.do_not_convert(lambda row: row["targets"]))
        number = {label.encode(): i for i, label in enumerate(labels)}
        with task_lookup.explain_missing_data(self._task, split):
            found = list(targets.as_numpy_iterator())
        positions = self._positions(split)
        if len(found) != len(positions):
            raise ValueError(
                f"{self.draw.name} cannot draw rows of each label: the preprocessors of task "
                f"{self._task.name!r} make {len(found):,} examples from the {len(positions):,} "
                f"rows of its {split} split, so a row has no single label. Use "
                f"{dataclasses.replace(self.draw, per_class=False).name} to draw from all rows."
            )
        if strange := [target for target in found if target not in number]:
            raise ValueError(
                f"Task {self._task.name!r} declares the labels {', '.join(map(repr, labels))}, but "
                f"{len(strange):,} of the {len(found):,} rows of its {split} split have other "
                f"targets, such as {strange[0].decode(errors='replace')!r}. Correct the labels or "
                "the targets."
            )
        return np.array([number[target] for target in found])[positions]


def drawn_targets(runs: Sequence[str]) -> dict[str, list[str]]:
    """Returns run -> the targets of its training rows as text, for few-shot runs of one task. Takes
    one pass over the rows of the task, and preprocesses only those that are drawn.

    Raises:
        FileNotFoundError: the data are not on this machine.
    """
    sources = {run: task_lookup.find_task(run).source for run in runs}
    drawn = {run: source.few_shot_indices("train") for run, source in sources.items()}
    first: Any = next(iter(sources.values()))
    positions = first._positions("train")
    wanted = sorted({row for rows in drawn.values() for row in rows}, key=lambda i: positions[i])
    chosen = np.zeros(len(positions), bool)
    chosen[positions[wanted]] = True
    stream = where(first.source.get_dataset(split="train", shuffle=False), chosen)
    texts = text_rows(task_lookup.find_task(runs[0]), stream)
    target = {
        row: text["targets"].decode()
        for row, text in zip(wanted, texts.as_numpy_iterator(), strict=True)
    }
    return {run: [target[row] for row in rows] for run, rows in drawn.items()}


def text_rows(task: seqio.Task, dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the rows of a task's source as text, `inputs` and `targets`, before tokenization.

    Raises:
        ValueError: the task's preprocessors lack `seqio.preprocessors.tokenize`.
    """
    steps = list(task.preprocessors)
    if seqio.preprocessors.tokenize not in steps:
        raise ValueError(
            f"The preprocessors of task {task.name!r} lack seqio.preprocessors.tokenize. End the "
            f"list with *mpt_jax.data.preprocessors.finish({task.name!r})."
        )
    for step in steps[: steps.index(seqio.preprocessors.tokenize)]:
        dataset = step(dataset)
    return dataset


def register_run(name: str) -> bool:
    """Registers the run called `name`; a resolver for `task_lookup.register_task_resolver`.

    Returns:
        Whether `name` is a run of a registered task, in one of the forms of the module docstring.

    Raises:
        ValueError: the task has fewer than k rows, or has no labels and `name` asks for k rows of
            each label.
    """
    if (data := data_name(name)) != name:
        if not task_lookup.is_task(data):
            return False
        task = seqio.TaskRegistry.get(data)
        _add(name, task, task.source)
        return True
    asked = parse(name)
    if asked is None:
        return _register_repeat(name)
    if not task_lookup.is_task(asked.task):
        return False
    task = seqio.TaskRegistry.get(asked.task)
    if isinstance(task.source, FewShotSource):
        return False
    draw = dataclasses.replace(asked, task=drawn_as(task))
    if hasattr(task.source, "few_shot"):  # images, see image_few_shot
        _add(name, task, task.source.few_shot(task, draw))
        return True
    if asked.per_class and not evaluator.labels_of(task):
        raise ValueError(
            f"{name} asks for {asked.k} rows of each label, but task {asked.task} has no labels. "
            f"Use {dataclasses.replace(asked, per_class=False).name} to draw from all rows."
        )
    for split in draw.splits:
        if (published := task.source.num_input_examples(split)) is not None:
            _check(asked, split, published)
    _add(name, task, FewShotSource(task, draw))
    return True


def _register_repeat(name: str) -> bool:
    match = _REPEAT.fullmatch(name)
    if match is None or not task_lookup.is_task(match["task"]):
        return False
    task = seqio.TaskRegistry.get(match["task"])
    if isinstance(task.source, FewShotSource):
        return False
    _add(name, task, task.source)
    return True


def _add(name: str, task: seqio.Task, source: seqio.DataSource) -> None:
    changes: Mapping[str, Any] = {
        "name": name,
        "source": source,
        "preprocessors": preprocessors.renamed(task.preprocessors, name),
        "metric_fns": [text_metrics.of_task(name, metric) for metric in task.metric_fns],
    }
    seqio.TaskRegistry.add_provider(name, task.replace(**changes))


task_lookup.register_task_resolver(register_run)

"""Decoding and scoring of held-out examples, with SeqIO's metrics and T5X's file layout.

`seqio.Evaluator` reads the tasks, decodes ids into text, computes the metrics and writes

    <output_dir>/<task>/events*             TensorBoard, tags eval/<metric>
    <output_dir>/<task>-metrics.jsonl       one line for each evaluation
    <output_dir>/<task>-<step>.jsonl        inputs, target and prediction of every example

This module adds three things. Batches mix tasks, so many small tasks cost as much as one large task
of the same total size. A task whose metric declares labels is also scored by rank classification
(`ranking`). Gold texts and predictions are compared as the vocabulary writes them (`decoded_text`).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.artifacts import model_card
from mpt_jax.batching.collate import Batch
from mpt_jax.data import (
    datasets,
    in_memory,
    table_batches,
    task_lookup,
    token_reading,
    token_tables,
    validation,
)
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.image_preprocessors import IMAGE
from mpt_jax.data.iterators import EvalBatches, HostShard
from mpt_jax.data.labels import labels_of
from mpt_jax.data.preprocessors import map_dataset
from mpt_jax.evaluation import decoded_text, ranking

PREDICTION = seqio.metrics.ModelOutputType.PREDICTION  # type: ignore[attr-defined]
SCORE = seqio.metrics.ModelOutputType.SCORE  # type: ignore[attr-defined]
LOGGERS = (seqio.PyLoggingLogger, seqio.TensorBoardLogger, seqio.JSONLogger)

BatchFn = Callable[[Batch], Any]


def with_labels(metric_fn: Callable[..., Any], labels: Sequence[str]) -> Callable[..., Any]:
    """Returns `metric_fn` with the labels of a classification task attached, for rank
    classification.

    Example:
        `metric_fns=[with_labels(accuracy, ["yes", "no"])]` adds the metric `rank_accuracy`.
    """

    @functools.wraps(metric_fn)
    def labeled(*args, **kwargs):
        return metric_fn(*args, **kwargs)

    labeled.labels = tuple(labels)  # type: ignore[attr-defined]
    return labeled


class InferenceEvaluator:
    """Decodes and scores every example of a task or mixture.

    Args:
        cfg: the settings of the dataset; `batch_size` is the number of rows that the model
            evaluates at a time, over all hosts.
        feature_converter_cls: the class or factory of the feature converter, called with
            `pack=False`.
        output_dir: the folder to write to, such as MODEL_DIR/inference_eval; None to write nothing.
        evaluator_cls: `seqio.Evaluator` with settings such as `logger_cls` bound; by default with
            the loggers `LOGGERS`.
        num_hosts: number of hosts that share each batch.
        host_index: index of this host; only host 0 writes.

    Attributes:
        split: the evaluated split.

    Raises:
        ValueError: an unknown task or run, a missing or empty split, over-long examples, a metric
            that cannot be computed, or no task with metrics.
    """

    def __init__(
        self,
        cfg: datasets.DatasetConfig,
        feature_converter_cls: Callable[..., Any],
        output_dir: str | None,
        *,
        evaluator_cls: Callable[..., seqio.Evaluator] | None = None,
        num_hosts: int = 1,
        host_index: int = 0,
    ):
        provider = cfg.provider()
        self.split = cfg.split
        self._converter = cfg.converter(feature_converter_cls, pack=False)
        _check(provider, cfg, self._converter)
        if evaluator_cls is None:
            evaluator_cls = functools.partial(seqio.Evaluator, logger_cls=LOGGERS)
        settings: dict[str, Any] = {"log_dir": output_dir}
        if output_dir is None or host_index:
            settings = {"logger_cls": ()}
        if not cfg.use_memory_cache:  # otherwise the evaluator's own setting applies
            settings["use_memory_cache"] = False
        with task_lookup.explain_missing_data(provider, cfg.split):
            self._evaluator: Any = evaluator_cls(
                mixture_or_task_name=provider.name,
                feature_converter=cast(Any, _Unconverted()),
                eval_split=cfg.split,
                use_cached=cfg.use_cached,
                seed=cfg.seed,
                sequence_length=cfg.task_feature_lengths or None,  # {} of images
                **settings,
            )
        compared = [decoded_text.compared(task) for task in self._evaluator.eval_tasks]
        self._evaluator._eval_tasks = compared
        self._tasks: dict[str, Any] = {task.name: task for task in compared}
        self._extra: dict[str, dict[str, float]] = {}
        self._reporter = decoded_text.ConstantReporter()
        # SeqIO computes and writes metrics in one call, so its loggers add the rank accuracies.
        self._evaluator._loggers = tuple(
            _Joining(logger, self._extra) for logger in self._evaluator.loggers
        )
        read = self._evaluator.cached_task_datasets
        self._keep = all(map(_in_memory, read.values()))
        # Metrics read the examples of each task several times, without this from a new iterator.
        self._evaluator._cached_task_datasets = {n: _without_count(d) for n, d in read.items()}
        self._tables = self._read_tables(cfg)
        self._share = HostShard(cfg.batch_size, num_hosts, host_index)
        self._limits = self._longest() | dict(cfg.task_feature_lengths or {})
        self._buckets = cfg.buckets(self._converter, self._limits)
        self._batches: dict[tuple[str, ...], Any] = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the evaluated tasks."""
        return tuple(self._tasks)

    @property
    def num_examples(self) -> dict[str, int]:
        """Number of evaluated examples of each task."""
        return {name: table.num_examples for name, table in self._tables.items()}

    def close(self) -> None:
        """Waits until all metrics and predictions are written."""
        self._evaluator.close()

    def evaluate(
        self,
        predict_fn: BatchFn,
        score_fn: BatchFn,
        step: int,
        task_names: Sequence[str] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Evaluates tasks, and writes their metrics and predictions.

        Args:
            predict_fn: a function of this host's batch that returns the predicted ids [B, L] of all
                hosts' rows, 0 after EOS.
            score_fn: a function of this host's batch that returns the log-probability of each
                target [B] of all hosts' rows, in nats.
            step: the training step of the parameters.
            task_names: names of the tasks; None for all.

        Returns:
            {task: {metric: value}}; `rank_accuracy`, if any, follows the task's own metrics. The
            last one is `constant_prediction`, 1, if all predictions of the task are the same while
            its targets differ.

        Raises:
            ValueError: an example's target is not one of the labels that its task declares.
        """
        self._choose(self.task_names if task_names is None else task_names)
        outputs = {
            kind: self._run(function, self._needing(kind))
            for kind, function in ((PREDICTION, predict_fn), (SCORE, score_fn))
        }
        constant = {name: self._constant(name, ids) for name, ids in outputs[PREDICTION].items()}
        self._extra.clear()
        self._extra.update(self._rank(score_fn))
        for name in (name for name, text in constant.items() if text is not None):
            self._extra[name] = {**self._extra.get(name, {}), model_card.CONSTANT: 1.0}
        name_of = {id(d): name for name, d in self._evaluator.cached_model_datasets.items()}

        def outputs_of(kind, dataset):
            return list(enumerate(outputs[kind][name_of[id(dataset)]]))

        future, _ = self._evaluator.evaluate(
            compute_metrics=True,
            step=step,
            model_fns={kind: functools.partial(outputs_of, kind) for kind in outputs},
        )
        found = {
            name: {**_scalars(metrics), **self._extra.get(name, {})}
            for name, metrics in future.result().items()
        }
        for name, text in constant.items():
            self._reporter.report(name, text, found[name])
        return found

    def _choose(self, names: Sequence[str]) -> None:
        """Restricts the next evaluation to some tasks."""
        chosen = [task for name, task in self._tasks.items() if name in names]
        if chosen != self._evaluator.eval_tasks:
            self._evaluator._eval_tasks = chosen
            self._batches.clear()

    def _constant(self, name: str, ids: np.ndarray) -> str | None:
        """Returns the text of all predictions of a task if they are the same while its gold targets
        differ; None otherwise."""
        text = decoded_text.constant_prediction(self._tasks[name], ids)
        if text is None:
            return None
        table = self._tables[name]
        golds = np.split(table.values["targets"], table.offsets["targets"][1:-1])
        return text if any(not np.array_equal(gold, golds[0]) for gold in golds) else None

    def _longest(self) -> dict[str, int]:
        """Returns the lengths of the longest inputs and targets of all tasks, in tokens."""
        lengths = {
            name: [np.diff(table.offsets[name]).max() for table in self._tables.values()]
            for name in ("inputs", "targets")
            if all(name in table.offsets for table in self._tables.values())
        }
        return {name: int(max(found)) for name, found in lengths.items()}

    def _needing(self, kind: Any) -> tuple[str, ...]:
        return tuple(
            task.name
            for task in self._evaluator.eval_tasks
            if any(metric.model_output_type == kind for metric in task.metric_objs)
        )

    def _read_tables(self, cfg: datasets.DatasetConfig) -> dict[str, token_tables.TokenTable]:
        """Reads and checks the examples of each task."""
        tables = {}
        for name, dataset in self._evaluator.cached_task_datasets.items():
            features = self._tasks[name].output_features
            values, offsets = token_reading.read_tokens(dataset, list(features), name)
            counts = token_reading.count_tokens(values, features) if values else {}
            tables[name] = token_tables.TokenTable(name, cfg.split, values, offsets, counts)
        counts = {name: (x.num_overlong, x.num_examples) for name, x in tables.items()}
        validation.check_counts(counts, cfg, self._converter)
        for name, table in tables.items():
            token_reading.report_unknown(name, cfg.split, table.unknown)
        return tables

    def _read(self, names: tuple[str, ...]) -> Iterable[tuple[np.ndarray, Batch]]:
        """Returns (row indices, batch) pairs of this host, where the indices count the rows of the
        concatenated tasks."""
        if names not in self._batches:
            # Together, because a dataset for each of hundreds of tasks takes a minute.
            tables = [self._tables[name] for name in names]
            if type(self._converter) is PromptFeatureConverter:
                self._batches[names] = table_batches.every_example(
                    tables,
                    self._limits,
                    self._converter,
                    self._buckets,
                    self._share,
                    trim_targets=False,
                )
            else:
                rows = self._converter(token_tables.dataset_of(tables), self._limits)
                self._batches[names] = EvalBatches(
                    rows, self._share, keep=self._keep, buckets=self._buckets, trim_targets=False
                )
        return self._batches[names].numbered()

    def _run(self, function: BatchFn, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Returns {task: outputs}, with one row of outputs for each example of the task."""
        if not names:
            return {}
        bounds = np.cumsum([self._tables[name].num_examples for name in names])
        outputs: np.ndarray | None = None
        for indices, batch in self._read(names):
            rows = np.asarray(function(batch))[: len(indices)]  # the rest is padding
            if outputs is None:
                outputs = np.zeros((bounds[-1], *rows.shape[1:]), rows.dtype)
            outputs[indices] = rows
        assert outputs is not None  # `_read_tables` rejects empty splits
        return dict(zip(names, np.split(outputs, bounds[:-1]), strict=True))

    def _rank(self, score_fn: BatchFn) -> dict[str, dict[str, float]]:
        """Returns {task: {'rank_accuracy': percent}} for the tasks that declare labels."""
        tasks = {task.name: task for task in self._evaluator.eval_tasks if labels_of(task)}
        if not tasks:
            return {}
        ranker = ranking.Ranker(tasks, self._converter.runs, score_fn)
        return ranking.accuracies(self._run(ranker, tuple(tasks)))


def _in_memory(dataset: tf.data.Dataset) -> bool:
    """Whether SeqIO's evaluator keeps this dataset in memory, which only its type shows: a cache
    inside an assertion of its size."""
    return any(
        x.cached
        if isinstance(x, in_memory.MemoryDataset)
        else isinstance(x, type(tf.data.Dataset.range(0).cache()))
        for x in dataset._inputs()
    )


def _without_count(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the `MemoryDataset` inside SeqIO's assertion of its size, or else `dataset`."""
    memory = [x for x in dataset._inputs() if isinstance(x, in_memory.MemoryDataset)]
    return memory[0] if memory else dataset


def _check(provider: Any, cfg: datasets.DatasetConfig, converter: Any) -> None:
    """Raises ValueError for mistakes that SeqIO would only log, or report with an unclear error."""
    registered = provider.name in seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
    if not registered:
        raise ValueError(
            f"The task or mixture {provider.name!r} is not registered with SeqIO, whose evaluator "
            "finds tasks by name. Register a task with seqio.TaskRegistry.add, and a mixture with "
            "sampling.task_mixture."
        )
    tasks = seqio.get_subtasks(provider)
    validation.check_tasks(tasks, converter, cfg.task_feature_lengths)
    for task in tasks:
        task_lookup.check_split(task, cfg.split)
        if task.predict_with_aux_metric_fns:
            raise ValueError(
                f"Task {task.name!r} has a metric that reads auxiliary values (aux_values), which "
                "this evaluator does not compute. Remove the metric from the task's metric_fns."
            )
        if not task.metric_objs:
            logging.warning("Skipped task %s, which has no metrics.", task.name)
    if not any(task.metric_objs for task in tasks):
        raise ValueError(
            f"No task of {provider.name!r} has metrics, so nothing can be evaluated. Register the "
            "tasks with metric_fns."
        )


class _Unconverted:
    """Stands for the feature converter in SeqIO's evaluator, which reads the examples of each task
    and calls a function with its dataset. The batches of all tasks are made here."""

    TASK_FEATURES = PromptFeatureConverter.TASK_FEATURES
    pack = False

    def __call__(self, dataset: tf.data.Dataset, lengths: Mapping[str, int]) -> tf.data.Dataset:
        del lengths
        return dataset


class _Joining:
    """Wrapper of a SeqIO logger that adds extra metrics to those that SeqIO computed."""

    def __init__(self, logger: Any, extra: Mapping[str, Mapping[str, float]]):
        self._logger, self._extra = logger, extra

    def __call__(
        self, *, task_name: str, metrics: Mapping[str, Any], dataset: Any = None, **rest: Any
    ) -> None:
        extra = {k: seqio.metrics.Scalar(v) for k, v in self._extra.get(task_name, {}).items()}  # type: ignore[attr-defined]
        if dataset is not None and IMAGE in dataset.element_spec:  # not written beside predictions
            dataset = map_dataset(dataset, lambda x: {k: v for k, v in x.items() if k != IMAGE})
        self._logger(task_name=task_name, metrics={**metrics, **extra}, dataset=dataset, **rest)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are single numbers."""
    values = {name: np.asarray(getattr(value, "value", value)) for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in values.items()
        if value.ndim == 0 and np.issubdtype(value.dtype, np.number)
    }

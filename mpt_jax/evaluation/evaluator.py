"""Decoding and scoring of held-out examples, with SeqIO's metrics and T5X's files.

`seqio.Evaluator` reads the tasks, decodes ids into text, computes the metrics and writes

    <output_dir>/<task>/events*             TensorBoard, tags eval/<metric>
    <output_dir>/<task>-metrics.jsonl       one line for each evaluation
    <output_dir>/<task>-<step>.jsonl        inputs, target and prediction of every example

This module adds two things. Batches mix tasks, so many small tasks cost as much as one large task
of the same total size. A task whose metric declares labels is also scored by rank classification:
the answer is the label with the highest log-probability, regardless of the decoded text.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from jax.experimental import multihost_utils

from mpt_jax.batching.collate import Batch
from mpt_jax.data import datasets, task_lookup, token_tables, validation
from mpt_jax.data.iterators import EvalBatches, HostShard

PREDICTION = seqio.metrics.ModelOutputType.PREDICTION  # type: ignore[attr-defined]
SCORE = seqio.metrics.ModelOutputType.SCORE  # type: ignore[attr-defined]
LOGGERS = (seqio.PyLoggingLogger, seqio.TensorBoardLogger, seqio.JSONLogger)

# Only the type of seqio.Evaluator's datasets shows whether it caches them in memory.
_IN_MEMORY = type(tf.data.Dataset.range(0).cache())

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


def labels_of(task: seqio.Task) -> tuple[str, ...]:
    """Returns the labels that a metric of `task` declares, or () if none does."""
    for metric_fn in task.metric_fns:
        if labels := getattr(metric_fn, "labels", ()):
            return tuple(labels)
    return ()


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
                feature_converter=self._converter,
                eval_split=cfg.split,
                use_cached=cfg.use_cached,
                seed=cfg.seed,
                sequence_length=cfg.task_feature_lengths,
                **settings,
            )
        self._tasks: dict[str, Any] = {task.name: task for task in self._evaluator.eval_tasks}
        self._extra: dict[str, dict[str, float]] = {}
        # SeqIO computes and writes metrics in one call, so its loggers add the rank accuracies.
        self._evaluator._loggers = tuple(
            _Joining(logger, self._extra) for logger in self._evaluator.loggers
        )
        self._sizes = self._count(cfg)
        self._share = HostShard(cfg.batch_size, num_hosts, host_index)
        datasets = self._evaluator.cached_task_datasets.values()
        self._keep = all(isinstance(dataset, _IN_MEMORY) for dataset in datasets)
        self._buckets = cfg.buckets(self._converter, self._limits())
        self._batches: dict[tuple[str, ...], EvalBatches] = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the evaluated tasks."""
        return tuple(self._tasks)

    @property
    def num_examples(self) -> dict[str, int]:
        """Number of evaluated examples of each task."""
        return dict(self._sizes)

    def close(self) -> None:
        """Waits until all metrics and predictions are written."""
        self._evaluator.close()

    def evaluate(
        self, predict_fn: BatchFn, score_fn: BatchFn, step: int
    ) -> dict[str, dict[str, float]]:
        """Evaluates all tasks, and writes their metrics and predictions.

        Args:
            predict_fn: a function of this host's batch that returns the predicted ids [B, L] of all
                hosts' rows, 0 after EOS.
            score_fn: a function of this host's batch that returns the log-probability of each
                target [B] of all hosts' rows, in nats.
            step: the training step of the parameters.

        Returns:
            {task: {metric: value}}; `rank_accuracy`, if any, follows the task's own metrics.

        Raises:
            ValueError: an example's target is not one of the labels that its task declares.
        """
        outputs = {
            kind: self._run(function, self._needing(kind))
            for kind, function in ((PREDICTION, predict_fn), (SCORE, score_fn))
        }
        self._extra.clear()
        self._extra.update(self._rank(score_fn))
        name_of = {id(d): name for name, d in self._evaluator.cached_model_datasets.items()}

        def outputs_of(kind, dataset):
            return list(enumerate(outputs[kind][name_of[id(dataset)]]))

        future, _ = self._evaluator.evaluate(
            compute_metrics=True,
            step=step,
            model_fns={kind: functools.partial(outputs_of, kind) for kind in outputs},
        )
        return {
            name: {**_scalars(metrics), **self._extra.get(name, {})}
            for name, metrics in future.result().items()
        }

    def _limits(self) -> dict[str, int]:
        """Returns the limits on inputs and targets with which the examples were converted."""
        spec = next(iter(self._evaluator.cached_model_datasets.values())).element_spec[1]
        positions = spec["encoder_input_tokens"].shape[0]
        prompt_length = getattr(self._converter, "prompt_length", 0)
        targets = spec["decoder_target_tokens"].shape[0]
        return {"inputs": positions - prompt_length, "targets": targets}

    def _needing(self, kind: Any) -> tuple[str, ...]:
        return tuple(
            name
            for name, task in self._tasks.items()
            if any(metric.model_output_type == kind for metric in task.metric_objs)
        )

    def _count(self, cfg: datasets.DatasetConfig) -> dict[str, int]:
        """Checks the examples' lengths and returns each task's number of examples."""
        cached = self._evaluator.cached_task_datasets
        overlong = {name: token_tables.count_examples(dataset) for name, dataset in cached.items()}
        validation.check_counts(overlong, cfg, self._converter)
        return {name: size for name, (_, size) in overlong.items()}

    def _read(self, names: tuple[str, ...]) -> Iterable[tuple[np.ndarray, Batch]]:
        """Returns (row indices, batch) pairs of this host, where the indices count the rows of the
        concatenated tasks."""
        if names not in self._batches:
            datasets = [self._evaluator.cached_model_datasets[name] for name in names]
            joined = functools.reduce(lambda a, b: a.concatenate(b), datasets)
            self._batches[names] = EvalBatches(
                joined.map(lambda _, example: example),
                self._share,
                keep=self._keep,
                buckets=self._buckets,
                trim_targets=False,
            )
        return self._batches[names].numbered()

    def _run(self, function: BatchFn, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Returns {task: outputs}, with one row of outputs for each example of the task."""
        if not names:
            return {}
        bounds = np.cumsum([self._sizes[name] for name in names])
        outputs: np.ndarray | None = None
        for indices, batch in self._read(names):
            rows = np.asarray(function(batch))[: len(indices)]  # the rest is padding
            if outputs is None:
                outputs = np.zeros((bounds[-1], *rows.shape[1:]), rows.dtype)
            outputs[indices] = rows
        assert outputs is not None  # `_count` rejects empty splits
        return dict(zip(names, np.split(outputs, bounds[:-1]), strict=True))

    def _rank(self, score_fn: BatchFn) -> dict[str, dict[str, float]]:
        """Returns {task: {'rank_accuracy': percent}} for the tasks that declare labels."""
        names = tuple(name for name, task in self._tasks.items() if labels_of(task))
        if not names:
            return {}
        labels = self._label_table(names)

        def is_right(batch: Batch) -> np.ndarray:
            rows = batch["encoder_task_ids"].max(axis=1)
            scores = []
            for column in range(labels.shape[1]):
                tokens = labels[rows, column]
                score = np.asarray(score_fn(_with_targets(batch, tokens, rows)))
                scores.append(np.where(_gather(tokens).any(axis=1), score, -np.inf))
            targets = batch["decoder_target_tokens"]
            width = max(targets.shape[1], labels.shape[2])
            matches = _widened(labels[rows], width) == _widened(targets, width)[:, None]
            matches = matches.all(axis=2)
            known = matches.any(axis=1) | ~targets.any(axis=1)
            if not known.all():
                raise ValueError(self._strange_target(batch, rows, int(np.argmin(known))))
            return np.argmax(scores, axis=0) == _gather(matches.argmax(axis=1))

        right = self._run(is_right, names)
        return {name: {"rank_accuracy": 100 * float(right[name].mean())} for name in names}

    def _label_table(self, names: tuple[str, ...]) -> np.ndarray:
        """Returns the tokens of every label as [K, labels, L], indexed by bank row; 0 is padding.

        L is the length of the longest label, which may differ from the length of the targets.
        """
        runs, label_ids = self._converter.runs, {}
        for name in names:
            feature = self._tasks[name].output_features["targets"]
            eos = [feature.vocabulary.eos_id] * feature.add_eos
            texts = labels_of(self._tasks[name])
            label_ids[name] = [feature.vocabulary.encode(text) + eos for text in texts]
        most = max(len(labels) for labels in label_ids.values())
        longest = max(len(ids) for labels in label_ids.values() for ids in labels)
        table = np.zeros([runs.num_rows, most, longest], np.int32)
        for name, labels in label_ids.items():
            for column, ids in enumerate(labels):
                table[runs.row(name), column, : len(ids)] = ids
        return table

    def _strange_target(self, batch: Batch, rows: np.ndarray, index: int) -> str:
        name = self._converter.runs.run_names[rows[index]]
        vocabulary = self._tasks[name].output_features["targets"].vocabulary
        target = vocabulary.decode(batch["decoder_target_tokens"][index].tolist())
        return (
            f"Task {name!r} declares the labels {labels_of(self._tasks[name])}, but an example "
            f"has the target {target!r}. Correct the labels or the targets."
        )


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
    validation.check_runs(tasks, converter)
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


class _Joining:
    """Wrapper of a SeqIO logger that adds extra metrics to those that SeqIO computed."""

    def __init__(self, logger: Any, extra: Mapping[str, Mapping[str, float]]):
        self._logger, self._extra = logger, extra

    def __call__(self, *, task_name: str, metrics: Mapping[str, Any], **rest: Any) -> None:
        extra = {k: seqio.metrics.Scalar(v) for k, v in self._extra.get(task_name, {}).items()}  # type: ignore[attr-defined]
        self._logger(task_name=task_name, metrics={**metrics, **extra}, **rest)


def _widened(tokens: np.ndarray, width: int) -> np.ndarray:
    missing = width - tokens.shape[-1]
    return np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, missing)])


def _with_targets(batch: Batch, tokens: np.ndarray, rows: np.ndarray) -> Batch:
    """Returns `batch` with the targets `tokens` [B, L]; `rows` [B] are the bank rows."""
    weights = (tokens != 0).astype(np.int32)
    return {
        **batch,
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": np.pad(tokens, [(0, 0), (1, 0)])[:, :-1],
        "decoder_loss_weights": weights,
        "decoder_task_ids": weights * rows[:, None].astype(np.int32),
    }


def _gather(rows: Any) -> np.ndarray:
    """Returns the rows of all hosts, in the order of the hosts."""
    if jax.process_count() == 1:
        return np.asarray(rows)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are single numbers."""
    values = {name: np.asarray(getattr(value, "value", value)) for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in values.items()
        if value.ndim == 0 and np.issubdtype(value.dtype, np.number)
    }

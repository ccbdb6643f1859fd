"""Checks of a `DatasetConfig` against its tasks and its feature converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import unknown_name
from mpt_jax.data import labels, task_lookup, token_reading
from mpt_jax.data.classes import is_image_task
from mpt_jax.data.sampling import TaskMixture

# A file system allows names of 255 bytes, and the longest suffix that a file of a task gets is
# `-predict_with_aux.jsonl-00000-of-00001.partial_of` with a temporary name's.
LONGEST_NAME = 255 - 64
_FEATURES = {"inputs", "targets"}


def check_settings(cfg: Any, setting: str, num_shards: int) -> None:
    """Checks a `DatasetConfig` against the devices and the file system; reads no data.

    Args:
        cfg: the `DatasetConfig`.
        setting: the macro that sets its batch size, for errors.
        num_shards: the number of shards that the rows of a batch are split into.

    Raises:
        ValueError: the batch size is not a multiple of `num_shards`; `task_feature_lengths` has
            features other than inputs and targets, or a limit below 1; the offline cache of a task
            does not exist; or the name of a task is too long for a file name.
    """
    if cfg.batch_size % num_shards:
        raise ValueError(
            f"A batch of {cfg.batch_size} rows cannot be divided evenly over the {num_shards} "
            "shards of the mesh (devices / num_partitions). Set "
            f"{setting} so that a batch has a multiple of {num_shards} rows, such as "
            f"{cfg.batch_size // num_shards * num_shards or num_shards}, or use fewer devices."
        )
    limits, tasks = cfg.task_feature_lengths, seqio.get_subtasks(cfg.provider())
    if all(map(is_image_task, tasks)):
        if limits or cfg.by_length:
            raise ValueError(
                f"The tasks {abbreviate([task.name for task in tasks])} are image tasks, so "
                f"task_feature_lengths = {dict(limits or {})} and by_length = {cfg.by_length} "
                "would have no effect. Use a stage for images, such as gin/coop_target.gin, with "
                "TASK_FEATURE_LENGTHS = {} and without gin/runs/by_length.gin."
            )
    elif limits is not None and (set(limits) != _FEATURES or min(limits.values()) < 1):
        raise ValueError(
            f"DatasetConfig.task_feature_lengths must have a limit of at least 1 for 'inputs' and "
            f"for 'targets', got {dict(limits)}. Set TASK_FEATURE_LENGTHS, for example to "
            "{'inputs': 256, 'targets': 16}."
        )
    for task in tasks:
        if cfg.use_cached and not task.cache_dir:
            raise ValueError(
                f"DatasetConfig.use_cached is True, but no offline cache of task {task.name!r} "
                "exists in the folders of --seqio_additional_cache_dirs. Add the folder of its "
                "cache to this flag, or set USE_CACHED_TASKS = False."
            )
        if (size := len(task.name.encode())) > LONGEST_NAME:
            raise ValueError(
                f"The run name {task.name[:40]!r}... has {size} bytes, but it is part of file "
                f"names, so it may have at most {LONGEST_NAME}. Shorten the name."
            )


def check_vocabularies(cfg: Any, model: Any) -> None:
    """Raises ValueError if a task of texts has another vocabulary than the model: its token ids
    would stand for other pieces of text.

    Args:
        cfg: the `DatasetConfig`, or T5X's.
        model: the model; its vocabularies are None if they are unknown or, for images, if no
            feature of a task has them.
    """
    expected = {"inputs": model.input_vocabulary, "targets": model.output_vocabulary}
    provider = seqio.maybe_get_mixture_or_task(cfg.mixture_or_task_name)
    for task in seqio.get_subtasks(provider):
        for name, vocabulary in expected.items():
            found = task.output_features.get(name)
            if found is None or vocabulary is None or found.vocabulary == vocabulary:
                continue
            raise ValueError(
                f"The task {task.name!r} has the vocabulary {found.vocabulary} for {name}, and the "
                f"model has {vocabulary}. Register the task with the vocabulary of its backbone, "
                "or bind VOCABULARY to that of the task."
            )


def check_config(cfg: Any, provider: Any, converter: Any, hosts: int, endless: bool) -> None:
    """Raises ValueError for settings that would fail later with a less clear message.

    Args:
        cfg: the `DatasetConfig`.
        provider: the task or mixture of the `DatasetConfig`.
        converter: the feature converter.
        hosts: number of hosts that share each batch.
        endless: whether the dataset is endless, which means that it is for training.
    """
    if cfg.batch_size % hosts:
        raise ValueError(
            f"DatasetConfig.batch_size must be a multiple of the number of hosts ({hosts}), got "
            f"{cfg.batch_size}. Use {cfg.batch_size // hosts * hosts or hosts}, for example."
        )
    if cfg.task_feature_lengths is None:
        raise ValueError(
            "DatasetConfig.task_feature_lengths is None, but batches need limits on inputs and "
            "targets. Bind TASK_FEATURE_LENGTHS, for example to {'inputs': 256, 'targets': 16}."
        )
    if endless and cfg.seed is None:
        raise ValueError(
            "DatasetConfig.seed is None, but training needs a seed. Bind DatasetConfig.seed, for "
            "example to %RANDOM_SEED."
        )
    if endless and isinstance(provider, TaskMixture):
        sampler = provider.sampler
        if sampler.batch_size != cfg.batch_size and not cfg.pack:
            raise ValueError(
                f"DatasetConfig.batch_size is {cfg.batch_size}, but "
                f"{type(sampler).__name__}.batch_size is {sampler.batch_size}. Bind both "
                "to the same macro, such as BATCH_SIZE."
            )
    augmentation = getattr(converter, "augmentation", None)
    if endless and augmentation is not None and not isinstance(provider, TaskMixture):
        raise ValueError(
            f"{provider.name!r} is not a TaskMixture, so its images have no pass numbers and would "
            "not be augmented. Set MIXTURE_OR_TASK_NAME = @sampling.task_mixture(), as "
            "gin/runs/train.gin does, or AUGMENTATION = None."
        )
    runs = getattr(converter, "runs", None)
    if endless and cfg.pack and runs is not None and runs.num_groups > 1:
        raise ValueError(
            f"Packing gives the {runs.num_groups} groups of this job uneven shares of each batch, "
            "so they would not train as in solo jobs. Drop --gin_file=gin/runs/packed.gin (set "
            "DatasetConfig.pack = False), or set GROUPS = 'joint'. gin/runs/by_length.gin also "
            "reduces padding, and keeps the shares even."
        )
    tasks = seqio.get_subtasks(provider)
    if isinstance(provider, seqio.Task):
        task_lookup.check_split(provider, cfg.split)
    elif not any(cfg.split in task.splits for task in tasks):
        raise ValueError(
            f"No task of mixture {provider.name!r} has a {cfg.split!r} split. Set "
            "DatasetConfig.split to a split that at least one of the tasks has."
        )
    check_tasks(tasks, converter, cfg.task_feature_lengths)


def check_tasks(
    tasks: Sequence[Any], converter: Any, task_feature_lengths: Mapping[str, int] | None
) -> None:
    """Raises ValueError for a task that is not one of the converter's runs, or whose labels cannot
    be used (see `labels.check`)."""
    # Other converters (plain T5 fine-tuning with T5X's gin files) have no runs.
    runs = getattr(converter, "runs", None)
    if runs is not None:
        for task in tasks:
            if task.name not in runs.run_names:
                raise ValueError(
                    f"{unknown_name('run', task.name, runs.run_names)} Every task of a dataset "
                    f"must be a run of the job: add {task.name!r} to RUN_NAMES (by default "
                    "TASK_NAMES), or leave the task out of the dataset."
                )
    for task in tasks:
        if is_image_task(task):
            continue
        labels.check(task, (task_feature_lengths or {}).get("targets"))


def check_lengths(
    overlong: Mapping[str, tuple[int, int]],
    converter: Any,
    task_feature_lengths: Mapping[str, int] | None,
) -> None:
    """Raises ValueError for over-long examples unless the converter truncates them.

    Args:
        overlong: {task: (number of truncated examples, number of all examples)}.
        converter: the feature converter, whose `on_overlong` says whether it truncates.
        task_feature_lengths: the limits, shown in the error.
    """
    cut = {name: counts for name, counts in overlong.items() if counts[0]}
    if not cut or getattr(converter, "on_overlong", "truncate") == "truncate":
        return
    counts = ", ".join(f"{n}: {c} of {total} ({c / total:.2%})" for n, (c, total) in cut.items())
    raise ValueError(
        f"Some examples are longer than task_feature_lengths {dict(task_feature_lengths or {})} "
        f"({counts}). Raise the limits (TASK_FEATURE_LENGTHS), or truncate the examples "
        "(ON_OVERLONG = 'truncate')."
    )


def check_counts(overlong: Mapping[str, tuple[int, int]], cfg: Any, converter: Any) -> None:
    """Raises ValueError if a task has no examples, and checks lengths like `check_lengths`. Also
    logs the numbers of over-long examples.

    Args:
        overlong: {task: (number of truncated examples, number of all examples)}.
        cfg: the `DatasetConfig` that the examples were read with.
        converter: the feature converter; see `check_lengths`.
    """
    empty = [name for name, (_, size) in overlong.items() if not size]
    if empty:
        raise ValueError(
            f"The {cfg.split!r} split of these tasks is empty: {', '.join(empty)}. Leave the tasks "
            "out, or set DatasetConfig.split to another split."
        )
    token_reading.report_lengths(overlong, cfg.split, cfg.task_feature_lengths)
    check_lengths(overlong, converter, cfg.task_feature_lengths)

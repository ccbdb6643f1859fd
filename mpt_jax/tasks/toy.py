"""SeqIO registration of the toy suite: importing this module registers its tasks.

    toy_sst2, toy_mnli, ...        six source and eight target tasks (`toy_tasks`)
    toy_rte_prefixed, ...          target tasks with a prefix or other labels (`toy_variants`)
    toy_boolq_k32_s1, ...          few-shot runs, registered on demand (`few_shot`)
    toy_pretrain                   pretraining data of the tiny backbone

Rows are generated in memory and depend only on the names of the task and the split. All rows of a
split differ.
"""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax.data import fingerprints, in_memory, preprocessors, vocabularies
from mpt_jax.data.preprocessors import output_features
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import few_shot, text_metrics, toy_pretrain
from mpt_jax.tasks.toy_tasks import SOURCE_TASKS, TARGET_TASKS, ToyTask
from mpt_jax.tasks.toy_variants import VARIANTS, Variant
from mpt_jax.tasks.toy_vocabulary import EXTRA_IDS, VOCABULARY_PATH, word_ids

SIZES = {
    "source": {"train": 4000, "validation": 200, "test": 200},
    "target": {"train": 2000, "validation": 200, "test": 200},
}
TASKS = {task.name: task for task in SOURCE_TASKS + TARGET_TASKS}

PRETRAIN_CHUNK = 1024
PRETRAIN_CHUNKS = 4096


# --- rows ------------------------------------------------------------------------------------


@functools.cache
def rows(name: str, split: str) -> tuple[tuple[str, str], ...]:
    """Returns the distinct (inputs, targets) of one split, which depend only on the two names.

    All labels are equally frequent, to within one row.
    """
    task = TASKS[name]
    rng = random.Random(f"{name} {split}")
    size, kinds = SIZES[task.role][split], max(1, len(task.labels))
    room = {label: (size + i) // kinds for i, label in enumerate(task.labels or ("",))}
    distinct: dict[tuple[str, str], None] = {}
    while len(distinct) < size:
        inputs, target = task.make(rng, split)
        label = target if task.labels else ""
        if room[label] and (inputs, target) not in distinct:
            distinct[inputs, target] = None
            room[label] -= 1
    return tuple(rng.sample(list(distinct), size))


def _dataset(pairs: Sequence[tuple[str, str]]) -> tf.data.Dataset:
    inputs, targets = zip(*pairs, strict=True)
    texts: Any = {"inputs": list(inputs), "targets": list(targets)}
    return tf.data.Dataset.from_tensor_slices(texts)


# --- metrics ---------------------------------------------------------------------------------


def label_f1(labels: Sequence[str]) -> text_metrics.Metric:
    """Returns a metric in percent: F1 of the first of two labels, or the mean F1 of more labels."""
    scored = range(1 if len(labels) == 2 else len(labels))

    @text_metrics.named("f1")
    def mean_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        numbers = text_metrics.label_numbers(targets, predictions, labels)
        return text_metrics.f1_of_labels(*numbers, labels, scored)

    return mean_f1


@text_metrics.named("f1", "exact_match")
def text_overlap(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 of predictions as bags of words, and the exact match, in percent."""

    def f1(target: str, prediction: str) -> float:
        left, right = target.split(), prediction.split()
        shared = sum((collections.Counter(left) & collections.Counter(right)).values())
        return 200 * shared / (len(left) + len(right))

    pairs = list(zip(targets, predictions, strict=True))
    return {
        "f1": float(np.mean([f1(t, p) for t, p in pairs])),
        "exact_match": 100 * float(np.mean([t == p for t, p in pairs])),
    }


def metrics_of(task: ToyTask | Variant) -> list:
    """Returns a task's metrics, of which the first selects the best step."""
    if not task.labels:
        return [text_overlap]
    return [
        evaluator.with_labels(text_metrics.accuracy, task.labels),
        label_f1(task.labels),
        text_metrics.invalid_rate(task.labels),
    ]


# --- registration ----------------------------------------------------------------------------


def vocabulary() -> seqio.Vocabulary:
    """Returns the suite's vocabulary."""
    return vocabularies.load(str(VOCABULARY_PATH), extra_ids=EXTRA_IDS)


def _register(task: ToyTask) -> None:
    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # rows are fixed; batches are shuffled downstream
        return _dataset(rows(task.name, split))

    _add(task.name, dataset, SIZES[task.role], preprocessors.finish(task.name), metrics_of(task))


def _register_variant(variant: Variant) -> None:
    """Registers a variant, whose few-shot runs draw the same rows as those of its base task."""
    base, name = variant.base, variant.name

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        return _dataset([variant.told(*row) for row in rows(base.name, split)])

    task = _add(name, dataset, SIZES[base.role], preprocessors.finish(name), metrics_of(variant))
    few_shot.draw_as(task, base.name)


def _add(name: str, dataset: Any, sizes: Any, preprocessors: list, metric_fns: list) -> seqio.Task:
    """Registers a task. `sizes` maps splits to numbers of rows, or only lists the splits."""
    counts = sizes if isinstance(sizes, dict) else None
    source: Any = seqio.FunctionDataSource(dataset, splits=tuple(sizes), num_input_examples=counts)
    # Rows are determined by the code of this library, so their tokens can be cached.
    source.fingerprint = lambda split: [split, fingerprints.describe(dataset)]
    task = in_memory.TextTask(
        name,
        source=source,
        preprocessors=preprocessors,
        output_features=output_features(vocabulary()),
        metric_fns=[text_metrics.of_task(name, metric) for metric in metric_fns],
    )
    seqio.TaskRegistry.add_provider(name, task)
    return task


def pretrain_chunk(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a chunk of pretraining text as zero-padded ids: inputs [n, T], targets [n, L].

    n is `PRETRAIN_CHUNK`; T and L are `toy_pretrain.LENGTHS`.
    """
    rng, ids = random.Random(f"pretrain {number}"), word_ids()
    arrays = [np.zeros((PRETRAIN_CHUNK, n), np.int32) for n in toy_pretrain.LENGTHS.values()]
    for row in range(PRETRAIN_CHUNK):
        for array, text in zip(arrays, toy_pretrain.example(rng), strict=True):
            tokens = [ids[word] for word in text.split()]
            array[row, : len(tokens)] = tokens
    return arrays[0], arrays[1]


def _pretrain_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns the rows of all chunks in order, without padding.

    A chunk is generated when its first row is read, in a few tens of ms.
    """
    del shuffle_files, seed
    first = {"train": 1, "validation": 0}[split]
    chunks = tf.data.Dataset.range(first, PRETRAIN_CHUNKS if split == "train" else 1)

    def make(number: tf.Tensor) -> tf.data.Dataset:
        inputs, targets = tf.numpy_function(
            pretrain_chunk, [number], (tf.int32, tf.int32), stateful=False
        )
        inputs.set_shape([PRETRAIN_CHUNK, toy_pretrain.LENGTHS["inputs"]])
        targets.set_shape([PRETRAIN_CHUNK, toy_pretrain.LENGTHS["targets"]])
        arrays: Any = {"inputs": inputs, "targets": targets}
        return tf.data.Dataset.from_tensor_slices(arrays)

    unpadded = tf.autograph.experimental.do_not_convert(
        lambda row: {name: tf.boolean_mask(ids, ids > 0) for name, ids in row.items()}
    )
    return chunks.flat_map(tf.autograph.experimental.do_not_convert(make)).map(unpadded)


def _prefixed(task: ToyTask) -> list[tuple[str, str]]:
    """Returns the validation rows of a source task, with the textual prefix used in pretraining."""
    prefix = task.name.removeprefix("toy_")
    return [(f"{prefix} : {text}", target) for text, target in rows(task.name, "validation")]


def _register_pretraining() -> None:
    """Registers the pretraining text, and the prefixed source tasks that monitor pretraining."""
    marked = [preprocessors.add_task_id("toy_pretrain"), preprocessors.end_and_limit]
    _add("toy_pretrain", _pretrain_dataset, ("train", "validation"), marked, [])
    for task in SOURCE_TASKS:
        name = task.name.replace("toy_", "toy_pretrain_")

        def dataset(split, shuffle_files, seed=None, task=task) -> tf.data.Dataset:
            del split, shuffle_files, seed
            return _dataset(_prefixed(task))

        sizes = {"validation": SIZES["source"]["validation"]}
        _add(name, dataset, sizes, preprocessors.finish(name), metrics_of(task))
    seqio.MixtureRegistry.add(
        "toy_pretrain_skills",
        [task.name.replace("toy_", "toy_pretrain_") for task in SOURCE_TASKS],
        default_rate=1.0,
    )


def register() -> None:
    """Registers all tasks of the suite."""
    for task in TASKS.values():
        _register(task)
    for variant in VARIANTS:
        _register_variant(variant)
    _register_pretraining()


register()

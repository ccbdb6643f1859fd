"""Mergeable step metrics: named (sum, weight) pairs per bank row, per group, or per batch.

A step returns the pairs as arrays. They are added over microbatches and steps, and `sum / weight`
is computed when metrics are written. Under T5X the same pairs are returned as clu metrics.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from mpt_jax.core.batch import encoder_mask
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Bool, Int
from mpt_jax.models import losses
from mpt_jax.models.token_losses import TokenValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """Sums and weights of means `sum / weight`: per bank row [K], per group [G] or per batch [1].

    Fields are JAX or NumPy arrays, or tracers.
    """

    sum: Any
    weight: Any

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.sum + other.sum, self.weight + other.weight)


StepMetrics = dict[str, Metric]

# Name prefixes of metrics with one entry per group; most others have one per bank row.
BY_GROUP = ("term/", "gradient_norm")
# Name prefix of metrics of a whole batch, which have one entry.
OF_BATCH = "batch/"
# Name prefix of the weights of the candidates that prompts are mixed from.
MIXTURE = "attention"


def task_metrics(
    batch: Batch, tokens: TokenValues, task_ids: Int[Array, "B L"], num_rows: int
) -> StepMetrics:
    """Returns each bank row's cross entropy (nats per token) and accuracy, from `token_values`."""
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    by_row = lambda x: losses.group_sum(x * weights, task_ids, num_rows)  # noqa: E731
    count = by_row(jnp.ones_like(weights))
    return {name: Metric(by_row(tokens[name]), count) for name in ("loss", "token_accuracy")}


def mixture_metrics(
    mixed: losses.MixtureWeights, names: Sequence[str], num_rows: int
) -> StepMetrics:
    """Returns the mean weight of each candidate in the prompts of each bank row.

    Metric names are `attention/<candidate>`, and `attention_entropy` for the weights' entropy in
    nats.

    Args:
        mixed: the mixture weights of a batch.
        names: the names of the J candidates.
        num_rows: K, the number of bank rows.
    """
    present = mixed.present.astype(jnp.float32)
    by_row = lambda x: losses.group_sum(x * present, mixed.task_ids, num_rows)  # noqa: E731
    examples = by_row(jnp.ones_like(present))
    means = {
        f"{MIXTURE}/{name}": Metric(by_row(mixed.weights[..., number]), examples)
        for number, name in enumerate(names)
    }
    shares = mixed.weights / jnp.maximum(mixed.weights.sum(-1, keepdims=True), 1e-30)
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-30))).sum(-1)
    return {**means, f"{MIXTURE}_entropy": Metric(by_row(entropy), examples)}


def batch_metrics(batch: Batch) -> StepMetrics:
    """Returns the fraction of padding in encoder and decoder, and the mean examples per row."""
    encoder = encoder_mask(batch).astype(jnp.float32)
    decoder = (batch["decoder_loss_weights"] > 0).astype(jnp.float32)
    # `decoder_input_tokens` is 0 at the first target of an example.
    begins = decoder * (batch["decoder_input_tokens"] == 0)
    entry = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    return {
        f"{OF_BATCH}encoder_padding": Metric(entry((1 - encoder).sum()), entry(encoder.size)),
        f"{OF_BATCH}decoder_padding": Metric(entry((1 - decoder).sum()), entry(decoder.size)),
        f"{OF_BATCH}examples_per_row": Metric(entry(begins.sum()), entry(len(encoder))),
    }


def term_metrics(sums: losses.Sums, normalizers: losses.Sums) -> StepMetrics:
    """Returns the value of each loss term by group, named `term/<name>`."""
    return {f"term/{name}": Metric(sums[name], normalizers[name]) for name in sums}


def merge(first: StepMetrics, second: StepMetrics) -> StepMetrics:
    """Adds the metrics of two steps."""
    return {name: first[name] + second[name] for name in first}


def mask_groups(metrics: StepMetrics, kept: Bool[Array, " G"], runs: Runs) -> StepMetrics:
    """Zeroes the metrics of all groups except those in `kept`, and of their runs.

    Metrics of a whole batch are unchanged.
    """
    rows = kept[np.asarray(runs.group_of_row)]

    def keep(name: str, metric: Metric) -> Metric:
        if name.startswith(OF_BATCH):
            return metric
        mask = kept if name.startswith(BY_GROUP) else rows
        return Metric(jnp.where(mask, metric.sum, 0.0), jnp.where(mask, metric.weight, 0.0))

    return {name: keep(name, metric) for name, metric in metrics.items()}


def scalars(metrics: StepMetrics, runs: Runs) -> dict[str, float]:
    """Returns the values to write: each metric's overall mean, and its mean per run or group.

    Metrics by bank row (`loss`, `token_accuracy`, mixture weights) have an entry per run, such as
    `loss/<run>`. Loss terms and gradient norms have one per group if there are several. Metrics of
    a whole batch have only the overall mean. Entries whose weight is zero are omitted.
    """
    means: dict[str, float] = {}
    for name, metric in metrics.items():
        total, weight = np.asarray(metric.sum), np.asarray(metric.weight)
        if weight.sum() <= 0:
            continue
        means[name] = float(total.sum() / weight.sum())
        labels = _labels(name, len(total), runs)
        for label, value, count in zip(labels, total, weight, strict=bool(labels)):
            if count > 0:
                means[f"{name}/{label}"] = float(value / count)
    return means


def to_clu(metrics: StepMetrics, runs: Runs) -> dict[str, clu_metrics.Metric]:
    """Returns the metrics as clu metrics, which can be merged across steps and hosts."""
    averages: dict[str, clu_metrics.Metric] = {}
    for name, metric in metrics.items():
        averages[name] = _average(metric.sum.sum(), metric.weight.sum())
        labels = _labels(name, metric.sum.shape[0], runs)
        for index, label in enumerate(labels):
            averages[f"{name}/{label}"] = _average(metric.sum[index], metric.weight[index])
    return averages


def _average(total: Array, count: Array) -> clu_metrics.Metric:
    return clu_metrics.Average(total=total, count=count)  # pyright: ignore[reportCallIssue]


def _labels(name: str, count: int, runs: Runs) -> Sequence[str]:
    if name.startswith(OF_BATCH):
        return ()
    if not name.startswith(BY_GROUP):
        return runs.run_names
    return () if count == 1 else _group_labels(runs)


def _group_labels(runs: Runs) -> tuple[str, ...]:
    """Returns each group's label: the name of its only run; `group_<number>` for several runs."""
    first: dict[int, str] = {}
    for name, group in zip(runs.run_names, runs.group_of_row, strict=True):
        first.setdefault(group, name)
    sizes = collections.Counter(runs.group_of_row)
    return tuple(
        first[group] if sizes[group] == 1 else f"group_{group}" for group in range(len(first))
    )

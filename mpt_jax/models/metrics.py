"""Mergeable step metrics: named (sum, weight) pairs, one entry per bank row or per group.

A step returns arrays; they are added over microbatches and steps and divided when they are
written. Under T5X the same pairs leave as clu metrics.
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

from mpt_jax.core.batch import encoder_positions
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Bool, Int
from mpt_jax.models import losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A mean to be: `sum / weight`, elementwise over rows [K] or groups [G].

    Its fields are arrays, JAX's or NumPy's, or what stands for arrays while JAX traces.
    """

    sum: Any
    weight: Any

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.sum + other.sum, self.weight + other.weight)


StepMetrics = dict[str, Metric]

# Metrics of these names have one entry per group; all others have one per bank row.
BY_GROUP = ("term/", "gradient_norm")
# How full the batch is, which is a matter of no run: one entry.
OF_BATCH = "batch/"
# Weights of the candidates that prompts are mixed from.
MIXTURE = "attention"


def task_metrics(
    batch: Batch, logits: Array, task_ids: Int[Array, "B L"], num_rows: int
) -> StepMetrics:
    """Cross entropy (nats per token) and token accuracy of each bank row, without gradient."""
    logits = jax.lax.stop_gradient(logits)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    weights = weights.astype(jnp.float32)
    cross_entropy, _ = losses.token_losses(logits, targets)
    correct = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
    by_row = lambda x: losses.group_sum(x * weights, task_ids, num_rows)  # noqa: E731
    tokens = by_row(jnp.ones_like(weights))
    return {
        "loss": Metric(by_row(cross_entropy), tokens),
        "token_accuracy": Metric(by_row(correct), tokens),
    }


def mixture_metrics(
    mixed: losses.MixtureWeights, names: Sequence[str], num_rows: int
) -> StepMetrics:
    """The mean weight of each candidate in the prompts of each bank row, `attention/<candidate>`,
    and the entropy of the weights in nats, `attention_entropy`.

    Args:
        mixed: of a batch.
        names: of the J candidates.
        num_rows: K.
    """
    present = mixed.present.astype(jnp.float32)
    by_row = lambda x: losses.group_sum(x * present, mixed.task_ids, num_rows)  # noqa: E731
    examples = by_row(jnp.ones_like(present))
    found = {
        f"{MIXTURE}/{name}": Metric(by_row(mixed.weights[..., number]), examples)
        for number, name in enumerate(names)
    }
    shares = mixed.weights / jnp.maximum(mixed.weights.sum(-1, keepdims=True), 1e-30)
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-30))).sum(-1)
    return {**found, f"{MIXTURE}_entropy": Metric(by_row(entropy), examples)}


def batch_metrics(batch: Batch) -> StepMetrics:
    """The share of encoder and target positions that are padding, and examples per row."""
    encoder = encoder_positions(batch, include_prompt=True)
    decoder = (batch["decoder_loss_weights"] > 0).astype(jnp.float32)
    # An example begins where its targets do: `decoder_input_tokens` holds 0 there.
    begins = decoder * (batch["decoder_input_tokens"] == 0)
    one = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    return {
        f"{OF_BATCH}encoder_padding": Metric(one((1 - encoder).sum()), one(encoder.size)),
        f"{OF_BATCH}decoder_padding": Metric(one((1 - decoder).sum()), one(decoder.size)),
        f"{OF_BATCH}examples_per_row": Metric(one(begins.sum()), one(len(encoder))),
    }


def term_metrics(sums: losses.Sums, weights: losses.Sums) -> StepMetrics:
    """Each loss term by group, under `term/`."""
    return {f"term/{name}": Metric(sums[name], weights[name]) for name in sums}


def merge(first: StepMetrics, second: StepMetrics) -> StepMetrics:
    """Adds two steps' metrics."""
    return {name: first[name] + second[name] for name in first}


def mask_groups(metrics: StepMetrics, kept: Bool[Array, " G"], runs: Runs) -> StepMetrics:
    """Metrics without those of groups that are not kept: they have no weight."""
    rows = kept[np.asarray(runs.group_of_row)]

    def keep(name: str, metric: Metric) -> Metric:
        if name.startswith(OF_BATCH):
            return metric
        mask = kept if name.startswith(BY_GROUP) else rows
        return Metric(jnp.where(mask, metric.sum, 0.0), jnp.where(mask, metric.weight, 0.0))

    return {name: keep(name, metric) for name, metric in metrics.items()}


def scalars(metrics: StepMetrics, runs: Runs) -> dict[str, float]:
    """What is written: the mean over everything, and one entry for each run (or group).

    `loss` and `token_accuracy` get an entry per run, `loss/<run>`; loss terms and gradient norms
    get one per group where there are several; what tells how full batches are has none. Entries
    without weight are left out.
    """
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        total, weight = np.asarray(metric.sum), np.asarray(metric.weight)
        if weight.sum() <= 0:
            continue
        found[name] = float(total.sum() / weight.sum())
        labels = _labels(name, len(total), runs)
        for label, value, count in zip(labels, total, weight, strict=bool(labels)):
            if count > 0:
                found[f"{name}/{label}"] = float(value / count)
    return found


def to_clu(metrics: StepMetrics, runs: Runs) -> dict[str, clu_metrics.Metric]:
    """The same entries as clu metrics, which merge across steps and hosts."""
    found: dict[str, clu_metrics.Metric] = {}
    for name, metric in metrics.items():
        found[name] = _average(metric.sum.sum(), metric.weight.sum())
        labels = _labels(name, metric.sum.shape[0], runs)
        for index, label in enumerate(labels):
            found[f"{name}/{label}"] = _average(metric.sum[index], metric.weight[index])
    return found


def _average(total: Array, count: Array) -> clu_metrics.Metric:
    return clu_metrics.Average(total=total, count=count)  # pyright: ignore[reportCallIssue]


def _labels(name: str, count: int, runs: Runs) -> Sequence[str]:
    if name.startswith(OF_BATCH):
        return ()
    if not name.startswith(BY_GROUP):
        return runs.run_names
    return () if count == 1 else _group_labels(runs)


def _group_labels(runs: Runs) -> tuple[str, ...]:
    """A group's only run, or `group_<number>`, of each group. Banks have thousands of them."""
    first: dict[int, str] = {}
    for name, group in zip(runs.run_names, runs.group_of_row, strict=True):
        first.setdefault(group, name)
    sizes = collections.Counter(runs.group_of_row)
    return tuple(
        first[group] if sizes[group] == 1 else f"group_{group}" for group in range(len(first))
    )

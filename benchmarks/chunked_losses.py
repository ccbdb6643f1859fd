"""Seconds and temporaries of the losses over the vocabulary, in chunks and from whole logits.

    python -m benchmarks.chunked_losses [--rows 8] [--repeats 5] [--out FILE]

Value and gradient with respect to the decoder's states, float32, width of T5-small (512), random
values. The KL is to teachers whose states use the same head. The vocabularies are those of T5 and
of mT5. Both contestants are compiled first, and then take turns in one process. Seconds are medians
of wall time. Temporaries are those of the compiled program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import figures
from mpt_jax.models import token_losses
from mpt_jax.models.objective import Distillation, Objective

WIDTH = 512
LENGTHS, VOCABULARIES = (16, 128), (32_128, 250_112)
OBJECTIVES = {
    "cross entropy": Objective(),
    "cross entropy and KL": Objective(distillation=Distillation(hidden=False)),
}
Values = Callable[..., dict[str, Any]]


def in_chunks(objective: Objective, head: Any, states: Any, teacher: Any, targets: Any) -> Any:
    """Returns the values that training computes."""
    batch = {"decoder_target_tokens": targets}
    return token_losses.token_values(objective, batch, head, states, teacher)


def from_whole_logits(
    objective: Objective, head: Any, states: Any, teacher: Any, targets: Any
) -> Any:
    """Returns the same values from logits [B, L, V]."""
    logits = head(states)
    values = token_losses.values_of_logits(logits, targets)
    if objective.distillation is not None:
        values["kl"] = token_losses.kl_divergence(head(teacher), logits, 1.0)
    return values


CONTESTANTS: dict[str, Values] = {"chunks": in_chunks, "whole": from_whole_logits}


def program(values: Values, objective: Objective, arrays: tuple[Any, ...]) -> Any:
    """Returns the compiled value and gradient of the terms' sum."""

    def total(states: Any, kernel: Any, teacher: Any, targets: Any) -> Any:
        head = lambda x: jnp.einsum("blh,vh->blv", x, kernel)  # noqa: E731
        found = values(objective, head, states, teacher, targets)
        terms = sum(found[term].sum() for term in objective.coefficients())
        return terms, (found["loss"].sum(), found["token_accuracy"].sum())

    return jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*arrays).compile()


def measure(
    objective: Objective, rows: int, length: int, vocabulary: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Returns the seconds, temporaries and gradient of each contestant."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    arrays = (
        draw(rows, length, WIDTH),
        draw(vocabulary, WIDTH) / WIDTH**0.5,
        draw(rows, length, WIDTH),
        jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32),
    )
    programs = {name: program(values, objective, arrays) for name, values in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    outputs: dict[str, Any] = {}
    for turn in range(repeats + 1):  # the first is a warm-up
        for name, run in programs.items():
            before = time.perf_counter()
            outputs[name] = jax.block_until_ready(run(*arrays))
            if turn:
                seconds[name].append(time.perf_counter() - before)
    return {
        name: {
            "median_seconds": statistics.median(seconds[name]),
            "seconds": seconds[name],
            "temporaries_mib": run.memory_analysis().temp_size_in_bytes / 2**20,
            "gradient": np.asarray(outputs[name][1]),
        }
        for name, run in programs.items()
    }


def compare(name: str, rows: int, length: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """Returns the figures of one objective and shape, and the ratios of chunks to whole logits."""
    found = measure(OBJECTIVES[name], rows, length, vocabulary, repeats)
    ours, other = (found[contestant].pop("gradient") for contestant in CONTESTANTS)
    ratio = lambda field: found["chunks"][field] / found["whole"][field]  # noqa: E731
    return {
        "objective": name,
        "targets": length,
        "vocabulary": vocabulary,
        **found,
        "seconds_ratio": ratio("median_seconds"),
        "temporaries_ratio": ratio("temporaries_mib"),
        "largest_relative_difference": float(np.abs(ours - other).max() / np.abs(other).max()),
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with one line per case."""
    header = ["terms", "targets", "vocabulary", "s whole", "s chunks", "ratio"]
    header += ["MiB whole", "MiB chunks", "ratio", "gradients differ by"]
    lines = [
        [
            *(case["objective"], case["targets"], f"{case['vocabulary']:,}"),
            *(case[name]["median_seconds"] for name in ("whole", "chunks")),
            case["seconds_ratio"],
            *(case[name]["temporaries_mib"] for name in ("whole", "chunks")),
            case["temporaries_ratio"],
            case["largest_relative_difference"],
        ]
        for case in cases
    ]
    return figures.table(header, lines)


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [
        compare(name, args.rows, length, vocabulary, args.repeats)
        for name in OBJECTIVES
        for vocabulary in args.vocabularies
        for length in args.lengths
    ]
    print(table(cases))
    settings = {"rows": args.rows, "width": WIDTH, "chunk": token_losses.CHUNK}
    settings |= {"repeats": args.repeats, "jax": jax.__version__, **figures.machine()}
    figures.write({**settings, "cases": cases}, args.out)


if __name__ == "__main__":
    main()

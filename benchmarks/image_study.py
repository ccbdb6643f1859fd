"""The declared comparisons of the study on images, corrected for their number.

    for table in mvlpt mvlpt_parts clip_mpt mvlpt_transfer multilane; do
      mpt-jax paper $table --suite toy
    done
    python -m benchmarks.image_study --root runs/paper/toy_images [--out FILE]

docs/study/vision.md declares them, and the sign that was expected of each, before any ran. A pair
is a seed: the mean over target tasks. p-values are those of paired t-tests, corrected together
(Holm).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks import figures
from mpt_jax.artifacts import artifacts
from mpt_jax.core import schema
from mpt_jax.evaluation.finalize import ARTIFACT
from mpt_jax.experiments import results
from mpt_jax.experiments.paper import image_suites, image_variants
from mpt_jax.experiments.results import Result

MORE, LESS, SAME = "+", "-", "0"
Tables = Mapping[str, Mapping[tuple[str, int | None], Result]]


class Comparison(NamedTuple):
    """New minus old in a table, and the sign that was expected before any run."""

    question: int
    table: str
    new: str
    old: str
    shots: int | None
    expected: str


def _parts(question: int, table: str, shots: int | None, *rows: tuple[str, str, str]) -> list:
    return [Comparison(question, table, new, old, shots, sign) for new, old, sign in rows]


ALONE = "MPT, no distillation"
DECLARED: tuple[Comparison, ...] = (
    *(
        Comparison(1, "mvlpt", f"M{single}", single, shots, MORE)
        for single in ("CoOp", "VPT", "UPT")
        for shots in (1, 5, 20)
    ),
    *_parts(2, "mvlpt", 5, ("MVPT", "MCoOp", MORE)),
    *_parts(
        3,
        "mvlpt_parts",
        5,
        ("MUPT", "MUPT, mixing none", MORE),
        ("MUPT", "M(CoOp + VPT)", MORE),
    ),
    *_parts(4, "mvlpt_parts", 5, ("MUPT", "MUPT, union softmax", MORE)),
    *_parts(5, "mvlpt_parts", 5, ("MUPT", "MUPT from draw 1", LESS)),
    *_parts(
        6,
        "clip_mpt",
        5,
        ("MPT", "shared prompt", MORE),
        ("MPT", "mean of prompts per task", MORE),
        ("MPT", "CoOp + VPT", MORE),
        ("MPT", ALONE, MORE),
        ("MPT, zero-shot teacher", ALONE, MORE),
        (ALONE, "shared prompt", MORE),
        (ALONE, "MPT, factors start at 1, no distillation", SAME),
        (ALONE, "MPT, each layers, no distillation", SAME),
        (ALONE, "MPT, tied layers, no distillation", SAME),
        (ALONE, "MPT, text, no distillation", MORE),
        (ALONE, "MPT, image, no distillation", MORE),
    ),
    *_parts(
        9,
        "multilane",
        None,
        ("10 selectors", "MULTI-LANE", MORE),
        ("1 selector", "MULTI-LANE", LESS),
        ("merged tokens", "MULTI-LANE", LESS),
        ("no drop and replace", "MULTI-LANE", LESS),
        ("features not normalized", "MULTI-LANE", LESS),
        ("loss over all classes", "MULTI-LANE", LESS),
        ("lanes start from the mean", "MULTI-LANE", SAME),
        ("all tasks at once", "MULTI-LANE", SAME),
    ),
)


class Found(NamedTuple):
    """The differences of a comparison, one for each seed."""

    question: int
    what: str
    shots: int | None
    expected: str
    values: list[float]


def main() -> None:
    """Prints all comparisons, and writes them to --out."""
    parser = argparse.ArgumentParser(description="Declared comparisons of the study on images.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    tables = {name: _read(args.root / name) for name in {x.table for x in DECLARED}}
    found = [_difference(tables, x) for x in DECLARED]
    found.append(best_draw(args.root, tables["mvlpt_parts"]))
    found.append(transfer(args.root, _read(args.root / "mvlpt_transfer")))
    found.sort(key=lambda x: x.question)
    rows = summaries(found)
    for row in rows:
        print(
            f"| {row['question']} | {row['what']} | {row['expected']} | {row['mean']:+.2f} "
            f"({row['low']:+.2f} to {row['high']:+.2f}) | {row['p']:.3f} | {row['holm']:.3f} | "
            f"{row['n']} |"
        )
    if args.out is not None:
        figures.write(args.out, {"comparisons": rows})


def summaries(found: Sequence[Found]) -> list[dict]:
    """Returns each comparison's mean with a 95% t-interval, and its p-value, alone and corrected
    for all of them."""
    p_values = [results.p_value(x.values) for x in found]
    rows = []
    for x, p, holm in zip(found, p_values, results.holm(p_values), strict=True):
        mean = results.estimate(x.values)
        shots = "" if x.shots is None else f", k = {x.shots}"
        rows.append(
            {
                "question": x.question,
                "what": f"{x.what}{shots}",
                "expected": x.expected,
                **{name: getattr(mean, name) for name in ("mean", "low", "high", "n")},
                "p": p,
                "holm": holm,
                "values": x.values,
            }
        )
    return rows


def _read(folder: Path) -> dict[tuple[str, int | None], Result]:
    return {(x.method, x.shots): x for x in results.load(folder)}


def _difference(tables: Tables, of: Comparison) -> Found:
    found = tables[of.table]
    values = results.paired(found[of.new, of.shots], found[of.old, of.shots])
    return Found(of.question, f"{of.new} minus {of.old}", of.shots, of.expected, values)


def best_draw(root: Path, found: Mapping[tuple[str, int | None], Result]) -> Found:
    """Returns the mean of three prompts minus the draw with the lowest training loss in the source
    stage, for each seed."""
    (folder,) = root.glob("mvlpt_source_upt_s1-*")
    losses = _source_losses(folder)
    draws = [found[variant.name, 5].means() for variant in image_variants.ONE_DRAW]
    mean = found["MUPT", 5].means()
    best = [
        int(np.argmin([losses[3 * seed + 1 + i] for i in range(3)])) for seed in range(len(mean))
    ]
    values = [mean[seed] - draws[best[seed]][seed] for seed in range(len(mean))]
    return Found(5, "MUPT minus MUPT from the best of three draws", 5, LESS, values)


def _source_losses(folder: Path) -> dict[int, float]:
    """Returns draw -> mean over source tasks of the last training loss."""
    lines = [
        schema.parse(line, f"A line of {folder}/metrics.jsonl")
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    last = [x for x in lines if x["folder"] == "train" and "loss" in x][-1]
    by_draw: dict[int, list[float]] = {}
    for name, value in last.items():
        if name.startswith("loss/"):
            by_draw.setdefault(int(name.rpartition("_s")[2]), []).append(value)
    return {draw: float(np.mean(values)) for draw, values in by_draw.items()}


def transfer(root: Path, found: Mapping[tuple[str, int | None], Result]) -> Found:
    """Returns Spearman's correlation, for each seed, between the gain of a target by a source's
    prompt and the cosine of the prompts of both, over ordered pairs of different tasks."""
    (folder,) = root.glob("single_coop_mvlpt_transfer_s1-*")
    artifact = artifacts.load_artifact(folder / ARTIFACT)
    prompts = np.asarray(artifact.params["text_context/shared"], np.float64)
    unit = prompts.reshape(len(prompts), -1)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    tasks = image_suites.TOY_TRANSFER
    scratch = found["CoOp", 5]

    def correlation(seed: int) -> float:
        gains, cosines = [], []
        row = lambda task: unit[  # noqa: E731
            artifact.runs.group_of_row[artifact.runs.row(image_variants.source_row(task, seed + 1))]
        ]
        for source in tasks:
            started = found[f"CoOp from {source}", 5]
            for target in tasks:
                if target != source:
                    gains.append(started.values(target)[seed] - scratch.values(target)[seed])
                    cosines.append(float(row(source) @ row(target)))
        return float(stats.spearmanr(gains, cosines).statistic)

    values = [correlation(seed) for seed in range(len(scratch.seeds))]
    return Found(7, "Spearman of gain by transfer and cosine of prompts", 5, MORE, values)


if __name__ == "__main__":
    main()

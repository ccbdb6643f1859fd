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
from mpt_jax.experiments.paper import image_suites
from mpt_jax.experiments.paper.image_variants import ONE_DRAW, source_row
from mpt_jax.experiments.results import Result
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.sites import TEXT
from mpt_jax.runtime.exits import exit_with

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


WITHOUT_TEACHERS = "MPT, no distillation"
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
        ("MPT", WITHOUT_TEACHERS, MORE),
        ("MPT, zero-shot teacher", WITHOUT_TEACHERS, MORE),
        (WITHOUT_TEACHERS, "shared prompt", MORE),
        (WITHOUT_TEACHERS, "MPT, factors start at 1, no distillation", SAME),
        (WITHOUT_TEACHERS, "MPT, each layers, no distillation", SAME),
        (WITHOUT_TEACHERS, "MPT, tied layers, no distillation", SAME),
        (WITHOUT_TEACHERS, "MPT, text, no distillation", MORE),
        (WITHOUT_TEACHERS, "MPT, image, no distillation", MORE),
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
    names = {*(x.table for x in DECLARED), "mvlpt_transfer"}
    try:
        tables = {name: _read(args.root / name) for name in sorted(names)}
        found = [_difference(tables, x) for x in DECLARED]
        found += [best_draw(args.root, tables), transfer(args.root, tables)]
    except (ValueError, OSError) as error:
        exit_with("image_study", error)
    found.sort(key=lambda x: x.question)
    rows = summaries(found)
    for x in rows:
        print(
            f"| {x['question']} | {x['what']} | {x['expected']} | {x['mean']:+.2f} "
            f"({x['low']:+.2f} to {x['high']:+.2f}) | {x['p']:.3f} | {x['holm']:.3f} | {x['n']} |"
        )
    figures.write({"comparisons": rows}, args.out)


def summaries(found: Sequence[Found]) -> list[dict]:
    """Returns each comparison's mean with a 95% t-interval, and its raw and Holm-corrected
    p-values."""
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
    new, old = (row(tables, of.table, name, of.shots) for name in (of.new, of.old))
    values = results.paired(new, old)
    return Found(of.question, f"{of.new} minus {of.old}", of.shots, of.expected, values)


def row(tables: Tables, table: str, name: str, shots: int | None) -> Result:
    """Returns a row of a table. Raises ValueError if it was not run."""
    if (name, shots) not in tables[table]:
        raise ValueError(
            f"The table {table} has no results of {name!r} with k = {shots}. Run `mpt-jax paper "
            f"{table} --suite toy` until it finishes."
        )
    return tables[table][name, shots]


def source_stage(root: Path, name: str, table: str) -> Path:
    """Returns the folder of a table's source stage. Raises ValueError if there is not just one."""
    folders = sorted(root.glob(f"{name}_s1-*"))
    if len(folders) != 1:
        shown = ", ".join(x.name for x in folders) or "none"
        raise ValueError(
            f"{root} should have one source stage {name}_s1-..., and has {shown}. Run `mpt-jax "
            f"paper {table} --suite toy` with one number of seeds."
        )
    return folders[0]


def best_draw(root: Path, tables: Tables) -> Found:
    """Returns the mean of three prompts minus the draw with the lowest training loss in the source
    stage, for each seed."""
    losses = _source_losses(source_stage(root, "mvlpt_source_upt", "mvlpt_parts"))
    means = lambda name: row(tables, "mvlpt_parts", name, 5).means()  # noqa: E731
    draws = [means(variant.name) for variant in ONE_DRAW]
    mean = means("MUPT")
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


def transfer(root: Path, tables: Tables) -> Found:
    """Returns Spearman's correlation, for each seed, between the gain of a target by a source's
    prompt and the cosine of the prompts of both, over ordered pairs of different tasks. Seeds are
    the units; in the report, whose test permutes tasks, tasks are."""
    folder = source_stage(root, "single_coop_mvlpt_transfer", "mvlpt_transfer")
    artifact = artifacts.load_artifact(folder / ARTIFACT)
    context = artifact.method.parts[TEXT]
    prompts = materialize(context, artifact.params[TEXT], artifact.runs)
    unit = np.asarray(prompts, np.float64).reshape(len(prompts), -1)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    tasks = image_suites.TOY_TRANSFER
    scratch = row(tables, "mvlpt_transfer", "CoOp", 5)

    def correlation(seed: int) -> float:
        gains, cosines = [], []
        of_task = lambda task: unit[artifact.runs.row(source_row(task, seed + 1))]  # noqa: E731
        for source in tasks:
            started = row(tables, "mvlpt_transfer", f"CoOp from {source}", 5)
            for target in tasks:
                if target != source:
                    gains.append(started.values(target)[seed] - scratch.values(target)[seed])
                    cosines.append(float(of_task(source) @ of_task(target)))
        return float(stats.spearmanr(gains, cosines).statistic)

    values = [correlation(seed) for seed in range(len(scratch.seeds))]
    return Found(7, "Spearman of gain by transfer and cosine of prompts", 5, MORE, values)


if __name__ == "__main__":
    main()

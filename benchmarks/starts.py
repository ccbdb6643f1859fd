"""What a new task starts from: accuracy of MPT's starts before any training, on the toy suite.

    python -m benchmarks.starts --artifacts runs/tiny/mpt_source/artifact [...] [--out FILE]

For every artifact of a source stage: the prompts of its tasks on those tasks, and on source and
target tasks the averages of factors, the average of products, and the factors of one task. Test
split, decoded greedily, no training step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from benchmarks import figures
from mpt_jax.experiments import demo, results
from mpt_jax.experiments.stages import Stage, quoted, target_runs
from mpt_jax.runtime import compilation_cache, paths
from mpt_jax.runtime.files import read_json

TARGETS = ("toy_boolq", "toy_cb", "toy_rte", "toy_mrpc", "toy_scitail")
FILES = ("gin/eval.gin", "gin/methods/mpt.gin", "gin/tiny.gin")


class Start(NamedTuple):
    """A start of new tasks, by its name in the output, and the bindings that select it."""

    name: str
    bindings: tuple[str, ...]
    tasks: tuple[str, ...] = (*demo.SOURCES, *TARGETS)


STARTS = (
    Start("own prompts", ('START_FROM = "same"',), demo.SOURCES),
    Start("averages of factors", ('START_FROM = "average"', 'AVERAGE_OF = "factors"')),
    Start("average of products", ('START_FROM = "average"', 'AVERAGE_OF = "products"')),
    Start("from toy_mnli", ('START_FROM = "toy_mnli"',)),
)


def main() -> None:
    """Prints the scores of each start, decoded and with labels ranked, on average over the
    artifacts, and writes all to --out."""
    parser = argparse.ArgumentParser(description="Scores of MPT's starts before training.")
    parser.add_argument("--artifacts", nargs="+", required=True, help="artifacts of source stages")
    parser.add_argument("--root", type=Path, default=Path(paths.root()) / "starts")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    compilation_cache.enable()
    found = [
        {
            "artifact": artifact,
            "start": start.name,
            "scores": scores(args.root, artifact, start),
        }
        for artifact in args.artifacts
        for start in STARTS
    ]
    header = ["start", "source tasks", "ranked", "target tasks", "ranked", "artifacts"]
    print(figures.table(header, [row(start, found) for start in STARTS]))
    figures.write({"starts": found}, args.out)


def scores(root: Path, artifact: str, start: Start) -> dict[str, dict[str, float]]:
    """Returns task -> metric -> score with the prompts of a start."""
    bindings = (
        f"TARGET_TASKS = {quoted(start.tasks)}",
        'GROUPS = "independent"',
        f"INITIAL_ARTIFACT = {quoted(str(Path(artifact).absolute()))}",
        'utils.DatasetConfig.split = "test"',
        *start.bindings,
    )
    runs = target_runs(start.tasks, (0,), None)
    digest = read_json(epath.Path(artifact) / "config.json")["prompts_sha256"]
    stage = Stage(
        f"{digest[:12]}/{start.name.replace(' ', '_')}", FILES, bindings, runs, entry="eval"
    )
    if not stage.is_done(root):
        stage.run(root)
    return results.read_scores(root / stage.name, list(start.tasks))


def row(start: Start, found: list[dict[str, Any]]) -> list[Any]:
    """Returns a start's mean scores on source and target tasks, over all artifacts: main metrics,
    and with labels ranked, on the tasks that have labels."""
    of_start = [each["scores"] for each in found if each["start"] == start.name]
    cells = []
    for tasks in (demo.SOURCES, TARGETS):
        by_task = [each[task] for each in of_start for task in tasks if task in start.tasks]
        main = [each[results.main_metric(each)] for each in by_task]
        ranked = [each[results.RANKED] for each in by_task if results.RANKED in each]
        cells += [f"{np.mean(values):.1f}" if values else "" for values in (main, ranked)]
    return [start.name, *cells, len(of_start)]


if __name__ == "__main__":
    main()

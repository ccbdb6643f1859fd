"""Three stages that are killed again and again, beside three that are left alone.

    python -m benchmarks.reliability [--kills 50] [--root FOLDER] \\
      [--out docs/benchmarks/reliability.json]

Teachers, source and target stage of the toy suite, one after another, each from what the killed one
before it handed on. Each is killed (SIGKILL) at random moments: while it starts, between saves, and
while a save is being written; then the same command goes on. At the end the prompts are compared,
bit by bit, with those of stages that nothing happened to.

Every kill is a line of ROOT/kills.jsonl. The script may itself be stopped at any time: the same
command goes on with the kills that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import figures
from mpt_jax import artefacts
from mpt_jax.lock import FILE as LOCK
from mpt_jax.tree import flatten

SOURCES = {"SOURCE_TASKS": "['toy_sst2', 'toy_mnli']"}
STAGES = {"pt_source": SOURCES, "mpt_source": SOURCES, "mpt_target": {}}  # and their own settings
STEPS, SAVE_PERIOD = 1000, 20
SETTINGS = {
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": STEPS,
    "SAVE_PERIOD": SAVE_PERIOD,
    "EVAL_PERIOD": 100,
    "EVAL_STEPS": 1,
    "EVALUATOR_NUM_EXAMPLES": 8,
    "STATS_PERIOD": 1,  # the last step before a kill is in the metrics
}
# How often a kill is aimed at each: within the start, anywhere, within a save.
AIMS = {"start": 0.1, "anywhere": 0.5, "save": 0.4}
POLL_SECONDS = 0.005
SAVING = "checkpoint_*.orbax-checkpoint-tmp*"


@dataclasses.dataclass
class Kill:
    """One kill.

    Attributes:
        stage: which stage.
        aim: the moment that was waited for.
        step: the last step whose metrics were written.
        saved: the last complete checkpoint; the run goes on from there.
        saving: whether a save was left unfinished.
    """

    stage: str
    aim: str
    step: int
    saved: int
    saving: bool

    @property
    def lost(self) -> int:
        """Steps taken again: at most a period, and what was taken while a save was written."""
        return max(0, self.step - self.saved)


@contextlib.contextmanager
def started(root: Path, stage: str) -> Iterator[subprocess.Popen]:
    """A stage as its command line starts it, below a root; its log is appended to a file there."""
    given = [f"--gin.{name}={value}" for name, value in (SETTINGS | STAGES[stage]).items()]
    command = [sys.executable, "-m", "mpt_jax.train", f"--gin_file=gin/{stage}.gin"]
    environment = os.environ | {"MPT_JAX_ROOT": str(root)}
    root.mkdir(parents=True, exist_ok=True)
    with (
        (root / f"{stage}.log").open("a") as log,
        subprocess.Popen(
            [*command, "--gin_file=gin/tiny.gin", *given], env=environment, stderr=log, stdout=log
        ) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


def folder(root: Path, stage: str) -> Path:
    """A stage's MODEL_DIR."""
    return root / "tiny" / stage


def complete(model_dir: Path) -> set[int]:
    """Steps of the complete checkpoints."""
    names = (path.name.removeprefix("checkpoint_") for path in model_dir.glob("checkpoint_*"))
    return {int(name) for name in names if name.isdigit()}


def last_step(model_dir: Path) -> int:
    """The last training step whose metrics are written; 0 before the first."""
    path = model_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    steps = [line["step"] for line in map(json.loads, whole) if line["folder"] == "train"]
    return steps[-1] if steps else 0


def wait_for(child: subprocess.Popen, model_dir: Path, aim: str, rng: random.Random) -> bool:
    """Waits for the moment of a kill; False where the run ended before it."""
    if aim == "start":
        end = time.monotonic() + rng.uniform(0, 10)
        while child.poll() is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return child.poll() is None
    saved, wanted, new = complete(model_dir), rng.randint(1, 3), set()
    unfinished = set(model_dir.glob(SAVING))  # of the kill before
    while child.poll() is None:
        new |= complete(model_dir) - saved  # the run itself removes the oldest
        if aim == "anywhere" and new:
            time.sleep(rng.uniform(0, 1.5))
            return child.poll() is None
        if aim == "save" and len(new) >= wanted and set(model_dir.glob(SAVING)) - unfinished:
            time.sleep(rng.uniform(0, 0.1))
            return child.poll() is None
        time.sleep(POLL_SECONDS)
    return False


def run_killed(root: Path, stage: str, quota: int, kills: list[Kill], seed: int) -> None:
    """Runs a stage to its end, killing it until it has its quota of kills.

    Raises:
        RuntimeError: the stage failed by itself.
    """
    model_dir, rng = folder(root, stage), random.Random(f"{seed} {stage} {len(kills)}")
    while True:
        missing = quota - sum(kill.stage == stage for kill in kills)
        with started(root, stage) as child:
            aim = rng.choices(list(AIMS), list(AIMS.values()))[0]
            if missing > 0 and wait_for(child, model_dir, aim, rng):
                child.send_signal(signal.SIGKILL)
            code = child.wait()
        if code == 0:
            return
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{stage} ended with code {code}; see {root / stage}.log.")
        saved = max(complete(model_dir), default=0)
        unfinished = any(model_dir.glob(SAVING))
        kill = Kill(stage, aim, last_step(model_dir), saved, unfinished)
        kills.append(kill)
        with (root / "kills.jsonl").open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(kill)) + "\n")
        print(f"{len(kills)}. {kill}", flush=True)


def resumed_from(model_dir: Path) -> list[int]:
    """The first step of every start that got so far as to say it."""
    lines = (model_dir / "run.jsonl").read_text().splitlines()
    return [json.loads(line)["first_step"] for line in lines]


def from_the_last_save(starts: list[int], saved: list[int]) -> bool:
    """Whether every start went on from what was saved last, and the last start of all, which was
    not killed, from the last. One that was killed very early does not say where it began."""
    expected = iter([0, *saved])
    return all(start in expected for start in starts) and starts[-1] == [0, *saved][-1]


def same_prompts(one: Path, other: Path) -> bool:
    """Whether two stages handed on the same bits."""
    first, second = (flatten(artefacts.load_artefact(p / "artefact").params) for p in (one, other))
    same = [np.asarray(first[k]).tobytes() == np.asarray(second[k]).tobytes() for k in first]
    return first.keys() == second.keys() and all(same)


def left_over(model_dir: Path) -> list[str]:
    """What a finished run should not leave: unfinished saves, hidden files, its lock."""
    found = [str(path.relative_to(model_dir)) for path in model_dir.rglob("*")]
    return [name for name in found if "tmp" in name or "/." in f"/{name}" or name == LOCK]


def summary(root: Path, kills: list[Kill]) -> dict[str, object]:
    """The figures; see the names."""
    stages = {}
    for stage in STAGES:
        model_dir = folder(root / "killed", stage)
        mine = [kill for kill in kills if kill.stage == stage]
        starts = resumed_from(model_dir)
        stages[stage] = {
            "kills": len(mine),
            "same_bits": same_prompts(folder(root / "whole", stage), model_dir),
            "resumed_from": starts,
            "always_from_the_last_save": from_the_last_save(starts, [k.saved for k in mine]),
            "left_over": left_over(model_dir),
        }
    lost = [kill.lost for kill in kills]
    return {
        "kills": len(kills),
        "by_aim": {aim: sum(kill.aim == aim for kill in kills) for aim in AIMS},
        "save_left_unfinished": sum(kill.saving for kill in kills),
        "steps": STEPS,
        "save_period": SAVE_PERIOD,
        "steps_lost": {"median": statistics.median(lost), "most": max(lost), "all": lost},
        "lost_more_than_a_period": [
            dataclasses.asdict(kill) for kill in kills if kill.lost > SAVE_PERIOD
        ],
        "stages": stages,
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Prints the figures and, on request, writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs") / "reliability")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    root: Path = arguments.root
    for stage in STAGES:
        if not (folder(root / "whole", stage) / "artefact").is_dir():
            with started(root / "whole", stage) as child:
                if code := child.wait():
                    raise RuntimeError(f"{stage} ended with code {code}; see its log in {root}.")
    record = root / "killed" / "kills.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    kills = [Kill(**json.loads(line)) for line in lines]
    for number, stage in enumerate(STAGES):
        before = sum(kill.stage in list(STAGES)[:number] for kill in kills)
        quota = round((arguments.kills - before) / (len(STAGES) - number))
        if not (folder(root / "killed", stage) / "artefact").is_dir():
            run_killed(root / "killed", stage, quota, kills, arguments.seed)
    figures.report(summary(root, kills), arguments.out)


if __name__ == "__main__":
    main()

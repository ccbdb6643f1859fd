"""Comparison of three stages, repeatedly killed and resumed, with the same stages left undisturbed.

    python -m benchmarks.reliability [--kills 50] [--root FOLDER] \\
      [--out docs/benchmarks/reliability.json]

Teachers, source and target stage of the toy suite run one after another, each from the artifact of
the killed stage before it. Each is killed (SIGKILL) at random moments: about a third of the kills
come during the start (before its first new save), a third between saves, and a third while a save
is being written. Then the same command resumes the stage. At the end its prompts are compared, bit
by bit, with the prompts of the undisturbed stage.

Every kill is a line of ROOT/killed/kills.jsonl. The script itself may be stopped at any time. The
same command continues with the missing kills.
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
from mpt_jax.artifacts import artifacts
from mpt_jax.checkpointing.run_lock import FILE as LOCK
from mpt_jax.core.tree import flatten

SOURCES = {"SOURCE_TASKS": "['toy_sst2', 'toy_mnli']"}
# Stage -> its own settings.
STAGES = {"pt_source": SOURCES, "mpt_source": SOURCES, "mpt_target": {}}
STEPS, SAVE_PERIOD = 1000, 20
SETTINGS = {
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": STEPS,
    "SAVE_PERIOD": SAVE_PERIOD,
    "EVAL_PERIOD": 100,
    "EVAL_STEPS": 1,
    "EVALUATOR_NUM_EXAMPLES": 8,
    "STATS_PERIOD": 1,  # so that metrics contain the last step before a kill
}
# Moments of a kill: before the first new save, between saves, or during a save.
MOMENTS = ("start", "between", "save")
POLL_SECONDS = 0.005
SAVING = "checkpoint_*.orbax-checkpoint-tmp*"


@dataclasses.dataclass
class Kill:
    """One kill.

    Attributes:
        stage: the stage.
        aim: the intended moment, of `MOMENTS`.
        moment: the actual moment; the stage may have been faster than the kill.
        step: the last step in the metrics of this start, or the step it resumed from.
        saved: step of the last complete checkpoint, from which the stage resumes.
        saving: whether a save was left unfinished.
    """

    stage: str
    aim: str
    moment: str
    step: int
    saved: int
    saving: bool

    @property
    def lost(self) -> int:
        """Repeated steps: at most a save period, plus steps taken while a save was written."""
        return max(0, self.step - self.saved)


@contextlib.contextmanager
def started(root: Path, stage: str) -> Iterator[subprocess.Popen]:
    """Starts a stage's command line below a root. Its log is appended to a file in the root."""
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
    """Returns a stage's MODEL_DIR."""
    return root / "tiny" / stage


def complete(model_dir: Path) -> set[int]:
    """Returns the steps of the complete checkpoints."""
    names = (path.name.removeprefix("checkpoint_") for path in model_dir.glob("checkpoint_*"))
    return {int(name) for name in names if name.isdigit()}


def last_step(model_dir: Path) -> int:
    """Returns the last training step in the metrics; 0 if there is none."""
    path = model_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    steps = [line["step"] for line in map(json.loads, whole) if line["folder"] == "train"]
    return steps[-1] if steps else 0


def stamp(model_dir: Path) -> tuple[int, int] | None:
    """Returns a value that changes when the metrics file changes."""
    path = model_dir / "metrics.jsonl"
    found = path.stat() if path.exists() else None
    return None if found is None else (found.st_size, found.st_mtime_ns)


@dataclasses.dataclass
class Watch:
    """Monitor of a MODEL_DIR during one start. Create it just before the start.

    Attributes:
        new: steps of new complete checkpoints, including those that have been removed since.
        saving: whether a checkpoint is being written.
        start: seconds until the first save was seen; None before.
    """

    model_dir: Path

    def __post_init__(self):
        self._before = complete(self.model_dir)
        self._left = set(self.model_dir.glob(SAVING))  # left by the previous kill
        self._metrics = stamp(self.model_dir)
        self.new: set[int] = set()
        self.saving = False
        self.start: float | None = None
        self._began = time.monotonic()

    def look(self) -> Watch:
        """Updates the state, and returns the monitor."""
        self.saving = bool(set(self.model_dir.glob(SAVING)) - self._left)
        self.new |= complete(self.model_dir) - self._before
        if self.start is None and self.moment != "start":
            self.start = time.monotonic() - self._began
        return self

    @property
    def last_step(self) -> int | None:
        """The last step in the metrics of this start; None before the first."""
        return None if stamp(self.model_dir) == self._metrics else last_step(self.model_dir)

    @property
    def moment(self) -> str:
        """One of `MOMENTS`, at the last look. During the first save it is already 'save'."""
        return "save" if self.saving else "between" if self.new else "start"


def wait_for(
    child: subprocess.Popen, watch: Watch, aim: str, rng: random.Random, start: float
) -> None:
    """Waits for the moment of a kill, or until the stage has ended.

    Args:
        child: process of the stage.
        watch: monitor of its MODEL_DIR.
        aim: the moment to wait for, of `MOMENTS`.
        rng: random numbers for the exact time.
        start: seconds that the fastest start took until its first save.
    """
    began, after = time.monotonic(), rng.uniform(0, start)
    wanted, pause = rng.randint(1, 3), rng.uniform(0, 1.5 if aim == "between" else 0.1)
    while child.poll() is None:
        watch.look()
        if aim == "start" and (watch.moment != "start" or time.monotonic() - began >= after):
            return
        if aim == "save" and watch.saving and len(watch.new) >= wanted:
            time.sleep(pause)
            return
        if aim == "between" and watch.moment == "between" and len(watch.new) >= wanted:
            if pause <= 0:
                return
            pause -= POLL_SECONDS
        time.sleep(POLL_SECONDS)


def next_aim(kills: list[Kill], rng: random.Random) -> str:
    """Returns the moment that was hit least often so far."""
    hit = [kill.moment for kill in kills]
    return min(rng.sample(MOMENTS, len(MOMENTS)), key=hit.count)


def start_seconds(root: Path, stage: str) -> Path:
    """Returns the path of the file where `run_whole` records the seconds until the first save."""
    return root / f"{stage}.start_seconds"


def run_whole(root: Path, stage: str) -> None:
    """Runs a stage without kills.

    Raises:
        RuntimeError: the stage failed.
    """
    watch = Watch(folder(root, stage))
    with started(root, stage) as child:
        while child.poll() is None and watch.look().start is None:
            time.sleep(POLL_SECONDS)
        start_seconds(root, stage).write_text(f"{watch.start or 0:.1f}\n")
        if code := child.wait():
            raise RuntimeError(f"{stage} ended with exit code {code}. See {root / stage}.log.")


def run_killed(root: Path, stage: str, quota: int, kills: list[Kill], seed: int) -> None:
    """Runs a stage to its end, killing it until it has its quota of kills.

    Raises:
        RuntimeError: the stage failed for another reason.
    """
    model_dir, rng = folder(root, stage), random.Random(f"{seed} {stage} {len(kills)}")
    start = float(start_seconds(root.parent / "whole", stage).read_text())
    while True:
        missing = quota - sum(kill.stage == stage for kill in kills)
        aim, watch = next_aim(kills, rng), Watch(model_dir)
        with started(root, stage) as child:
            if missing > 0:
                wait_for(child, watch, aim, rng, start)
                child.send_signal(signal.SIGKILL)
            code = child.wait()
        start = min(start, watch.start or start)
        if code == 0:
            return
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{stage} ended with exit code {code}. See {root / stage}.log.")
        saved = max(complete(model_dir), default=0)
        unfinished = any(model_dir.glob(SAVING))
        step = watch.last_step
        step = saved if step is None else step
        kill = Kill(stage, aim, watch.look().moment, step, saved, unfinished)
        kills.append(kill)
        with (root / "kills.jsonl").open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(kill)) + "\n")
        print(f"{len(kills)}. {kill}", flush=True)


def resumed_from(model_dir: Path) -> list[int]:
    """Returns the first step of every start that recorded it."""
    lines = (model_dir / "run.jsonl").read_text().splitlines()
    return [json.loads(line)["first_step"] for line in lines]


def from_the_last_save(starts: list[int], saved: list[int]) -> bool:
    """Whether every start resumed from the last save before it. Starts that were killed very early
    recorded no first step. The final start was not killed, and must resume from the last save."""
    expected = iter([0, *saved])
    return all(start in expected for start in starts) and starts[-1] == [0, *saved][-1]


def same_prompts(one: Path, other: Path) -> bool:
    """Whether two stages wrote bitwise equal prompts."""
    first, second = (flatten(artifacts.load_artifact(p / "artifact").params) for p in (one, other))
    same = [np.asarray(first[k]).tobytes() == np.asarray(second[k]).tobytes() for k in first]
    return first.keys() == second.keys() and all(same)


def left_over(model_dir: Path) -> list[str]:
    """Returns files that a finished stage should not leave: unfinished saves, hidden files, or its
    lock."""
    found = [str(path.relative_to(model_dir)) for path in model_dir.rglob("*")]
    return [name for name in found if "tmp" in name or "/." in f"/{name}" or name == LOCK]


def summary(root: Path, kills: list[Kill]) -> dict[str, object]:
    """Returns the figures by name."""
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
        "by_moment": {name: sum(kill.moment == name for kill in kills) for name in MOMENTS},
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
    """Prints the figures, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description="Kills and resumes stages repeatedly.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs") / "reliability")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    root: Path = arguments.root
    for stage in STAGES:
        if not (folder(root / "whole", stage) / "artifact").is_dir():
            run_whole(root / "whole", stage)
    record = root / "killed" / "kills.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    kills = [Kill(**json.loads(line)) for line in lines]
    for number, stage in enumerate(STAGES):
        before = sum(kill.stage in list(STAGES)[:number] for kill in kills)
        quota = round((arguments.kills - before) / (len(STAGES) - number))
        if not (folder(root / "killed", stage) / "artifact").is_dir():
            run_killed(root / "killed", stage, quota, kills, arguments.seed)
    figures.report(summary(root, kills), arguments.out)


if __name__ == "__main__":
    main()

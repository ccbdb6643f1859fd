"""Moments of kills in benchmarks/reliability.py."""

import dataclasses
import json
import random
import subprocess
import sys
import time

import pytest

from benchmarks import reliability
from benchmarks.reliability import MOMENTS, Kill, Watch

# A run that starts for 0.3 s, and then saves every 0.3 s for 0.1 s.
RUN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
time.sleep(0.3)
for step in range(1, 100):
    unfinished = folder / f"checkpoint_{step}.orbax-checkpoint-tmp"
    unfinished.mkdir()
    time.sleep(0.1)
    unfinished.rename(folder / f"checkpoint_{step}")
    time.sleep(0.2)
"""


def killed(aim: str) -> Kill:
    return Kill("pt_source", aim, aim, 5, 0, False)


@pytest.mark.parametrize("aim", MOMENTS)
def test_wait_for_returns_at_intended_moment(aim, tmp_path):
    (tmp_path / "checkpoint_0").mkdir()
    (tmp_path / "checkpoint_0.orbax-checkpoint-tmp").mkdir()  # of an earlier kill
    hit = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        watch = Watch(folder)
        with subprocess.Popen([sys.executable, "-S", "-c", RUN, str(folder)]) as child:
            reliability.wait_for(child, watch, aim, random.Random(seed), 0.3)
            child.kill()
        hit.append(watch.look().moment)
        assert watch.start is None if hit[-1] == "start" else 0.2 < watch.start < 30
    assert hit.count(aim) >= 2, hit  # a busy machine may miss one


def test_watch_moment_ignores_files_of_earlier_start(tmp_path):
    (tmp_path / "checkpoint_20").mkdir()
    (tmp_path / "checkpoint_40.orbax-checkpoint-tmp").mkdir()
    watch = Watch(tmp_path)
    assert watch.look().moment == "start"
    (tmp_path / "checkpoint_60.orbax-checkpoint-tmp-1").mkdir()
    assert watch.look().moment == "save"
    (tmp_path / "checkpoint_60.orbax-checkpoint-tmp-1").rename(tmp_path / "checkpoint_60")
    assert watch.look().moment == "between"
    (tmp_path / "checkpoint_60").rmdir()
    assert watch.look().new == {60}, "the run removes the oldest checkpoint"


def test_next_aim_distributes_kills_over_moments():
    kills, rng = [], random.Random(0)
    for _ in range(50):
        kills.append(killed(reliability.next_aim(kills, rng)))
    counts = [sum(kill.moment == moment for kill in kills) for moment in MOMENTS]
    assert sorted(counts) == [16, 17, 17]
    # A missed moment is tried again.
    missed = [dataclasses.replace(killed("save"), moment="between")] * 3
    assert reliability.next_aim([*missed, killed("start")], rng) == "save"


def test_watch_last_step_ignores_earlier_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"folder": "train", "step": 35}) + "\n")  # of an earlier start
    watch = Watch(tmp_path)
    assert watch.last_step is None
    time.sleep(0.01)
    with path.open("a") as file:
        file.write(json.dumps({"folder": "train", "step": 22}) + "\n")
    assert watch.last_step == 22


def test_from_the_last_save_checks_every_start():
    assert reliability.from_the_last_save([0, 20, 40], [20, 40])
    assert reliability.from_the_last_save([0, 40], [20, 40]), "one start recorded no step"
    assert not reliability.from_the_last_save([0, 20, 20], [20, 40])
    assert not reliability.from_the_last_save([0, 40, 20], [20, 40])

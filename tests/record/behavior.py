"""What the command lines leave behind, recorded, so that later versions can be compared with it.

    python tests/record/behavior.py write [--only NAME ...] [--t5x FOLDER ...]
    python tests/record/behavior.py check [--only NAME ...] [--t5x FOLDER ...]

Every entry is a few steps on the toy suite, in processes of their own in a temporary folder. Of
arrays the record has bytes (sha256), dtype, shape, mean and root mean square; of texts their
content. `check` says "bits equal", or "bits differ, values within 1e-4" (another processor rounds
differently; TOLERANCES has exceptions), or what differs, and then exits with 1. --t5x puts clones
of T5X, airio and jestimator on PYTHONPATH; without them the entry `t5x` is skipped where T5X is not
installed.

Where the product moves or renames something, names.py follows; the record stays as it was written.
Where defaults change on purpose, it is written again, in a commit that says so. The first record
was of the version before the packages; the last version that was equal to it is 4a9bb60.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from left_behind import REPOSITORY, compare, describe, read_files  # noqa: E402
from names import BINDINGS, COMMANDS  # noqa: E402 - beside this script, however it is started

RECORD = Path(__file__).with_name("behavior.json")
FIXTURES = REPOSITORY / "tests" / "golden" / "before_packages"
SHIPPED = REPOSITORY / "mpt_jax" / "tasks" / "data" / "tiny_t5"

# --- Command lines -------------------------------------------------------------------------------

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MPT_JAX_TRAINER": "own",
    # Bits do not depend on the number of cores, nor on instructions newer than AVX2.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_cpu_max_isa=AVX2",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "COLUMNS": "80",
}


@dataclasses.dataclass
class Place:
    """A temporary folder in which one entry's command lines run.

    Attributes:
        folder: the current folder of the processes; ROOT is `runs` in it.
        t5x: folders that go before the repository on PYTHONPATH, for real T5X.
        cache: of compiled programs, shared by the entries of one call.
    """

    folder: Path
    t5x: list[str]
    cache: Path

    def run(self, command: str, *arguments: str, **variables: str) -> str:
        """Runs a command line; returns what it prints. Raises RuntimeError where it fails."""
        line = [sys.executable, *_command(command), *arguments]
        clones = self.t5x if variables.get("MPT_JAX_TRAINER") == "t5x" else []
        environment = {k: v for k, v in os.environ.items() if k != "MPT_JAX_ROOT"} | ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join([*clones, str(REPOSITORY)])
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.cache)
        child = subprocess.run(
            line,
            cwd=self.folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"{line} ended with {child.returncode}:\n{child.stderr[-4000:]}")
        return child.stdout

    def stage(self, command: str, files: str, **bindings: Any) -> None:
        """Runs gin files of `gin/`, by their names without the suffix, with bindings."""
        self.run(command, *gin_arguments(files.split(), bindings))


def gin_arguments(files: list[str], bindings: dict[str, Any]) -> list[str]:
    """The arguments for gin files and bindings; `__` stands for the dot of a parameter."""
    bound = {name.replace("__", "."): value for name, value in bindings.items()}
    return [f"--gin_file=gin/{name}.gin" for name in files] + [
        f"--gin.{BINDINGS.get(name, name)}={value if _refers(value) else repr(value)}"
        for name, value in bound.items()
    ]


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("%", "@"))


def _command(name: str) -> list[str]:
    if name != "mpt-jax":
        return COMMANDS[name]
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts[name].split(":")
    return ["-c", f"from {module} import {function}; {function}()"]


# --- Entries: each returns what its processes printed --------------------------------------------

QUICK = {"STATS_PERIOD": 1, "EVAL_STEPS": 1, "EVAL_BATCH_SIZE": 8, "EVALUATOR_NUM_EXAMPLES": 8}
# Low, so that another processor's rounding stays below 1e-4.
RATE = {"LEARNING_RATE": 0.03}
SIX = {**QUICK, **RATE, "TRAIN_STEPS": 6, "SAVE_PERIOD": 3, "EVAL_PERIOD": 6, "BATCH_SIZE": 24}
TARGET = {
    **{**QUICK, **RATE, "TASK_LEARNING_RATE": 0.04, "BATCH_SIZE": 24},
    **{"TRAIN_STEPS": 8, "SAVE_PERIOD": 4, "EVAL_PERIOD": 4},
}
FLEET = {
    **{**TARGET, "BATCH_SIZE": 4},
    **{"TARGET_TASKS": ["toy_rte", "toy_cb"], "SHOTS": [4], "SEEDS": [0, 1]},
    **{"PROMPT_LENGTH": 5, "INITIAL_ARTEFACT": None},  # a small fixture
}
PACKED = {"PACKED_ROWS": 6, "PACK_WINDOW": 32}
SIZES = ["--input-length", "48", "--target-length", "8", "--batch-size", "4"]
REQUESTS = [
    {"task": "toy_sst2", "inputs": "sst2 : a fine film"},
    {"task": "toy_none", "inputs": "of no task"},
    {"task": "toy_mnli", "id": "b", "inputs": "mnli : x", "choices": ["neutral", "entailment"]},
    {"task": "toy_boolq", "inputs": "is the knife sold by ben ? | ben has an office in dublin ."},
]


def stage(files: str, **bindings: Any) -> Callable[[Place], str]:
    """An entry that trains one stage."""
    return lambda place: place.stage("train", files, **bindings) or ""


def resume(place: Place) -> str:
    """The command line of `mpt_target`, ended at step 4 and begun again."""
    place.stage("train", "mpt_target tiny", **TARGET, train__total_steps=4)
    place.stage("train", "mpt_target tiny", **TARGET)
    return ""


def resume_fixture(name: str, files: str, bindings: dict[str, Any]) -> Callable[[Place], str]:
    """An entry that goes on with a MODEL_DIR of before the packages."""

    def entry(place: Place) -> str:
        shutil.copytree(FIXTURES / name, place.folder / "runs" / "tiny" / "mpt_target")
        place.stage("train", files, **bindings)
        return ""

    return entry


def read_shipped(command: str, **bindings: Any) -> Callable[[Place], str]:
    """An entry that evaluates the shipped source prompts, or writes what they say."""
    given = {
        "TASK_NAMES": "%SOURCE_TASKS",
        "EVAL_TASKS": ["toy_qqp", "toy_squad"],
        "INITIAL_ARTEFACT": str(SHIPPED / "mpt_source"),
        **bindings,
    }
    return lambda place: place.stage(command, f"{command} methods/mpt tiny", **given) or ""


def predict(prompts: Path) -> Callable[[Place], str]:
    """An entry that answers requests, and scores their choices."""

    def entry(place: Place) -> str:
        path = place.folder / "requests.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
        given = ["--prompts", str(prompts), "--input", path.name, *SIZES]
        place.run("mpt-jax", "predict", *given, "--folded", "--output", "folded.jsonl")
        return place.run("mpt-jax", "predict", *given)

    return entry


def export(place: Place) -> str:
    """Exported files, and what the code of their own README.md says with JAX alone."""
    given = ["--platforms", "cpu", "--input-lengths", "8", "--target-length", "4"]
    shipped = ["--prompts", str(SHIPPED / "mpt_source")]
    said = place.run("mpt-jax", "export", *shipped, "--out", "exported", *given)
    readme = (place.folder / "exported" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    code = f"import os\nos.chdir('exported')\n{code}\nprint(ids.tolist(), scores.tolist())"
    COMMANDS["code"] = ["-c", code]
    return said + place.run("code")


def convert(place: Place) -> str:
    """A T5X checkpoint to Hugging Face and back; prompts to PEFT, NumPy and back."""
    backbone = ["--backbone", str(SHIPPED / "checkpoint_10000")]
    lines = [
        [str(SHIPPED / "checkpoint_10000"), "hf"],
        ["hf", "t5x"],
        [str(SHIPPED / "mpt_source"), "peft"],
        ["peft", "from_peft", *backbone],
        [str(SHIPPED / "mpt_source"), "npy", "--to", "npy"],
    ]
    return "".join(place.run("mpt-jax", "convert", *line) for line in lines)


def t5x(place: Place) -> str:
    """The source stage by the real T5X, whose saves need absolute paths."""
    place.run(
        "t5x.train",
        *gin_arguments(["mpt_source", "tiny"], SIX),
        f"--gin_search_paths={REPOSITORY}",
        MPT_JAX_TRAINER="t5x",
        MPT_JAX_ROOT=str(place.folder / "runs"),
    )
    return ""


def batches(place: Place) -> str:
    """Batches of the source mixture, in a process of its own: see batches.py."""
    COMMANDS["batches"] = [str(Path(__file__).with_name("batches.py").resolve())]
    return place.run("batches")


ENTRIES: dict[str, Callable[[Place], str]] = {
    "batches": batches,
    "mpt_source": stage("mpt_source tiny", **SIX),
    "pt_source": stage("pt_source tiny", **SIX),
    "mpt_target": stage("mpt_target tiny", **TARGET),
    "attempt_target": stage("attempt_target tiny", **SIX),
    "crosspt_target": stage("crosspt_target tiny", **{**SIX, "ANNEALING_STEPS": 4}),
    "packed": stage("mpt_source tiny runs/packed", **SIX, **PACKED),
    "teacher_cache": stage("mpt_source tiny runs/teacher_cache", **SIX),
    "fleet": stage("mpt_target tiny runs/fleet", **FLEET),
    "resume": resume,
    "resume_fixture": resume_fixture(
        "mpt_target",
        "mpt_target tiny",
        # The source prompts that were shipped then.
        {**TARGET, "INITIAL_ARTIFACT": str(FIXTURES / "shipped_mpt_source")},
    ),
    "resume_fixture_fleet": resume_fixture("fleet", "mpt_target tiny runs/fleet", FLEET),
    "load_fixture": predict(FIXTURES / "mpt_target" / "artefact"),
    "eval": read_shipped("eval", seqio__Evaluator__num_examples=40),
    "infer": read_shipped("infer"),
    "predict": predict(SHIPPED / "mpt_source"),
    "export": export,
    "convert": convert,
    "t5x": t5x,
}
# Between two sets of instructions, gradients of ATTEMPT's router at its initial values differ by
# 1.5e-4 of their norm already.
TOLERANCES = {"attempt_target": 1e-3}
# Resuming ends where a run that never stopped ends: the last of each pair against the first. The
# fixtures began with the initial values of the version that wrote them, so the record has their
# end.
SAME_END = [("mpt_target", "resume")]


def run_entry(name: str, t5x_folders: list[str], cache: Path) -> dict[str, Any]:
    """Runs one entry; returns what it left, as JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        said = ENTRIES[name](Place(here, t5x_folders, cache))
        # T5X writes its metrics nowhere else.
        return read_files(here, said, tensorboard=name == "t5x")


def lines_of_files(record: dict[str, Any]) -> str:
    """The record as JSON with a line for each file."""
    entries = []
    for name, files in sorted(record.items()):
        lines = [f"{json.dumps(x)}: {json.dumps(y, sort_keys=True)}" for x, y in files.items()]
        entries.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def missing_t5x(folders: list[str]) -> bool:
    """Whether real T5X can be imported neither from these folders nor as an installed package."""
    if any((Path(folder) / "t5x" / "train.py").is_file() for folder in folders):
        return False
    elsewhere = [p for p in sys.path if p and Path(p).resolve() != REPOSITORY]
    return importlib.machinery.PathFinder.find_spec("t5x", elsewhere) is None


def compare_ends(found: dict[str, Any]) -> list[str]:
    """What differs between a resumed run's prompts and an uninterrupted one's, bit for bit."""
    wrong = []
    for first, second in SAME_END:
        if first in found and second in found:
            ends = [
                {k: v for k, v in found[name].items() if k.endswith("prompts.safetensors")}
                for name in (first, second)
            ]
            if not ends[0] or ends[0] != ends[1]:
                wrong.append(f"{second} does not end with the prompts of {first}")
    return wrong


def main() -> None:
    """Writes the record, or compares with it."""
    parser = argparse.ArgumentParser(description="Records behavior, or compares with the record.")
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("--only", nargs="+", choices=tuple(ENTRIES), default=tuple(ENTRIES))
    parser.add_argument("--t5x", nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found, wrong = {}, collections.Counter()
    with tempfile.TemporaryDirectory() as cache:
        for name in args.only:
            if name == "t5x" and missing_t5x(args.t5x):
                print(f"{name:20} skipped: the real T5X is not importable; see --t5x")
                continue
            started = time.monotonic()
            found[name] = run_entry(name, args.t5x, Path(cache))
            if args.what == "write":
                record[name], said, differences = found[name], "written", []
                RECORD.write_text(lines_of_files(record))
            else:
                within = TOLERANCES.get(name, 1e-4)
                said, differences = compare(record.get(name, {}), found[name], within)
            seconds = time.monotonic() - started
            print(f"{name:20} {said:36} {describe(found[name]):28} {seconds:4.0f} s", flush=True)
            print("".join(f"    {line}\n" for line in differences[:20]), end="", flush=True)
            wrong[name] = len(differences)
    ends = compare_ends(found)
    print("".join(f"{line}\n" for line in ends), end="")
    if ends or sum(wrong.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

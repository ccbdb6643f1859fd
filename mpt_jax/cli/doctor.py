"""`mpt-jax doctor`: checks whether a stage can start on this machine, and suggests fixes.

    mpt-jax doctor                  checks what the paper's stages need: data, backbone, devices
    mpt-jax doctor --suite toy      checks what gin/tiny.gin needs: neither data nor a backbone
    mpt-jax doctor --json           prints JSON, for launch scripts

The exit code is 0 if a stage can start, 1 if there is a problem, and 2 for a mistake on the command
line. Checks that may wait for a device or the network run in a child process, which is killed after
`--timeout` seconds, so the command neither hangs nor holds a device. It does not import TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import mpt_jax
from mpt_jax.cli import shadows
from mpt_jax.cli.probe import Probe, missing_packages
from mpt_jax.config import trainer_choice
from mpt_jax.runtime import compilation_cache, distributed, paths

# TFDS names of the source tasks of gin/runs/tasks.gin. A copy, because `tasks` needs TensorFlow.
SOURCES = (
    "glue/mnli:2.0.0",
    "glue/qqp:2.0.0",
    "glue/qnli:2.0.0",
    "glue/sst2:2.0.0",
    "squad/v1.1:3.0.0",
    "super_glue/record:1.0.2",
)
BACKBONE = ("backbones/t5-base", "google-t5/t5-base")  # as in gin/runs/paths.gin
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow-datasets")
ACCELERATOR_PACKAGES = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
MIN_FREE = 2**30  # bytes; about the size of a T5-base backbone with its cache

_DEVICES = """
import json, jax
devices = jax.local_devices()
print(json.dumps([devices[0].platform, devices[0].device_kind, len(devices)]))
"""
_WRITE = """
import sys
from etils import epath
folder, name = epath.Path(sys.argv[1]), sys.argv[2]
(folder / name).write_text("")
(folder / name).unlink()
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was checked.
        value: What was found.
        problem: What is wrong; '' if nothing is.
        mend: The command or setting that fixes the problem.
    """

    name: str
    value: str
    problem: str = ""
    mend: str = ""


# --- The trainer ---------------------------------------------------------------------------------


def check_trainer() -> Iterator[Finding]:
    """Checks which trainer `python -m t5x.train` runs, and whether it can be imported."""
    try:
        choice = trainer_choice.requested_trainer()
    except ValueError as error:
        yield Finding("trainer", "", str(error), f"unset {trainer_choice.VARIABLE}")
        return
    origins = [Path(str(spec.origin)).resolve() for spec in trainer_choice.all_real()]
    folders = list(dict.fromkeys(origin.parent for origin in origins))
    if choice == "own" or not folders:
        value = f"mpt_jax {mpt_jax.__version__}, from {Path(mpt_jax.__file__).parent}"
        lacks = choice == "t5x"
        problem = f"{trainer_choice.VARIABLE}=t5x, but no T5X can be imported." if lacks else ""
        yield Finding("trainer", value, problem, trainer_choice.INSTALL if lacks else "")
        return
    yield Finding("trainer", f"T5X, from {folders[0]}", *_incomplete(folders[0]))
    if len(folders) > 1:
        yield Finding(
            "other T5X",
            ", ".join(map(str, folders[1:])),
            f"Python's path has {len(folders)} installations of T5X. The first one is used.",
            "remove the others from PYTHONPATH, or run `pip uninstall t5x`",
        )


def _incomplete(folder: Path) -> tuple[str, str]:
    """Returns (what is missing from a T5X, how to install it); ('', '') if nothing is missing."""
    scripts = [f"{name}.py" for name in trainer_choice.SCRIPTS]
    absent = [script for script in scripts if not (folder / script).is_file()]
    if absent:
        return f"The T5X in {folder} has no {', '.join(absent)}.", trainer_choice.INSTALL
    missing = sorted(missing_packages(folder))
    if missing:
        return (
            f"T5X needs {', '.join(missing)}, which cannot be imported.",
            "pip install --no-deps -r tpu/requirements-t5x.txt, or "
            f"set {trainer_choice.VARIABLE}=own to run without T5X",
        )
    return "", ""


def check_names(folder: Path) -> Iterator[Finding]:
    """Checks which modules or folders shadow a package of this library if run in `folder`."""
    for name, path in shadows.find(folder):
        if name == "tasks":
            value = (
                f"{path}; `tasks` in TASK_MODULES and imports refers to it. The suites of MPT-JAX "
                "are mpt_jax.tasks.glue, mpt_jax.tasks.toy and so on."
            )
            yield Finding("module tasks", value)
        else:
            what = f"Python imports {path} instead of the package {name}."
            yield Finding(f"module {name}", str(path), what, f"rename {path}, or run elsewhere")


def check_gin() -> Iterator[Finding]:
    """Reports the folder of the shipped gin files, and how T5X finds it."""
    folder = trainer_choice.gin_folder()
    flag = ""
    if trainer_choice.find_real() and Path.cwd().resolve() != folder.resolve():
        flag = f"; T5X finds them from here with --gin_search_paths={folder}"
    yield Finding("gin files", f"{folder / 'gin'}{flag}")


# --- Packages and devices ------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """Reports package versions, and checks whether the required packages are installed."""
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    for name in (*PACKAGES, *ACCELERATOR_PACKAGES, "t5x"):
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                mend = f"{shlex.quote(sys.executable)} -m pip install {name}"
                yield Finding(name, "not installed", f"{name} is required.", mend)


def check_devices(question: Probe, seconds: float) -> Iterator[Finding]:
    """Checks which devices JAX finds, and whether a job started here would join other processes."""
    answer, error = question.answer(seconds)
    if answer:
        platform_name, kind, number = json.loads(answer)
        yield Finding("devices", f"{number} x {kind} ({platform_name}), on this machine")
    elif error:
        mend = "install JAX for this accelerator (for example, pip install -U 'jax[tpu]'), or set "
        mend += "JAX_PLATFORMS=cpu"
        yield Finding("devices", "none", f"JAX finds no device: {error}", mend)
    else:
        yield Finding(
            "devices",
            "no answer",
            f"JAX did not answer within {seconds:g} s. Another process may be using the TPU, or "
            "JAX may be waiting for the other hosts of this slice.",
            "find the process with `sudo fuser -v /dev/accel* /dev/vfio/*`, run this command on "
            "all hosts at the same time, or raise --timeout",
        )
    try:
        arguments = distributed.distributed_args(os.environ)
    except ValueError as wrong:
        yield Finding(
            "processes", "", str(wrong), f"unset {distributed.VARIABLE} {distributed.INDEX}"
        )
        return
    listed = ", ".join(f"{name} {value}" for name, value in (arguments or {}).items())
    others = f"joins others: {listed or 'found by JAX'}"
    yield Finding("processes", "one" if arguments is None else others)


# --- Folders -------------------------------------------------------------------------------------


def check_folder(name: str, folder: str, mend: str) -> Finding:
    """Checks whether a local folder is writable, or can be created, and has free space."""
    path = Path(folder).expanduser().absolute()
    existing = path
    while not os.path.exists(existing):  # also False without permission to look
        existing = existing.parent
    state = str(path) if existing == path else f"{path}, will be created"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".mpt_jax_doctor_"):
            pass
    except OSError as error:
        return Finding(name, state, f"Cannot write to {existing}: {error.strerror}.", mend)
    free = shutil.disk_usage(existing).free
    state += f", {free / 2**30:.1f} GiB free"
    if free < MIN_FREE:
        return Finding(name, state, f"Less than 1 GiB is free in {existing}.", mend)
    return Finding(name, state)


def check_root(root: str, writing: Probe | None, seconds: float) -> Iterator[Finding]:
    """Checks MPT_JAX_ROOT, which is a local folder or a storage bucket that needs credentials."""
    mend = f"set {paths.ROOT_VARIABLE} to a writable folder or storage bucket"
    if writing is None:
        yield check_folder(paths.ROOT_VARIABLE, root, mend)
        return
    credentials = _credentials()
    yield Finding("credentials", credentials or "no file; a cloud machine does not need one")
    answer, error = writing.answer(seconds)
    if answer:
        yield Finding(paths.ROOT_VARIABLE, f"{root}, written")
        return
    reason = error or f"no answer within {seconds:g} s."
    login = "gcloud auth application-default login" if not credentials else mend
    yield Finding(paths.ROOT_VARIABLE, root, f"Cannot write to {root}: {reason}", login)


def _credentials() -> str:
    """Returns the path of the file from which Google's libraries read credentials, or ''."""
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    default = Path(folder) / "application_default_credentials.json"
    path = Path(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or default)
    return str(path) if os.path.isfile(path) else ""


def check_cache() -> Iterator[Finding]:
    """Checks the folder of the compilation cache."""
    folder = os.environ.get(compilation_cache.VARIABLE)
    if folder == "":
        yield Finding("compilation cache", f"off, {compilation_cache.VARIABLE} is empty")
    elif folder and "://" in folder:
        yield Finding("compilation cache", folder)
    else:
        mend = f"set {compilation_cache.VARIABLE} to another folder, or to '' for no cache"
        path = folder or str(Path.home() / ".cache" / "mpt_jax" / "compiled")
        yield check_folder("compilation cache", path, mend)


# --- What the paper's stages read ----------------------------------------------------------------


def check_data(folder: str) -> Iterator[Finding]:
    """Checks the folder of TensorFlow Datasets, and the six source data sets in it."""
    if "://" in folder:
        yield Finding("TFDS_DATA_DIR", f"{folder}; contents of a bucket are not checked")
        return
    folder = str(Path(folder).expanduser())
    absent = []
    for source in SOURCES:
        name, _, version = source.partition(":")
        if not os.path.isfile(os.path.join(folder, name, version, "dataset_info.json")):
            absent.append(source)
    mend = "set TFDS_DATA_DIR to a writable folder with free space"
    finding = check_folder("TFDS_DATA_DIR", folder, mend)
    # Data that exists is only read.
    yield finding if absent else dataclasses.replace(finding, problem="", mend="")
    for source in SOURCES:
        if source in absent:
            command = f"tfds build {source} --data_dir {shlex.quote(folder)}"
            yield Finding(source, "absent", f"The data set is not in {folder}.", command)
        else:
            yield Finding(source, "here")


def check_backbone(root: str) -> Iterator[Finding]:
    """Checks that the folder from which stage files read the pretrained T5 has all its files."""
    name, repository = BACKBONE
    folder = os.path.join(root, name)
    if "://" in root:
        yield Finding("backbone", f"{folder}; contents of a bucket are not checked")
        return
    is_here = lambda name: os.path.isfile(os.path.join(folder, name))  # noqa: E731
    absent = [name for name in ("config.json", "spiece.model") if not is_here(name)]
    if not any(map(is_here, WEIGHTS)):
        absent.append(WEIGHTS[0])
    mend = "pip install huggingface_hub && " + paths.download_command(
        repository=repository, folder=folder
    )
    problem = f"Missing from {folder}: {', '.join(absent)}." if absent else ""
    yield Finding("backbone", folder, problem, mend if absent else "")


# --- The report ----------------------------------------------------------------------------------


def run_checks(suite: str, data_dir: str, seconds: float) -> list[Finding]:
    """Runs all checks.

    Args:
        suite: The suite of the stages to start, `'paper'` or `'toy'`.
        data_dir: The folder in which TensorFlow Datasets keeps its data.
        seconds: The time limit for the devices and for a bucket to answer.
    """
    root = paths.root()
    devices = Probe(_DEVICES)  # both probes run during the other checks
    scratch = f".mpt_jax_doctor_{os.getpid()}"
    writing = Probe(_WRITE, root, scratch) if "://" in root else None
    findings = [
        *check_trainer(),
        *check_names(Path.cwd()),
        *check_gin(),
        *check_versions(),
        *check_root(root, writing, seconds),
    ]
    findings += check_cache()
    if suite == "paper":
        findings += [*check_data(data_dir), *check_backbone(root)]
    return [*findings, *check_devices(devices, seconds)]


def report(found: Sequence[Finding], suite: str) -> str:
    """Returns a text with one line for each finding, followed by the problems and their fixes."""
    width = max(len(finding.name) for finding in found)
    lines = [f"{'!!' if f.problem else '  '} {f.name:{width}}  {f.value}" for f in found]
    wrong = [finding for finding in found if finding.problem]
    for finding in wrong:
        lines += ["", f"{finding.name}: {finding.problem}", f"    {finding.mend}"]
    if not wrong:
        return "\n".join([*lines, "", f"A stage of the {suite} suite can start."])
    hint = "" if suite == "toy" else " Stages of gin/tiny.gin need no data (check: --suite toy)."
    number = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
    return "\n".join([*lines, "", f"{number} found.{hint}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax doctor", description="Checks whether a stage can start on this machine."
    )
    parser.add_argument("--suite", choices=("paper", "toy"), default="paper", help="suite to start")
    parser.add_argument("--json", action="store_true", help="print JSON")
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    parser.add_argument("--tfds_data_dir", default=default, help="folder of TensorFlow Datasets")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for devices (10)")
    args = parser.parse_args(argv)
    findings = run_checks(args.suite, args.tfds_data_dir, args.timeout)
    wrong = any(finding.problem for finding in findings)
    if args.json:
        records = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": not wrong, "suite": args.suite, "findings": records}, indent=1))
    else:
        print(report(findings, args.suite))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

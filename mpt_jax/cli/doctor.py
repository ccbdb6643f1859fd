"""`mpt-jax doctor`: what a stage would find on this machine, what is wrong, and what mends it.

    mpt-jax doctor                  what the stages of the paper need: data, backbone, devices
    mpt-jax doctor --suite toy      what gin/tiny.gin needs: neither data nor backbone
    mpt-jax doctor --json           the same, for a launch script

Exit code 0 if a stage can start, 1 if something is wrong, 2 for a mistake on the command line. It
neither hangs nor keeps a device: whatever may wait for a device or a network is asked in a process
of its own, which has `--timeout` seconds. TensorFlow is not imported.
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
from mpt_jax.cli.probe import Probe, missing_packages
from mpt_jax.config import trainer_choice
from mpt_jax.runtime import compilation_cache, distributed, paths

# The sources of gin/runs/tasks.gin as TFDS names them; those of `tasks`, read without TensorFlow.
SOURCES = (
    "glue/mnli:2.0.0",
    "glue/qqp:2.0.0",
    "glue/qnli:2.0.0",
    "glue/sst2:2.0.0",
    "squad/v1.1:3.0.0",
    "super_glue/record:1.0.2",
)
BACKBONE = ("backbones/t5-base", "google-t5/t5-base")  # of gin/runs/paths.gin
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow-datasets")
ACCELERATOR_PACKAGES = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
MIN_FREE = 2**30  # bytes; a backbone of T5's base size with its cache takes about as much

_DEVICES = """
import json, jax
found = jax.local_devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
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
        name: what was looked at.
        value: what was found.
        problem: what is wrong with it, if anything.
        mend: the command, or the setting, that mends it.
    """

    name: str
    value: str
    problem: str = ""
    mend: str = ""


# --- The trainer ---------------------------------------------------------------------------------


def check_trainer() -> Iterator[Finding]:
    """Which trainer `python -m t5x.train` is, from where, and whether it can be imported."""
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
            f"There are {len(folders)} T5X on Python's path; the order of the path decides.",
            "take the others off PYTHONPATH, or `pip uninstall t5x`",
        )


def _incomplete(folder: Path) -> tuple[str, str]:
    """What a T5X lacks and how to get it; ('', '') where it is whole."""
    lost = [
        f"{name}.py" for name in trainer_choice.SCRIPTS if not (folder / f"{name}.py").is_file()
    ]
    if lost:
        return f"This T5X has no {', '.join(lost)}.", trainer_choice.INSTALL
    missing = sorted(missing_packages(folder))
    if missing:
        return (
            f"T5X needs {', '.join(missing)}, which cannot be imported.",
            "pip install --no-deps -r tpu/requirements-t5x.txt, or "
            f"{trainer_choice.VARIABLE}=own to do without",
        )
    return "", ""


# --- Packages and devices ------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """What is installed."""
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    for name in (*PACKAGES, *ACCELERATOR_PACKAGES, "t5x"):
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                mend = f"{shlex.quote(sys.executable)} -m pip install {name}"
                yield Finding(name, "not installed", f"{name} is needed.", mend)


def check_devices(question: Probe, seconds: float) -> Iterator[Finding]:
    """What JAX computes on, and which processes a job started here would have."""
    answer, error = question.answer(seconds)
    if answer:
        platform_name, kind, number = json.loads(answer)
        yield Finding("devices", f"{number} x {kind} ({platform_name}), of this machine")
    elif error:
        mend = "JAX_PLATFORMS=cpu to do without, or install JAX for this accelerator: pip install"
        yield Finding("devices", "none", f"JAX finds none: {error}", f"{mend} -U 'jax[tpu]'")
    else:
        yield Finding(
            "devices",
            "no answer",
            f"JAX did not answer within {seconds:g} s. Another process may hold the TPU, or hosts "
            "of this slice wait for each other: then run this on all of them at once.",
            "sudo fuser -v /dev/accel* /dev/vfio/* shows who holds it; --timeout gives more time",
        )
    try:
        arguments = distributed.distributed_args(os.environ)
    except ValueError as wrong:
        yield Finding(
            "processes", "", str(wrong), f"unset {distributed.VARIABLE} {distributed.INDEX}"
        )
        return
    told = "found by JAX" if not arguments else ", ".join(f"{k} {v}" for k, v in arguments.items())
    yield Finding("processes", "one" if arguments is None else f"joins others: {told}")


# --- Folders -------------------------------------------------------------------------------------


def check_folder(name: str, folder: str, mend: str) -> Finding:
    """A folder of this machine: whether it is there, can be written, and has room."""
    path = Path(folder).expanduser().absolute()
    there = path
    while not os.path.exists(there):  # False, too, where it may not be looked at
        there = there.parent
    state = str(path) if there == path else f"{path}, to be made"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".mpt_jax_doctor_"):
            pass
    except OSError as error:
        return Finding(name, state, f"It cannot be written: {error.strerror}.", mend)
    free = shutil.disk_usage(there).free
    state += f", {free / 2**30:.1f} GiB free"
    if free < MIN_FREE:
        return Finding(name, state, "It has less than 1 GiB free.", mend)
    return Finding(name, state)


def check_root(root: str, writing: Probe | None, seconds: float) -> Iterator[Finding]:
    """MPT_JAX_ROOT: a folder, or a bucket with credentials for it."""
    mend = f"set {paths.ROOT_VARIABLE} to a folder or a bucket that can be written"
    if writing is None:
        yield check_folder(paths.ROOT_VARIABLE, root, mend)
        return
    credentials = _credentials()
    yield Finding("credentials", credentials or "no file; a machine of the cloud has its own")
    answer, error = writing.answer(seconds)
    if answer:
        yield Finding(paths.ROOT_VARIABLE, f"{root}, written")
        return
    why = error or f"no answer within {seconds:g} s."
    login = "gcloud auth application-default login" if not credentials else mend
    yield Finding(paths.ROOT_VARIABLE, root, f"It cannot be written: {why}", login)


def _credentials() -> str:
    """The file that Google's libraries would read credentials from; '' where there is none."""
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    default = Path(folder) / "application_default_credentials.json"
    path = Path(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or default)
    return str(path) if os.path.isfile(path) else ""


def check_cache() -> Iterator[Finding]:
    """Where compiled programs are kept."""
    folder = os.environ.get(compilation_cache.VARIABLE)
    if folder == "":
        yield Finding("compilation cache", f"off, {compilation_cache.VARIABLE} is empty")
    elif folder and "://" in folder:
        yield Finding("compilation cache", folder)
    else:
        mend = f"set {compilation_cache.VARIABLE} to another folder, or to nothing"
        where = folder or str(Path.home() / ".cache" / "mpt_jax" / "compiled")
        yield check_folder("compilation cache", where, mend)


# --- What the paper's stages read ----------------------------------------------------------------


def check_data(folder: str) -> Iterator[Finding]:
    """The folder of TensorFlow Datasets, and the six source data sets in it."""
    if "://" in folder:
        yield Finding("TFDS_DATA_DIR", f"{folder}; what a bucket holds is not looked at")
        return
    folder = str(Path(folder).expanduser())
    absent = []
    for source in SOURCES:
        name, _, version = source.partition(":")
        if not os.path.isfile(os.path.join(folder, name, version, "dataset_info.json")):
            absent.append(source)
    found = check_folder(
        "TFDS_DATA_DIR", folder, "set it to a folder with room that can be written"
    )
    # Data that is there is only read.
    yield found if absent else dataclasses.replace(found, problem="", mend="")
    for source in SOURCES:
        if source in absent:
            command = f"tfds build {source} --data_dir {shlex.quote(folder)}"
            yield Finding(source, "absent", "It is not on this machine.", command)
        else:
            yield Finding(source, "here")


def check_backbone(root: str) -> Iterator[Finding]:
    """The pretrained T5 and its vocabulary, where the stage files look for them."""
    name, repository = BACKBONE
    folder = os.path.join(root, name)
    if "://" in root:
        yield Finding("backbone", f"{folder}; what a bucket holds is not looked at")
        return
    is_here = lambda name: os.path.isfile(os.path.join(folder, name))  # noqa: E731
    lost = [name for name in ("config.json", "spiece.model") if not is_here(name)]
    if not any(map(is_here, WEIGHTS)):
        lost.append(WEIGHTS[0])
    mend = "pip install huggingface_hub && " + paths.download_command(
        repository=repository, folder=folder
    )
    problem = f"There is no {', no '.join(lost)}." if lost else ""
    yield Finding("backbone", folder, problem, mend if lost else "")


# --- The report ----------------------------------------------------------------------------------


def run_checks(suite: str, data_dir: str, seconds: float) -> list[Finding]:
    """Looks at everything.

    Args:
        suite: `'paper'` or `'toy'`, whose stages are to start.
        data_dir: of TensorFlow Datasets.
        seconds: how long a device or a bucket may take to answer.
    """
    root = paths.root()
    devices = Probe(_DEVICES)  # these two work while the rest is looked at
    scratch = f".mpt_jax_doctor_{os.getpid()}"
    writing = Probe(_WRITE, root, scratch) if "://" in root else None
    found = [*check_trainer(), *check_versions(), *check_root(root, writing, seconds)]
    found += check_cache()
    if suite == "paper":
        found += [*check_data(data_dir), *check_backbone(root)]
    return [*found, *check_devices(devices, seconds)]


def report(found: Sequence[Finding], suite: str) -> str:
    """The findings as text, then what is wrong and what mends it."""
    width = max(len(finding.name) for finding in found)
    lines = [f"{'!!' if f.problem else '  '} {f.name:{width}}  {f.value}" for f in found]
    wrong = [finding for finding in found if finding.problem]
    for finding in wrong:
        lines += ["", f"{finding.name}: {finding.problem}", f"    {finding.mend}"]
    if not wrong:
        return "\n".join([*lines, "", f"A stage of the {suite} suite can start."])
    hint = "" if suite == "toy" else " Stages of gin/tiny.gin need no data: --suite toy."
    number = "1 thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
    return "\n".join([*lines, "", f"{number} wrong.{hint}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mpt-jax doctor", description="What is wrong here?")
    parser.add_argument("--suite", choices=("paper", "toy"), default="paper", help="whose stages")
    parser.add_argument("--json", action="store_true", help="print JSON")
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    parser.add_argument("--tfds_data_dir", default=default, help="of TensorFlow Datasets")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for devices (10)")
    args = parser.parse_args(argv)
    found = run_checks(args.suite, args.tfds_data_dir, args.timeout)
    wrong = any(finding.problem for finding in found)
    if args.json:
        findings = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"ok": not wrong, "suite": args.suite, "findings": findings}, indent=1))
    else:
        print(report(found, args.suite))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

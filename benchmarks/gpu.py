"""All measurements on a GPU, in parts of at most ten minutes that can be resumed.

    python -m benchmarks.gpu --out docs/benchmarks/gpu.json           # the same command resumes
    python -m benchmarks.gpu --out docs/benchmarks/gpu.json --list    # which parts are finished
    python -m benchmarks.gpu --out docs/benchmarks/gpu.json --parts 'base/16/*' fleet
    python -m benchmarks.gpu --device cpu --out /tmp/rehearsal.json   # tiny, to test the script

Parts are MPT's source step on ragged texts (benchmarks/ragged.py) for T5-base and T5-large with
random weights in bfloat16, one part for each batch size and contestant, and a fleet of 64 runs
against 64 single runs on the toy suite (benchmarks/fleet.py). Each part is a process, so no two
contestants share the GPU's memory. Only one GPU is used. MFU is counted operations without padding
over the chip's peak (`PEAKS`, or --peak-tflops). Compiled programs are cached on disk, so a part
that ran past its limit needs less time when it is started again.

It needs `pip install 'mpt-jax[cuda]'`. PEFT's parts need the `parity` extra with a CUDA build of
torch, and are skipped without. No GPU has run any part yet.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures, ragged
from benchmarks.contestants import SIZES

LONGEST = 600  # seconds
# Words of a device's name -> TFLOP/s of dense bfloat16 products, from NVIDIA's data sheets. The
# first match counts.
PEAKS = {
    "B200": 2250,
    "GH200": 990,
    "H200 NVL": 836,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
}
JAX_DEVICES = """
import json, jax
print(json.dumps([device.device_kind for device in jax.devices()]))
"""
TORCH_DEVICES = """
import json, peft, torch, transformers
print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))
"""


class Plan(NamedTuple):
    """What is measured on a kind of device.

    Attributes:
        sizes, batch_sizes: T5's sizes and the examples of a step, unless the command line has
            others.
        batches, turns: the steps of a turn, and the measured turns.
        fleet, fleet_steps, fleet_turns: the runs of the fleet, their steps, and the turns.
    """

    sizes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    batches: int
    turns: int
    fleet: int
    fleet_steps: int
    fleet_turns: int


PLANS = {
    "gpu": Plan(("base", "large"), (8, 16, 32, 64), 6, 5, 64, 200, 3),
    "cpu": Plan(("tiny",), (4,), 2, 1, 4, 2, 1),
}


class Part(NamedTuple):
    """A process to run.

    Attributes:
        name: the name in the output, `size/batch size/contestant` or `fleet`.
        command: the arguments of `python -m`, without `--out`.
    """

    name: str
    command: tuple[str, ...]

    @property
    def needs_peft(self) -> bool:
        """Whether the part measures PEFT."""
        return "/PEFT" in self.name


# --- Parts ---------------------------------------------------------------------------------------


def parts(device: str, sizes: Sequence[str], batch_sizes: Sequence[int]) -> list[Part]:
    """Returns all parts. Those of a size and batch size follow one another."""
    plan = PLANS[device]
    counts = ("--batches", str(plan.batches), "--turns", str(plan.turns))
    found = [
        Part(
            f"{size}/{batch_size}/{who.name.replace(' ', '_')}",
            ("benchmarks.ragged", "--device", device, "--size", size, "--stages", "source",
             "--batch-sizes", str(batch_size), *counts, "--contestants", who.name),
        )
        for size in sizes
        for batch_size in batch_sizes
        for who in ragged.ON_GPU
    ]  # fmt: skip
    counts = ("--steps", str(plan.fleet_steps), "--turns", str(plan.fleet_turns))
    return [*found, Part("fleet", ("benchmarks.fleet", "--sizes", "1", str(plan.fleet), *counts))]


def run(part: Part, limit: float, variables: Mapping[str, str]) -> dict[str, Any]:
    """Runs a part; returns its status, its seconds, and its figures or the reason of its failure.

    Args:
        part: the part.
        limit: seconds after which it is ended.
        variables: the environment of the process.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", *part.command, "--out", str(out)]
        # A separate session, so that the contestants that it starts can be ended with it.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=dict(variables), start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - start
        if code == 0:
            done = json.loads(out.read_text())
            return {"status": "done", "seconds": seconds, "figures": done}
        log.seek(0)
        end = log.read()[-3000:]
    why = f"exit code {code}" if code is not None else f"ended after its limit of {limit:.0f} s"
    reason = f"{why}. Its output ends with:\n{end}"
    return {"status": "failed", "seconds": seconds, "reason": reason}


# --- The environment -----------------------------------------------------------------------------


def environment_variables(device: str) -> dict[str, str]:
    """Returns the environment of all processes.

    One GPU only, because PEFT uses one. JAX and TensorFlow take GPU memory only as they need it,
    since the fleet's processes share it.
    """
    cache = Path.home() / ".cache" / "mpt_jax" / "compiled_benchmarks"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
    }


def probe(code: str, variables: Mapping[str, str]) -> list[str]:
    """Returns the names of devices that a script prints as JSON.

    Raises:
        RuntimeError: the script failed; the error is the last line of its output.
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(variables), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def device_name(device: str, variables: Mapping[str, str]) -> str:
    """Returns the name of JAX's device.

    Raises:
        ValueError: JAX's CUDA build is not installed, or JAX finds no GPU.
    """
    rehearse = "To test this script without a GPU, pass --device cpu."
    if device == "gpu" and not any(name.startswith("jax-cuda") for name in figures.versions()):
        raise ValueError(
            "JAX's CUDA build is not installed. Run `pip install 'mpt-jax[cuda]'`. " + rehearse
        )
    try:
        return probe(JAX_DEVICES, variables)[0]
    except RuntimeError as error:
        raise ValueError(
            f"JAX finds no {device.upper()}: {error}. Run `nvidia-smi` to see whether the driver "
            f"finds one. {rehearse}"
        ) from error


def why_no_peft(device: str, variables: Mapping[str, str]) -> str:
    """Returns a sentence on why PEFT cannot be measured, or '' if it can."""
    try:
        found = probe(TORCH_DEVICES, variables)
    except RuntimeError as error:
        return f"PEFT cannot be imported: {error}. Run `pip install 'mpt-jax[parity]'`."
    if device == "gpu" and not found:
        return (
            f"torch {metadata.version('torch')} finds no CUDA device. Install a CUDA build of "
            "torch, as https://pytorch.org shows."
        )
    return ""


def peak_tflops(name: str) -> float | None:
    """Returns the peak of a device in bfloat16, or None if it is not in `PEAKS`."""
    matches = (peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name))
    return next(matches, None)


# --- The record ----------------------------------------------------------------------------------


def read_record(path: Path, device: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of an earlier call, or one without parts.

    Raises:
        ValueError: the record is from another device.
    """
    record = json.loads(path.read_text()) if path.exists() else {"device": device, "parts": {}}
    if record["device"] != device:
        raise ValueError(
            f"{path} holds figures of {record['device']}, but this is {device}. Choose another "
            "--out."
        )
    return record


def summary(record: Mapping[str, Any]) -> str:
    """Returns tables of all finished parts, and a line for each other part."""
    steps: dict[str, dict[str, Any]] = {}
    tables, others = [], []
    for name, part in record["parts"].items():
        if part["status"] != "done":
            others.append(f"* {name} {part['status']}: {part['reason'].splitlines()[0]}")
        elif name == "fleet":
            lines = part["figures"]["comparisons"]
            rows = [list(line.values()) for line in lines]
            tables.append("Fleet, seconds:\n\n" + figures.table(list(lines[0]), rows))
        else:
            (result,) = part["figures"]["results"]
            steps.setdefault(name.rpartition("/")[0], {}).update(result["contestants"])
    for name, found in steps.items():
        size, _, batch_size = name.partition("/")
        table = ragged.markdown(found, ragged.speedups(found))
        tables.append(f"Source step, T5-{size}, B = {batch_size}:\n\n{table}")
    return "\n\n".join([*tables, *filter(None, ["\n".join(others)])])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON with all parts")
    parser.add_argument("--device", choices=PLANS, default="gpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: base large")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="default: 8 16 32 64")
    parser.add_argument("--parts", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="only list parts and their status")
    parser.add_argument("--limit", type=float, default=LONGEST, help="seconds a part may take")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in bfloat16")
    args = parser.parse_args(arguments)
    if not 0 < args.limit <= LONGEST:
        parser.error(f"--limit must be at most {LONGEST} seconds, and more than 0.")
    return args


def chosen(args: argparse.Namespace) -> list[Part]:
    """Returns the parts that the command line selects.

    Raises:
        ValueError: it selects none.
    """
    plan = PLANS[args.device]
    known = parts(args.device, args.sizes or plan.sizes, args.batch_sizes or plan.batch_sizes)
    found = [p for p in known if any(fnmatch.fnmatchcase(p.name, x) for x in args.parts)]
    if not found:
        names = ", ".join(part.name for part in known)
        raise ValueError(f"No part matches {' '.join(args.parts)}. The parts are: {names}.")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the selected parts that are not finished; returns the record of all parts."""
    variables, selected = environment_variables(args.device), chosen(args)
    name = device_name(args.device, variables)
    peak = args.peak_tflops or peak_tflops(name)
    if peak is None:
        print(f"The peak of {name} is not known, so there is no MFU. Pass --peak-tflops.")
    record = read_record(args.out, {"kind": args.device, "name": name})
    record |= {"peak_tflops": peak, "machine": figures.machine(), "versions": figures.versions()}
    missing = why_no_peft(args.device, variables)
    for number, part in enumerate(selected, start=1):
        if record["parts"].get(part.name, {}).get("status") == "done":
            continue
        if part.needs_peft and missing:
            found = {"status": "skipped", "reason": missing}
        else:
            if peak and part.name != "fleet":
                part = part._replace(command=(*part.command, "--peak-tflops", str(peak)))
            found = run(part, args.limit, variables)
        print(f"[{number}/{len(selected)}] {part.name}: {found['status']}", flush=True)
        record["parts"][part.name] = found
        figures.write(record, args.out)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts and prints tables. Exits with 1 if a part failed, with 2 without a device."""
    args = parsed(arguments)
    try:
        if args.list:
            kept = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}
            for part in chosen(args):
                print(f"{kept.get(part.name, {}).get('status', 'not run'):8} {part.name}")
            return
        record = measure(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"\n{summary(record)}\n\nDevice: {record['device']}")
    sys.exit(any(part["status"] == "failed" for part in record["parts"].values()))


if __name__ == "__main__":
    main()

"""benchmarks.gpu on a CPU, at a tiny size: its parts, limits, record, and messages."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import gpu, ragged

ROOT = Path(__file__).resolve().parents[2]
OURS = "tiny/4/MPT-JAX_bfloat16_packed_1x"


@pytest.fixture(autouse=True)
def from_clone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def call(out: Path, *arguments: str) -> int:
    """Rehearses; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--out", str(out), *arguments])
    return int(ended.value.code or 0)


# --- Parts ---------------------------------------------------------------------------------------


def test_gpu_parts_are_every_size_batch_size_and_contestant(monkeypatch):
    plan = gpu.PLANS["gpu"]
    found = gpu.parts("gpu", plan.sizes, plan.batch_sizes)
    assert len({part.name for part in found}) == len(found) == 2 * 4 * len(ragged.ON_GPU) + 1
    assert [part.name for part in found if part.needs_peft][:2] == [
        "base/8/PEFT_bfloat16_unsorted",
        "base/8/PEFT_bfloat16_sorted",
    ]
    for part in found[:-1]:  # the benchmark reads its command
        monkeypatch.setattr(sys, "argv", list(part.command))
        args = ragged.parsed()
        (name,) = args.contestants
        assert part.name == f"{args.size}/{args.batch_sizes[0]}/{name.replace(' ', '_')}"
        assert (args.device, ragged.ALL[name].dtype) == ("gpu", "bfloat16")
    assert found[-1].command[:4] == ("benchmarks.fleet", "--sizes", "1", "64")


def test_gpu_pattern_without_parts_is_an_error(tmp_path, capsys):
    assert call(tmp_path / "gpu.json", "--parts", "base/*") == 2
    assert "No part matches base/*. The parts are: tiny/4/PEFT" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "601"])
def test_gpu_limit_above_ten_minutes_is_an_error(tmp_path, limit):
    assert call(tmp_path / "gpu.json", "--limit", limit) == 2


SLOW = """
import subprocess, sys
from pathlib import Path
late = "import sys, time; time.sleep(4); open(sys.argv[1], 'w')"
subprocess.Popen([sys.executable, "-c", late, {late!r}])
print("waiting", flush=True)
subprocess.run(["sleep", "60"])
"""


def test_gpu_part_past_its_limit_ends_with_the_processes_it_started(tmp_path):
    late = tmp_path / "late"
    (tmp_path / "slow.py").write_text(SLOW.format(late=str(late)))
    found = gpu.run(gpu.Part("slow", ("slow",)), 2.0, {"PYTHONPATH": str(tmp_path)})
    assert found["status"] == "failed" and 2.0 <= found["seconds"] < 30
    begin = "ended after its limit of 2 s. Its output ends with:\nwaiting"
    assert found["reason"].startswith(begin)
    time.sleep(4)
    assert not late.exists()


def test_gpu_failed_part_keeps_the_end_of_its_output(tmp_path):
    (tmp_path / "dies.py").write_text("raise SystemExit('out of memory')")
    found = gpu.run(gpu.Part("dies", ("dies",)), 60, {"PYTHONPATH": str(tmp_path)})
    assert found["reason"] == "exit code 1. Its output ends with:\nout of memory\n"


# --- Devices and packages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_gpu_peak_is_known_by_whole_words_of_the_name(name, peak):
    assert gpu.peak_tflops(name) == peak


def test_gpu_without_a_gpu_says_what_to_do(monkeypatch, tmp_path, capsys):
    def fail(code, variables):
        assert variables["JAX_PLATFORMS"] == "cuda"
        raise RuntimeError("No visible GPU devices")

    monkeypatch.setattr(gpu, "probe", fail)
    for installed, message in (
        ("jax", "JAX's CUDA build is not installed. Run `pip install 'mpt-jax[cuda]'`. To test "),
        ("jax-cuda13-plugin", "JAX finds no GPU: No visible GPU devices. Run `nvidia-smi` to see "),
    ):
        monkeypatch.setattr(gpu.figures, "versions", lambda name=installed: {name: "1"})
        with pytest.raises(SystemExit, match="2"):
            gpu.main(["--out", str(tmp_path / "gpu.json")])
        assert capsys.readouterr().err.startswith(message)


def test_gpu_parts_of_peft_are_skipped_with_the_reason(monkeypatch, tmp_path, capsys):
    names = {gpu.JAX_DEVICES: ["NVIDIA H200"], gpu.TORCH_DEVICES: []}
    monkeypatch.setattr(gpu, "probe", lambda code, variables: names[code])
    monkeypatch.setattr(gpu.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(gpu.figures, "versions", lambda: {"jax-cuda13-plugin": "1"})
    commands = []

    def run(part, limit, variables):
        commands.append(part.command)
        return {"status": "failed", "seconds": 1.0, "reason": "exit code 1. Its output:\nmore"}

    monkeypatch.setattr(gpu, "run", run)
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(out), "--sizes", "base", "--parts", "base/8/*"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert (
        "* base/8/PEFT_bfloat16_sorted skipped: torch 2.13.0+cpu finds no CUDA device. Install a "
        "CUDA build of torch, as https://pytorch.org shows." in printed
    )
    assert "* base/8/MPT-JAX_bfloat16_buckets failed: exit code 1. Its output:\n" in printed
    assert len(commands) == 3 and all(x[-2:] == ("--peak-tflops", "989") for x in commands)


def test_gpu_record_of_another_device_is_an_error(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"device": {"kind": "gpu", "name": "NVIDIA H100"}, "parts": {}}))
    with pytest.raises(ValueError, match=r"gpu.json holds figures of .*H100.*Choose another --out"):
        gpu.read_record(out, {"kind": "gpu", "name": "NVIDIA H200"})


# --- Rehearsals ----------------------------------------------------------------------------------


def test_gpu_rehearsal_measures_once_and_resumes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    assert call(out, "--parts", OURS, "--peak-tflops", "2") == 0
    record = json.loads(out.read_text())
    assert record["device"] == {"kind": "cpu", "name": jax.devices()[0].device_kind}
    assert record["versions"]["jax"] == jax.__version__ and record["peak_tflops"] == 2
    part = record["parts"][OURS]
    (result,) = part["figures"]["results"]
    (row,) = result["contestants"].values()
    assert part["status"] == "done" and result["batch_size"] == 4
    # Counted operations over the peak: as many per second as the other figure, in giga.
    mfu = row["needed_gflops_per_second"] / 2000
    assert row["model_flops_utilisation"] == pytest.approx(mfu)
    assert "Source step, T5-tiny, B = 4:" in capsys.readouterr().out

    monkeypatch.setattr(gpu, "run", None)  # would fail if it ran the part again
    assert call(out, "--parts", OURS, "--peak-tflops", "2") == 0
    gpu.main(["--device", "cpu", "--out", str(out), "--list"])
    listed = capsys.readouterr().out
    assert f"done     {OURS}" in listed and "not run  fleet" in listed


@pytest.mark.slow
def test_gpu_rehearsal_of_the_fleet_compares_with_single_runs(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert call(out, "--parts", "fleet") == 0, out.read_text()
    lines = json.loads(out.read_text())["parts"]["fleet"]["figures"]["comparisons"]
    assert [line["runs"] for line in lines] == [1, 4]
    assert "Fleet, seconds:" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="PEFT is not installed")
def test_gpu_rehearsal_of_peft_shows_speedups(tmp_path, capsys):
    patterns = ("tiny/4/PEFT*", OURS)
    assert call(tmp_path / "gpu.json", "--parts", *patterns) == 0
    printed = capsys.readouterr().out
    assert "skipped" not in printed
    assert "| examples/s against | PEFT bfloat16 unsorted | PEFT bfloat16 sorted |" in printed

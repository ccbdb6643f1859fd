"""MPT's training step on ragged texts against PEFT's: positions, time, throughput and memory.

    python -m benchmarks.ragged --out docs/benchmarks/ragged_small.json
    python -m benchmarks.ragged --size base --batch-sizes 8 --batches 6 --stages source \
        --out docs/benchmarks/ragged_base.json
    python -m benchmarks.ragged --device gpu --size large --batch-sizes 8 --peak-tflops 989

T5 shapes with random weights, P = 100, texts of at most 256 tokens with the lengths of
benchmarks/ragged_mix.py (assumed; the record has the histogram). PEFT pads each batch to its
longest text, with examples in arrival order and sorted by length. Ours sorts and trims to length
buckets, or packs by best fit into rows of once or twice the limits. All contestants have the same
list of examples in a turn, in batches of --batch-sizes examples (packed: on average), and take
turns. A source step has six tasks in its batches, a target step one. Everything is float32 unless
a name says bfloat16; for this on a CPU, see docs/benchmarks-peft.md. On a GPU everything is
bfloat16, PEFT's model is compiled and its attention fused (benchmarks/fused_t5.py).
benchmarks/gpu.py runs all sizes there, contestant by contestant. No GPU figure has been measured
yet. PEFT needs the `parity` extra.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import contest, figures, ragged_batches, ragged_mix
from benchmarks.contestants import SIZES, Ours, Peft, t5
from mpt_jax.batching.collate import Example
from mpt_jax.runtime import malloc

P = 100


class Contestant(NamedTuple):
    """A contestant.

    Attributes:
        library: `'MPT-JAX'` or `'PEFT'`.
        kind: the kind of its batches, a key of `ragged_batches.KINDS`.
        dtype: the dtype that it computes in.
        distilled: whether the loss has distillation terms.
    """

    library: str
    kind: str
    dtype: str = "float32"
    distilled: bool = False

    @property
    def name(self) -> str:
        """Name in tables."""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        teachers = ", distilled" if self.distilled else ""
        return f"{self.library}{dtype} {self.kind}{teachers}"


# Contestants that are compared by ratio come first, so that they are in memory together.
MAIN = (
    Contestant("PEFT", "unsorted"),
    Contestant("PEFT", "sorted"),
    Contestant("MPT-JAX", "buckets"),
    Contestant("MPT-JAX", "packed_2x"),
)
NARROW = (
    Contestant("PEFT", "unsorted", "bfloat16"),
    Contestant("PEFT", "sorted", "bfloat16"),
    Contestant("MPT-JAX", "buckets", "bfloat16"),
    Contestant("MPT-JAX", "packed_1x", "bfloat16"),
)
OTHERS = (
    Contestant("MPT-JAX", "packed_1x"),
    Contestant("MPT-JAX", "padded"),
    Contestant("MPT-JAX", "packed_2x", distilled=True),
)
ON_GPU = (
    *NARROW,
    Contestant("MPT-JAX", "packed_2x", "bfloat16"),
)
ALL = {contestant.name: contestant for contestant in (*MAIN, *NARROW, *OTHERS, *ON_GPU)}
STAGES = {"source": len(ragged_mix.TASKS), "target": 1}  # rows of the bank


def entered(args: argparse.Namespace, stage: str) -> list[Contestant]:
    """Returns the contestants of a stage: those of --contestants, if given; on a GPU, `ON_GPU`.

    On a CPU, precisions, distillation and other kinds of batches are measured only in the source
    stage. Target steps have no teachers, and otherwise differ only in the size of the bank.
    """
    if args.contestants:
        return [ALL[name] for name in args.contestants]
    if args.device == "gpu":
        return list(ON_GPU)
    return [*MAIN, *NARROW, *OTHERS] if stage == "source" else list(MAIN)


def examples(args: argparse.Namespace, stage: str, batch_size: int) -> list[Example]:
    """Returns the examples of a turn."""
    mix = ragged_mix.draw(args.batches * batch_size)
    return ragged_mix.examples(mix, t5(args.size).vocab_size, one_task=stage == "target")


def work(args: argparse.Namespace, stage: str, batch_size: int, who: Contestant) -> contest.Work:
    """Returns a contestant's turn: a step for each of its batches."""
    config = t5(args.size, who.dtype)
    list_of_turn = examples(args, stage, batch_size)
    batches = ragged_batches.KINDS[who.kind](list_of_turn, P, batch_size)
    on_gpu = args.device == "gpu"
    side: Ours | Peft
    if who.library == "PEFT":
        device = "cuda" if on_gpu else "cpu"
        side = Peft(config, P, STAGES[stage], device, fused=on_gpu)
        if not on_gpu:  # there it would start JAX on PEFT's GPU
            malloc.keep_freed_memory()  # as our trainer does
    else:
        side = Ours(config, P, STAGES[stage], who.distilled)

    def run() -> None:
        for batch in batches:
            side.step(batch)
        side.wait()
        side.loss()  # raises if training diverged

    return contest.Work(run, side.peak_mib)


def measure(args: argparse.Namespace, stage: str, batch_size: int) -> dict[str, dict[str, Any]]:
    """Measures every contestant in one stage; returns figures by name."""
    whos = entered(args, stage)
    given = ["benchmarks.ragged", "--device", args.device, "--size", args.size]
    given += ["--batches", str(args.batches), "--stages", stage, "--batch-sizes", str(batch_size)]
    commands = {who.name: [*given, "--serve", who.name] for who in whos}
    # Several models need not fit into a GPU together.
    together = args.together or (1 if args.device == "gpu" else 4)
    found = contest.compare(commands, args.turns, together)
    list_of_turn = examples(args, stage, batch_size)
    flops = ragged_batches.needed_flops(t5(args.size), list_of_turn, P)
    for who in whos:
        row = found[who.name]
        batches = ragged_batches.KINDS[who.kind](list_of_turn, P, batch_size)
        seconds = row["median_seconds"]
        row["steps"] = len(batches)
        row["shapes"] = len({batch["encoder_input_tokens"].shape for batch in batches})
        row["positions_per_example"] = ragged_batches.positions(batches) / len(list_of_turn)
        row["examples_per_second"] = len(list_of_turn) / seconds
        row["needed_gflops_per_second"] = flops / seconds / 1e9
        if args.peak_tflops:
            row["model_flops_utilisation"] = flops / seconds / (args.peak_tflops * 1e12)
    return found


def speedups(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns ratios of examples per second, each of ours over each of PEFT's."""
    speed = {name: row["examples_per_second"] for name, row in found.items()}
    return {
        f"{ours} / {theirs}": speed[ours] / speed[theirs]
        for ours in found
        for theirs in found
        if ALL[ours].library != "PEFT" and ALL[theirs].library == "PEFT"
    }


COLUMNS = {
    "positions an example": "positions_per_example",
    "seconds a turn": "median_seconds",
    "min": "min_seconds",
    "max": "max_seconds",
    "examples/s": "examples_per_second",
    "peak MiB": "peak_mib",
    "warm-up s": "warm_up_seconds",
    "MFU": "model_flops_utilisation",
}


def markdown(found: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    """Returns a table of the contestants, then one of our speedups."""
    columns = {
        title: field
        for title, field in COLUMNS.items()
        if all(field in row for row in found.values())
    }
    rows = [[name, *(row[field] for field in columns.values())] for name, row in found.items()]
    theirs = [name for name in found if ALL[name].library == "PEFT"]
    ours = [name for name in found if name not in theirs]
    times = [[name, *(f"{ratios[f'{name} / {other}']:.2f}x" for other in theirs)] for name in ours]
    tables = [figures.table(["", *columns], rows)]
    if theirs and ours:
        tables.append(figures.table(["examples/s against", *theirs], times))
    return "\n\n".join(tables)


def parsed() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16])
    parser.add_argument("--batches", type=int, default=6, help="batches in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", choices=ALL, metavar="NAME")
    parser.add_argument(
        "--together", type=int, help="contestants in memory at once; default: 4, on a GPU 1"
    )
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in this precision")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=ALL, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prints tables, and writes the figures to --out if given."""
    args = parsed()
    # For the contestants' processes; JAX has read them in this process, which uses no device.
    # Several processes share a GPU, so no process may reserve all of its memory. PEFT uses one GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["JAX_PLATFORMS"] = "cuda" if args.device == "gpu" else "cpu"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if args.serve:
        (stage,), (size,) = args.stages, args.batch_sizes
        contest.serve(lambda: work(args, stage, size, ALL[args.serve]))
        return
    record: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "prompt_length": P,
        "machine": figures.machine(),
        "versions": figures.versions(),
        "results": [],
    }
    for size in args.batch_sizes:
        mix = ragged_mix.description(ragged_mix.draw(args.batches * size))
        for stage in args.stages:
            found = measure(args, stage, size)
            ratios = speedups(found)
            print(f"\n{stage} step, T5-{args.size}, B = {size}\n\n{markdown(found, ratios)}")
            record["results"].append(
                {"stage": stage, "batch_size": size, "mix": mix}
                | {"contestants": found, "speedups": ratios}
            )
            figures.write(record, args.out)
    print(f"\nMachine: {record['machine']}")


if __name__ == "__main__":
    main()

"""One MPT training step against PEFT's: seconds and peak memory, side by side in one run.

    python -m benchmarks.train_step [--repeats 7] [--out docs/benchmarks/train_step.json]

T5-small shape, random weights, float32, CPU; B = 16, 100 prompt and 128 text positions, targets of
8, six tasks in every batch. Each contestant lives in a process of its own with all cores; they take
turns, one step at a time, so that whatever else the machine does hits all of them. PEFT needs the
`parity` extra. Figures are medians; memory is the peak resident set of the whole process after the
last step, and of the same process before its model was built. Our trainer tells malloc to keep
freed memory (mpt_jax/host_memory.py); PEFT runs as it comes, and once more with the same help.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import figures
from mpt_jax import host_memory

B, P, TEXT, L, K = 16, 100, 128, 8, 6
CONTESTANTS = ("peft", "peft_keeping_memory", "mpt_jax", "mpt_jax_distilled")


def peak_mib() -> float:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tokens():
    """The same texts and targets for everyone: [B, TEXT] and [B, L], no padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    text, targets = rng.integers(3, 32000, (B, TEXT)), rng.integers(3, 32000, (B, L))
    return text.astype(np.int32), targets.astype(np.int32), (np.arange(B) % K).astype(np.int32)


def peft_step() -> Callable[[], None]:
    """PEFT's MultitaskPromptTuning on transformers' T5, trained by torch's AdamW."""
    import torch
    from peft import MultitaskPromptTuningConfig, TaskType, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = get_peft_model(
        T5ForConditionalGeneration(config),
        MultitaskPromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_tasks=K,
            num_virtual_tokens=P,
            num_transformer_submodules=1,
        ),
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    text, targets, tasks = (torch.as_tensor(x, dtype=torch.long) for x in tokens())
    mask = torch.ones_like(text)

    def step() -> None:
        optimizer.zero_grad()
        output = model(input_ids=text, attention_mask=mask, labels=targets, task_ids=tasks)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(distilled: bool) -> Callable[[], None]:
    """The trainer's own compiled step."""
    import jax
    import numpy as np

    from mpt_jax import losses, train_state
    from mpt_jax.backbones.t5.config import t5_config
    from mpt_jax.backbones.t5.network import Transformer
    from mpt_jax.models import PromptedEncoderDecoder
    from mpt_jax.optimizers import PromptOptimizer, Schedule
    from mpt_jax.partitioning import PjitPartitioner
    from mpt_jax.prompts.mpt import MPT
    from mpt_jax.runs import Runs
    from mpt_jax.trainer import Trainer

    rates = Schedule(0.3, decay="constant")
    model = PromptedEncoderDecoder(
        Transformer(t5_config("t5_1_0_small")),
        MPT(P),
        Runs([f"task_{k}" for k in range(K)]),
        PromptOptimizer({"shared": rates, "task": rates}),
        objective=losses.Objective(distillation=losses.Distillation() if distilled else None),
    )
    variables = jax.jit(model.get_initial_variables)(jax.random.PRNGKey(0))
    partitioner = PjitPartitioner()
    state = train_state.create(model, dict(variables["params"].unfreeze()), partitioner)
    del variables
    text, targets, tasks = tokens()
    slots = np.broadcast_to(np.arange(P, dtype=np.int32) + 1, (B, P))
    batch = {
        "encoder_input_tokens": np.concatenate([np.zeros((B, P), np.int32), text], 1),
        "encoder_prompt_slots": np.pad(slots, ((0, 0), (0, TEXT))),
        "encoder_task_ids": np.repeat(tasks[:, None], P + TEXT, 1),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((B, L), np.int32),
        "decoder_task_ids": np.repeat(tasks[:, None], L, 1),
    }
    trainer = Trainer(model, state, partitioner, jax.random.PRNGKey(0))

    def step() -> None:
        trainer.train(batch)
        jax.block_until_ready(trainer.state.trainable)

    return step


def serve(name: str) -> None:
    """A contestant: one step for every line on standard input, answered with its seconds."""
    before = peak_mib()
    if name != "peft":
        host_memory.keep_freed()
    step = peft_step() if "peft" in name else our_step(name == "mpt_jax_distilled")
    for _ in range(2):  # compiling, and whatever else happens only once
        step()
    print(json.dumps({"before_mib": before}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), flush=True)


def compare(repeats: int) -> dict[str, dict[str, float]]:
    """Every contestant's median step and peak memory, steps taken in turns."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--serve"]
    workers, found = {}, {}
    for name in CONTESTANTS:
        workers[name] = subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found[name] = {"before_mib": _answer(workers[name])["before_mib"], "seconds": []}
    for _ in range(repeats):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            answer = _answer(worker)
            found[name]["seconds"].append(answer["seconds"])
            found[name]["peak_mib"] = answer["peak_mib"]
    for name, worker in workers.items():
        worker.stdin.close()
        worker.wait()
        seconds = found[name].pop("seconds")
        found[name] |= {
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
        }
    return found


def _answer(worker: subprocess.Popen) -> dict:
    while line := worker.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{worker.args} ended without an answer (exit code {worker.wait()}).")


def main() -> None:
    """Prints a table, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    found = compare(args.repeats)
    ratios = {
        "time, ours / PEFT": found["mpt_jax"]["median_seconds"] / found["peft"]["median_seconds"],
        "time, ours / PEFT with kept memory": found["mpt_jax"]["median_seconds"]
        / found["peft_keeping_memory"]["median_seconds"],
        "peak memory, ours / PEFT": found["mpt_jax"]["peak_mib"] / found["peft"]["peak_mib"],
        "time, distilled / not": found["mpt_jax_distilled"]["median_seconds"]
        / found["mpt_jax"]["median_seconds"],
    }
    for name, row in found.items():
        print(
            f"{name:20} {row['median_seconds']:.2f} s (min {row['min_seconds']:.2f}, max "
            f"{row['max_seconds']:.2f})  peak {row['peak_mib']:.0f} MiB, "
            f"{row['before_mib']:.0f} before the model"
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    machine = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}
    record = {"repeats": args.repeats, **machine, "contestants": found, "ratios": ratios}
    figures.report(record, args.out)


if __name__ == "__main__":
    main()
